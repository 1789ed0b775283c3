"""LoRA's settings, and which of the model's modules they wrap."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal, TypeVar

import torch
from pydantic import Field, field_validator, model_validator
from torch import nn

from lit_lora.errors import UsageError
from lit_lora.peft.core.capabilities import InitializesFromData, ScalesLearningRate, TakesTokens
from lit_lora.peft.core.matching import matches, select, short_names
from lit_lora.peft.core.module_names import names_of
from lit_lora.peft.core.modules import OwnModule, own_modules, replace_module
from lit_lora.peft.core.modules_to_save import TokenEmbedding, TokenHead, TrainedCopy, train_tokens
from lit_lora.peft.core.passes import Pass
from lit_lora.peft.core.targeted import TargetedMethod, check_rank, whole_modules
from lit_lora.peft.core.updates import LowRank, Magnitude
from lit_lora.peft.lora.conv import Conv, LoRAConv
from lit_lora.peft.lora.data_inits import gradient_factors, principal_inputs, share_ranks, sum_gradients
from lit_lora.peft.lora.embedding import LoRAEmbedding
from lit_lora.peft.lora.inits import WeightInit, start_factors
from lit_lora.peft.lora.linear import Init, LoRALinear

__all__ = ["LoRAConfig"]

DataInit = Literal["eva", "lora-ga"]


class LoRAConfig(TargetedMethod, TakesTokens, InitializesFromData, ScalesLearningRate):
    """LoRA: a low-rank update beside frozen layers."""

    adapts: ClassVar[tuple[type[nn.Module], ...]] = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    peft_type: ClassVar[str] = "LORA"
    peft_keys: ClassVar[frozenset[str]] = frozenset(
        ["r", "lora_alpha", "lora_dropout", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "bias"]
    ) | frozenset(["init_lora_weights", "trainable_token_indices", "megatron_core", "qalora_group_size", "eva_config"])
    renamed: ClassVar[Mapping[str, str]] = {"start_rows": "init_rows"}

    name: Literal["lora"] = Field("lora", description="The method.")
    rank: int = Field(8, ge=1, description="Rank of the update: more rank, more capacity and memory.")
    alpha: float | None = Field(None, gt=0, description="The update is scaled by alpha / rank; 2 x rank when omitted.")
    dropout: float = Field(
        0.0, ge=0, lt=1, description="Share of the branch's inputs zeroed in training; try 0.05 on little data."
    )
    rank_pattern: dict[str, int] = Field({}, description="Name: rank, where it differs; the first that matches holds.")
    alpha_pattern: dict[str, float] = Field({}, description="Name: alpha, where it differs; the first match holds.")
    bias: Literal["none", "all", "lora_only"] = Field(
        "none", description="Train no bias, every bias of the model, or those of the adapted modules."
    )
    use_rslora: bool = Field(False, description="Scale by alpha / sqrt(rank), which stays stable for large ranks.")
    loraplus_lr_ratio: float = Field(
        1.0,
        gt=0,
        description="LoRA+: B learns at this many times optimizer.lr; try 16. Then optimizer.lr is 1e-4 "
        "where it is not given.",
    )
    freeze_A: bool = Field(
        False,
        description="LoRA-FA: A keeps its random start, only B trains: less memory. It learns at 6e-4 where "
        "optimizer.lr is not given.",
    )
    init: Init | WeightInit | DataInit = Field(
        "kaiming",
        description="How A starts, while B starts at zero: kaiming, gaussian, or eva (the principal components of what "
        "the layer reads on your rows, which also share out the ranks). Or both from the weight, pissa (its largest "
        "singular values) and olora (its QR factors), or from the loss's gradient on your rows, lora-ga; of these the "
        "adapter is written with twice the rank. pissa and olora learn at 1e-4 where optimizer.lr is not given.",
    )
    init_rows: int | None = Field(
        None, ge=1, description="Training rows that eva and lora-ga start from; 64 when omitted."
    )
    rho: float | None = Field(
        None,
        ge=1,
        description="eva: a layer gets up to this many times rank; 2 when omitted, 1: ranks stay.",
    )
    trainable_tokens: list[int] | list[str] = Field(
        [], description="Tokens whose embedding and head rows train, by id or by text; new ones are added."
    )

    @field_validator("trainable_tokens", mode="before")
    @classmethod
    def _ids_or_texts(cls, value: Any) -> Any:
        if isinstance(value, list) and ({type(token) for token in value} in (set(), {int}, {str})):
            return value
        raise ValueError(f"expected a list of token ids or a list of token texts, got {value!r}")

    @model_validator(mode="after")
    def _start_fits(self) -> LoRAConfig:
        starts_so = self.name == "lora" or (self.name == "dora" and self.init == "eva")
        if self.init not in ("kaiming", "gaussian") and not starts_so:
            raise ValueError(f"init {self.init!r} is for lora, {self.title} starts at kaiming or gaussian")
        if self.init_rows is not None and not self.rows_for_init:
            raise ValueError(f"init_rows has no effect with init {self.init!r}, it is for eva and lora-ga")
        if self.rho is not None and self.init != "eva":
            raise ValueError(f"rho has no effect with init {self.init!r}, it is for eva")
        return self

    @property
    def rows_for_init(self) -> int:
        """Rows of the data that EVA and LoRA-GA look at."""
        return (self.init_rows or 64) if self.init in ("eva", "lora-ga") else 0

    def with_token_ids(self, add_tokens: Callable[[list[str]], list[int]]) -> LoRAConfig:
        """These settings with tokens named by text turned into ids, such as by ``Tokenizer.add_tokens``."""
        texts = [token for token in self.trainable_tokens if isinstance(token, str)]
        return self.model_copy(update={"trainable_tokens": add_tokens(texts)}) if texts else self

    @property
    def base_alpha(self) -> float:
        """Alpha where no pattern says otherwise."""
        return 2 * self.rank if self.alpha is None else self.alpha

    def scaling(self, rank: int, alpha: float) -> float:
        """The factor of a module's branch."""
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def lr_factors(self, model: nn.Module) -> dict[str, float]:
        """LoRA+: the factor of every ``lora_B`` beside a linear layer, which starts at zero.

        Source: Hayou et al. 2024, "LoRA+: Efficient Low Rank Adaptation of Large Models", section 4.
        """
        if self.loraplus_lr_ratio == 1:
            return {}
        own = own_modules(model).items()
        return {f"{name}.lora_B": self.loraplus_lr_ratio for name, module in own if isinstance(module, LoRALinear)}

    @property
    def lr(self) -> float | None:
        """Lower where more moves at each step, higher where less does; ``benchmarks/comparison_202611.md``.

        Source: half of LoRA's for LoRA+, Hayou et al. 2024, section 5.
        """
        if self.loraplus_lr_ratio > 1 or self.init in ("pissa", "olora"):
            return 1e-4
        return 6e-4 if self.freeze_A else self.default_lr

    @property
    def title(self) -> str:
        """The method's name as one writes it."""
        return "LoRA"

    @property
    def about(self) -> str:
        """Rank and alpha."""
        return f"{self.title}, rank {self.rank}, alpha {self.base_alpha:g}"

    def peft_config(self, model: nn.Module) -> dict[str, Any]:
        """``adapter_config.json``, but for the base model's name."""
        own = own_modules(model)
        low = {n: m for n, m in own.items() if isinstance(m, LoRALinear | LoRAEmbedding | LoRAConv)}
        ranks, alphas = self._written(low)
        rank, alpha = _usual(ranks, self.rank), _usual(alphas, self.base_alpha)
        rows: dict[int, tuple[str, list[int]]] = {}  # a tied head shares the embedding's rows: PEFT ties it again
        for name, module in own.items():
            if isinstance(module, TokenEmbedding | TokenHead):
                rows.setdefault(id(module.token_rows), (name.rpartition(".")[2], list(module.ids)))
        return {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "inference_mode": True,
            "r": rank,
            "lora_alpha": alpha,
            "lora_dropout": self.dropout,
            "target_modules": short_names(model, list(low)),
            "rank_pattern": {f"^{name}": r for name, r in ranks.items() if r != rank},
            "alpha_pattern": {f"^{name}": a for name, a in alphas.items() if a != alpha},
            "use_rslora": self.use_rslora,
            "use_dora": False,
            "bias": self.bias,
            "modules_to_save": whole_modules(model) or None,
            "trainable_token_indices": dict(rows.values()) or None,
            "fan_in_fan_out": False,
            "init_lora_weights": True,
        }

    def _written(self, modules: Mapping[str, OwnModule]) -> tuple[dict[str, int], dict[str, float]]:
        """Rank and alpha of each module as its file has them: of all that the module adds to its base."""
        ranks: dict[str, int] = {}
        alphas: dict[str, float] = {}
        for name, module in modules.items():
            update = module.updates()["weight"]
            low = update.low if isinstance(update, Magnitude) else update
            assert isinstance(low, LowRank)
            ranks[name] = low.right.shape[0]
            alpha = low.scaling * (math.sqrt(ranks[name]) if self.use_rslora else ranks[name])
            alphas[name] = round(alpha) if math.isclose(alpha, round(alpha), rel_tol=1e-12) else alpha
        return ranks, alphas

    def ranks_and_alphas(self, targets: list[str]) -> dict[str, tuple[int, float]]:
        """Rank and alpha of each target.

        Raises:
            UsageError: A pattern matches none of them, or gives a value that is not positive.
        """
        ranks = _by_pattern(self.rank_pattern, targets, "peft.rank_pattern")
        alphas = _by_pattern(self.alpha_pattern, targets, "peft.alpha_pattern")
        return {name: (int(ranks.get(name, self.rank)), alphas.get(name, self.base_alpha)) for name in targets}

    def wrapped(self, targets: Mapping[str, nn.Linear | nn.Embedding | Conv]) -> dict[str, OwnModule]:
        """A low-rank update beside each target.

        Raises:
            UsageError: A pattern matches none of them, or a rank is too large.
        """
        ranks = self.ranks_and_alphas(list(targets))
        if problems := self.misfits(targets):
            raise UsageError("\n".join(problems))
        return {
            name: self.wrap(name, targets[name], rank, self.scaling(rank, alpha))
            for name, (rank, alpha) in ranks.items()
        }

    def misfits(self, targets: Mapping[str, nn.Linear | nn.Embedding | Conv]) -> list[str]:
        """The first rank that is too large, if there is one."""
        for name, base in targets.items():
            rank = next((rank for pattern, rank in self.rank_pattern.items() if matches(pattern, name)), self.rank)
            try:
                check_rank(rank, name, _shape(base))
            except UsageError as error:
                return [str(error)]
        return []

    def wrap(self, name: str, base: nn.Linear | nn.Embedding | Conv, rank: int, scaling: float) -> OwnModule:
        """The module with an update of ``rank`` beside ``base``.

        Raises:
            UsageError: The settings are not for a module of this kind.
        """
        if self.init not in ("kaiming", "gaussian") and not isinstance(base, nn.Linear):
            raise UsageError(f"peft.init: {self.init!r} is for linear layers, {name} is {type(base).__name__}")
        if isinstance(base, nn.Embedding):
            return LoRAEmbedding(base, rank, scaling)
        if not isinstance(base, nn.Linear):
            if self.trains_bias(name):
                raise UsageError(f"peft.bias: {self.bias!r}, but {name} is a convolution, whose bias does not train")
            return LoRAConv(base, rank, scaling, self.dropout)
        plain = "gaussian" if self.init == "gaussian" else "kaiming"
        settings = {"dropout": self.dropout, "init": plain, "train_bias": self.trains_bias(name)}
        wrapped = self.linear(base, rank, scaling, **settings)
        if self.init == "pissa" or self.init == "olora":
            wrapped.start_at(*start_factors(self.init, base.weight, rank, scaling))
        elif self.init == "lora-ga":  # until init_from_data is called, as kaiming
            wrapped.start_at(wrapped.lora_A.detach(), wrapped.lora_B.detach())
        wrapped.lora_A.requires_grad_(not self.freeze_A)
        return wrapped

    def trains_bias(self, name: str) -> bool:
        """Whether the bias of an adapted module trains, where it has one."""
        return self.bias != "none"

    def linear(self, base: nn.Linear, rank: int, scaling: float, **settings: Any) -> LoRALinear:
        """What takes the place of a linear layer."""
        return LoRALinear(base, rank, scaling, **settings)

    def init_from_data(self, model: nn.Module, passes: Iterable[Pass]) -> LoRAConfig:
        """As :meth:`apply`, for EVA and LoRA-GA: from what the model, yet without an adapter, does with the rows.

        Returns:
            These settings; of EVA, with the ranks that its layers got.

        Raises:
            UsageError: A name matches no module, or the settings do not fit the model or the rows.
        """
        ranks = self.ranks_and_alphas(self.targets(model))
        most: dict[str, int] = {}
        for name, (rank, _) in ranks.items():
            layer = model.get_submodule(name)
            if not isinstance(layer, nn.Linear):
                raise UsageError(f"peft.init: {self.init!r} is for linear layers, {name} is {type(layer).__name__}")
            check_rank(rank if self.init == "eva" else 2 * rank, name, (layer.out_features, layer.in_features))
            most[name] = min(round((self.rho or 2) * rank), layer.out_features, layer.in_features)
        if self.init == "eva":
            return self._start_eva(model, ranks, most, passes)
        return self._start_ga(model, ranks, passes)

    def _start_eva(
        self,
        model: nn.Module,
        ranks: Mapping[str, tuple[int, float]],
        most: Mapping[str, int],
        passes: Iterable[Pass],
    ) -> LoRAConfig:
        """Give every ``A`` the directions in which its layer's inputs vary most; ``B`` stays zero."""
        found = principal_inputs(model, ranks, max(most.values()), passes)
        shared = share_ranks({name: rank for name, (rank, _) in ranks.items()}, most, found)
        got = {name: rank for name, rank in shared.items() if rank}
        alphas = {name: ranks[name][1] * rank / ranks[name][0] for name, rank in got.items()}
        places = {"target_modules": list(got), "exclude_modules": [], "layers": None}
        method = self.model_copy(update={**places, "rank_pattern": got, "alpha_pattern": alphas})
        method.apply(model)
        with torch.no_grad():
            for name, rank in got.items():
                model.get_parameter(f"{name}.lora_A").copy_(found[name].directions[:rank])
        return method

    def _start_ga(self, model: nn.Module, ranks: Mapping[str, tuple[int, float]], passes: Iterable[Pass]) -> LoRAConfig:
        """Give every ``A`` and ``B`` singular vectors of its weight's gradient."""
        gradients = sum_gradients(model, ranks, passes)
        self.apply(model)
        for name, (rank, _) in ranks.items():
            layer = model.get_submodule(name)
            assert isinstance(layer, LoRALinear)
            layer.start_at(*gradient_factors(gradients.pop(name), rank))
        return self

    def apply(self, model: nn.Module) -> None:
        """Wrap the targets in place; call ``freeze`` first.

        Raises:
            UsageError: A name matches no module, two settings want the same module, or there is an adapter already.
        """
        super().apply(model)
        if self.bias != "none":
            self._train_biases(model)
        self._train_tokens(model)

    def _train_biases(self, model: nn.Module) -> None:
        own = own_modules(model)
        inside = tuple(f"{name}." for name in own)
        adapted = any(isinstance(module, LoRALinear) and module.trained_bias is not None for module in own.values())
        free = [
            name
            for name, module in model.named_modules()
            if self.bias == "all"
            and not isinstance(module, OwnModule)
            and not f"{name}.".startswith(inside)
            and isinstance(getattr(module, "bias", None), nn.Parameter)
        ]
        for name in free:
            replace_module(model, name, TrainedCopy(model.get_submodule(name), ["bias"]))
        if not adapted and not free:
            raise UsageError(f"peft.bias: {self.bias!r}, but there is no bias to train in this model")

    def _train_tokens(self, model: nn.Module) -> None:
        ids = [token for token in self.trainable_tokens if isinstance(token, int)]
        if len(ids) < len(self.trainable_tokens):
            raise UsageError("peft.trainable_tokens: tokens given as text, but no tokenizer has turned them into ids")
        if not ids:
            return
        names = names_of(model)
        for name, module in own_modules(model).items():
            if matches(names.embedding, name) or matches(names.head, name):
                other = "modules_to_save" if isinstance(module, TrainedCopy) else "target_modules"
                raise UsageError(f"peft: {name} is in {other} and has trainable_tokens, expected one of the two")
        train_tokens(model, ids)


Number = TypeVar("Number", int, float)


def _shape(base: nn.Linear | nn.Embedding | Conv) -> Sequence[int]:
    """Of the weight, which may be quantised: reading it would take time."""
    return (base.out_features, base.in_features) if isinstance(base, nn.Linear) else base.weight.shape


def _usual(values: Mapping[str, Number], own: Number) -> Number:
    """``own`` if any module has it, else the most frequent value."""
    found = list(values.values())
    return own if own in found or not found else max(found, key=found.count)


def _by_pattern(patterns: Mapping[str, float], targets: list[str], key: str) -> dict[str, float]:
    """The value for each target that a pattern matches, by the first such pattern."""
    select(patterns, targets, key=key)
    found = {}
    for name in targets:
        value = next((value for pattern, value in patterns.items() if matches(pattern, name)), None)
        if value is not None:
            if value <= 0:
                raise UsageError(f"{key}: {name}: expected more than 0, got {value}")
            found[name] = value
    return found
