"""LoRA's settings, and the wrappers they make of a model's modules."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal, TypeVar

import torch
from pydantic import Field, field_validator, model_validator
from torch import nn

from lit_lora.errors import UsageError
from lit_lora.peft.core.base_tensors import base_tensors
from lit_lora.peft.core.capabilities import InitializesFromData, ScalesLearningRate, TakesTokens
from lit_lora.peft.core.matching import matches, select, short_names
from lit_lora.peft.core.module_names import names_of
from lit_lora.peft.core.modules import OwnModule, own_modules, replace_module
from lit_lora.peft.core.modules_to_save import TokenEmbedding, TokenHead, TrainedCopy, train_tokens
from lit_lora.peft.core.passes import Pass
from lit_lora.peft.core.targeted import TargetedMethod, check_rank, layer_number, whole_modules
from lit_lora.peft.core.updates import LowRank, Magnitude
from lit_lora.peft.lora.conv import Conv, LoRAConv
from lit_lora.peft.lora.data_inits import gradient_factors, principal_inputs, share_ranks, sum_gradients
from lit_lora.peft.lora.embedding import LoRAEmbedding
from lit_lora.peft.lora.inits import WeightInit, start_factors
from lit_lora.peft.lora.linear import Init, LoRALinear
from lit_lora.peft.lora.parameters import LoRAParameters, adaptable_parameters, matrix_size

__all__ = ["LoRAConfig"]

_OUTSIDE = "parameter outside a linear layer"

DataInit = Literal["eva", "lora-ga"]


class LoRAConfig(TargetedMethod, TakesTokens, InitializesFromData, ScalesLearningRate):
    """LoRA: low-rank updates of frozen layers."""

    adapts: ClassVar[tuple[type[nn.Module], ...]] = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    peft_type: ClassVar[str] = "LORA"
    peft_keys: ClassVar[frozenset[str]] = (
        frozenset(["r", "lora_alpha", "lora_dropout", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora"])
        | frozenset(["bias", "target_parameters", "init_lora_weights", "trainable_token_indices"])
        | frozenset(["megatron_core", "qalora_group_size", "eva_config"])
    )
    renamed: ClassVar[Mapping[str, str]] = {"start_rows": "init_rows"}

    name: Literal["lora"] = Field("lora", description="The method.")
    rank: int = Field(
        8, ge=1, description="Rank of the updates; a higher rank has more capacity and takes more memory."
    )
    alpha: float | None = Field(
        None, gt=0, description="Scale of the updates, which are multiplied by alpha / rank; 2 x rank if omitted."
    )
    target_parameters: list[str] = Field(
        [],
        description="Parameters outside linear layers to adapt as well, by name: experts.gate_up_proj and "
        "experts.down_proj for the experts of a mixture, gate.weight for its routers.",
    )
    dropout: float = Field(
        0.0, ge=0, lt=1, description="Share of the updates' inputs to zero in training; try 0.05 on little data."
    )
    rank_pattern: dict[str, int] = Field(
        {}, description="Other ranks by module name, such as {v_proj: 16}; the first match applies."
    )
    alpha_pattern: dict[str, float] = Field(
        {}, description="Other alphas by module name, such as {v_proj: 32}; the first match applies."
    )
    bias: Literal["none", "all", "lora_only"] = Field(
        "none", description="Biases to train: none, all of the model, or lora_only, those of the adapted modules."
    )
    use_rslora: bool = Field(False, description="Scale by alpha / sqrt(rank), which stays stable for large ranks.")
    loraplus_lr_ratio: float = Field(
        1.0,
        gt=0,
        description="Learning rate of B as a multiple of optimizer.lr (LoRA+); try 16. Above 1, the default of "
        "optimizer.lr is 1e-4.",
    )
    freeze_A: bool = Field(
        False,
        description="Freeze A at its random values and train only B (LoRA-FA), which saves memory; the default of "
        "optimizer.lr is then 6e-4.",
    )
    init: Init | WeightInit | DataInit = Field(
        "kaiming",
        description="Initial values of A, with B at zero: kaiming, gaussian or eva (principal components of the "
        "layer's inputs on your rows, which also redistribute ranks). Or of both: pissa (the weight's largest singular "
        "values), olora (its QR factors) or lora-ga (gradients on your rows); these save the adapter with twice the "
        "rank. For pissa and olora, the default of optimizer.lr is 1e-4.",
    )
    init_rows: int | None = Field(None, ge=1, description="Number of training rows for eva and lora-ga; 64 if omitted.")
    rho: float | None = Field(
        None,
        ge=1,
        description="Maximum rank that eva may give a layer, as a multiple of rank; 2 if omitted, 1 keeps all ranks.",
    )
    trainable_tokens: list[int] | list[str] = Field(
        [], description="Tokens, by id or text, whose embedding and head rows train; new ones are added."
    )

    @field_validator("trainable_tokens", mode="before")
    @classmethod
    def _ids_or_texts(cls, value: Any) -> Any:
        # By exact type: pydantic would accept true as 1, and turn a mixed list into texts.
        if isinstance(value, list) and {type(token) for token in value} in (set(), {int}, {str}):
            return value
        raise ValueError(f"expected a list of token ids or a list of token texts, got {value!r}")

    @model_validator(mode="after")
    def _check_init(self) -> LoRAConfig:
        is_supported = (
            self.init in ("kaiming", "gaussian") or self.name == "lora" or (self.name == "dora" and self.init == "eva")
        )
        if not is_supported:
            raise ValueError(f"init {self.init!r} is for lora, {self.title} supports kaiming and gaussian")
        if self.init_rows is not None and not self.rows_for_init:
            raise ValueError(f"init_rows has no effect with init {self.init!r}, only with eva and lora-ga")
        if self.rho is not None and self.init != "eva":
            raise ValueError(f"rho has no effect with init {self.init!r}, only with eva")
        return self

    @model_validator(mode="after")
    def _check_parameters(self) -> LoRAConfig:
        if not self.target_parameters:
            return self
        if self.name != "lora":
            raise ValueError(f"target_parameters are for lora, {self.title} adapts linear layers only")
        if self.dropout:
            raise ValueError("target_parameters need dropout 0: their update has no input of its own to drop")
        if self.init not in ("kaiming", "gaussian"):
            raise ValueError(f"init {self.init!r} is for linear layers; target_parameters need kaiming or gaussian")
        return self

    @property
    def rows_for_init(self) -> int:
        """Number of rows of the data that EVA and LoRA-GA need; 0 for other inits."""
        if self.init not in ("eva", "lora-ga"):
            return 0
        return self.init_rows or 64

    def with_token_ids(self, add_tokens: Callable[[list[str]], list[int]]) -> LoRAConfig:
        """These settings with token texts turned into ids, such as by ``Tokenizer.add_tokens``."""
        texts = [token for token in self.trainable_tokens if isinstance(token, str)]
        if not texts:
            return self
        return self.model_copy(update={"trainable_tokens": add_tokens(texts)})

    @property
    def base_alpha(self) -> float:
        """Alpha of the modules that no pattern matches."""
        return 2 * self.rank if self.alpha is None else self.alpha

    def scaling(self, rank: int, alpha: float) -> float:
        """The factor of a module's update."""
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def lr_factors(self, model: nn.Module) -> dict[str, float]:
        """LoRA+: the factor of every ``lora_B`` that starts at zero.

        Source: Hayou et al. 2024, "LoRA+: Efficient Low Rank Adaptation of Large Models", section 4.
        """
        if self.loraplus_lr_ratio == 1:
            return {}
        factors = {}
        for name, module in own_modules(model).items():
            if isinstance(module, LoRALinear):
                factors[f"{name}.lora_B"] = self.loraplus_lr_ratio
            elif isinstance(module, LoRAParameters):
                factors |= {f"{name}.lora_B_{parameter}": self.loraplus_lr_ratio for parameter in module.sizes}
        return factors

    @property
    def lr(self) -> float | None:
        """The learning rate if the config gives none: lower where each step changes more, higher where it changes less.

        Source: measured, ``benchmarks/comparison_202611.md``; for LoRA+ half of LoRA's, Hayou et al. 2024, section 5.
        """
        if self.loraplus_lr_ratio > 1 or self.init in ("pissa", "olora"):
            return 1e-4
        return 6e-4 if self.freeze_A else self.default_lr

    @property
    def title(self) -> str:
        """The method's name as written in text."""
        return "LoRA"

    @property
    def about(self) -> str:
        """The method, its rank and alpha."""
        return f"{self.title}, rank {self.rank}, alpha {self.base_alpha:g}"

    def peft_config(self, model: nn.Module) -> dict[str, Any]:
        """``adapter_config.json`` without the base model's name."""
        own = own_modules(model)
        adapted = [name for name, module in own.items() if isinstance(module, LoRALinear | LoRAEmbedding | LoRAConv)]
        parameters = _adapted_parameters(own)
        ranks, alphas = self._saved_sizes(own, adapted, parameters)
        rank = _usual(ranks, self.rank)
        alpha = _usual(alphas, self.base_alpha)
        return {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "inference_mode": True,
            "r": rank,
            "lora_alpha": alpha,
            "lora_dropout": self.dropout,
            "target_modules": short_names(model, adapted),
            "target_parameters": _short_parameter_names(model, parameters) or None,
            "rank_pattern": {f"^{name}": value for name, value in ranks.items() if value != rank},
            "alpha_pattern": {f"^{name}": value for name, value in alphas.items() if value != alpha},
            "use_rslora": self.use_rslora,
            "use_dora": False,
            "bias": self.bias,
            "modules_to_save": whole_modules(model) or None,
            "trainable_token_indices": _token_indices(own) or None,
            "fan_in_fan_out": False,
            "init_lora_weights": True,
        }

    def _saved_sizes(
        self, own: Mapping[str, OwnModule], modules: Sequence[str], parameters: Sequence[str]
    ) -> tuple[dict[str, int], dict[str, float]]:
        """Rank and alpha of the saved factors of each module and each parameter.

        The rank may be a multiple of that in the settings, such as for pissa; alpha is what gives the same scaling.
        """
        updates = {name: own[name].updates()["weight"] for name in modules}
        for name in parameters:
            module, _, parameter = name.rpartition(".")
            updates[name] = own[module].updates()[parameter]

        ranks: dict[str, int] = {}
        alphas: dict[str, float] = {}
        for name, update in updates.items():
            low = update.low if isinstance(update, Magnitude) else update
            assert isinstance(low, LowRank)
            rank = low.right.shape[-2]
            alpha = low.scaling * (math.sqrt(rank) if self.use_rslora else rank)
            if math.isclose(alpha, round(alpha), rel_tol=1e-12):  # rounding in scaling = alpha / rank
                alpha = round(alpha)
            ranks[name] = rank
            alphas[name] = alpha
        return ranks, alphas

    def targets(self, model: nn.Module, copies: list[str] | None = None) -> list[str]:
        """Names of the modules to wrap, in the model's order; none are needed beside ``target_parameters``.

        Raises:
            UsageError: A name matches nothing that can be adapted, nothing is left, or two settings name the same.
        """
        parameters = self.parameters(model)
        for name in parameters:
            module = name.rpartition(".")[0]
            if module in (copies or ()):
                raise UsageError(f"peft: {module} is in both target_parameters and modules_to_save, expected only one")
        targets = [] if parameters and not self.target_modules else super().targets(model, copies)
        select(self.rank_pattern, [*targets, *parameters], key="peft.rank_pattern")
        select(self.alpha_pattern, [*targets, *parameters], key="peft.alpha_pattern")
        return targets

    def parameters(self, model: nn.Module) -> list[str]:
        """Names of the parameters that ``target_parameters`` choose, in the model's order.

        Raises:
            UsageError: A name matches nothing that can be adapted, or nothing is left.
        """
        if not self.target_parameters:
            return []
        available = adaptable_parameters(model)
        chosen = select(self.target_parameters, available, key="peft.target_parameters", what=_OUTSIDE)
        chosen = [name for name in chosen if self.layers is None or layer_number(name) in (None, *self.layers)]
        if not chosen:
            raise UsageError(f"peft.target_parameters: no parameter in layers {self.layers}")
        return chosen

    def rank_of(self, name: str) -> int:
        """The rank of a layer's update: the first in ``rank_pattern`` that matches, or else ``rank``."""
        rank = _first_match(self.rank_pattern, name)
        return self.rank if rank is None else rank

    def ranks_and_alphas(self, targets: list[str]) -> dict[str, tuple[int, float]]:
        """Rank and alpha of each target.

        Raises:
            UsageError: The value of a pattern is not positive.
        """
        ranks = _by_pattern(self.rank_pattern, targets, "peft.rank_pattern")
        alphas = _by_pattern(self.alpha_pattern, targets, "peft.alpha_pattern")
        return {name: (int(ranks.get(name, self.rank)), alphas.get(name, self.base_alpha)) for name in targets}

    def wrapped(self, targets: Mapping[str, nn.Linear | nn.Embedding | Conv]) -> dict[str, OwnModule]:
        """The wrappers of the targets.

        Raises:
            UsageError: A pattern matches no target, or a rank is too large.
        """
        ranks = self.ranks_and_alphas(list(targets))
        if problems := self.misfits(targets):
            raise UsageError("\n".join(problems))
        return {
            name: self.wrap(name, targets[name], rank, self.scaling(rank, alpha))
            for name, (rank, alpha) in ranks.items()
        }

    def misfits(self, targets: Mapping[str, nn.Linear | nn.Embedding | Conv]) -> list[str]:
        """The message for the first rank that is too large, if any is."""
        for name, base in targets.items():
            try:
                check_rank(self.rank_of(name), name, _shape(base))
            except UsageError as error:
                return [str(error)]
        return []

    def wrap(self, name: str, base: nn.Linear | nn.Embedding | Conv, rank: int, scaling: float) -> OwnModule:
        """The wrapper of ``base``, with an update of ``rank``.

        Raises:
            UsageError: The settings are not for a module of this kind.
        """
        if self.init not in ("kaiming", "gaussian") and not isinstance(base, nn.Linear):
            raise UsageError(f"peft.init: {self.init!r} is for linear layers, but {name} is {type(base).__name__}")
        if isinstance(base, nn.Embedding):
            return LoRAEmbedding(base, rank, scaling)
        if not isinstance(base, nn.Linear):
            if self.trains_bias(name):
                raise UsageError(
                    f"peft.bias: {self.bias!r} cannot train the bias of {name}, a convolution; expected none"
                )
            return LoRAConv(base, rank, scaling, self.dropout)

        random_init = "gaussian" if self.init == "gaussian" else "kaiming"
        settings = {"dropout": self.dropout, "init": random_init, "train_bias": self.trains_bias(name)}
        wrapped = self.linear(base, rank, scaling, **settings)
        if self.init == "pissa" or self.init == "olora":
            wrapped.start_at(*start_factors(self.init, base.weight, rank, scaling))
        elif self.init == "lora-ga":
            # The module needs its final shape, such as for a resumed run; init_from_data sets the values.
            wrapped.start_at(wrapped.lora_A.detach(), wrapped.lora_B.detach())
        wrapped.lora_A.requires_grad_(not self.freeze_A)
        return wrapped

    def trains_bias(self, name: str) -> bool:
        """Whether the bias of an adapted module trains, if it has one."""
        return self.bias != "none"

    def linear(self, base: nn.Linear, rank: int, scaling: float, **settings: Any) -> LoRALinear:
        """The wrapper of a linear layer."""
        return LoRALinear(base, rank, scaling, **settings)

    def init_from_data(self, model: nn.Module, passes: Iterable[Pass]) -> LoRAConfig:
        """Apply the method, initialized by EVA or LoRA-GA from the base model's inputs or gradients on the rows.

        Returns:
            These settings; for EVA, with the rank that each layer got.

        Raises:
            UsageError: A name matches no module, or the settings do not fit the model or the rows.
        """
        ranks_and_alphas = self.ranks_and_alphas(self.targets(model))
        ranks = {name: rank for name, (rank, _) in ranks_and_alphas.items()}
        alphas = {name: alpha for name, (_, alpha) in ranks_and_alphas.items()}
        for name, rank in ranks.items():
            layer = model.get_submodule(name)
            if not isinstance(layer, nn.Linear):
                raise UsageError(f"peft.init: {self.init!r} is for linear layers, but {name} is {type(layer).__name__}")
            needed = rank if self.init == "eva" else 2 * rank  # lora-ga takes A and B from different singular vectors
            check_rank(needed, name, _shape(layer))
        if self.init == "eva":
            return self._init_eva(model, ranks, alphas, passes)
        return self._init_lora_ga(model, ranks, passes)

    def _init_eva(
        self, model: nn.Module, ranks: Mapping[str, int], alphas: Mapping[str, float], passes: Iterable[Pass]
    ) -> LoRAConfig:
        """Set every ``A`` to the directions in which its layer's inputs vary most; ``B`` stays zero."""
        max_ranks: dict[str, int] = {}
        for name, rank in ranks.items():
            layer = model.get_submodule(name)
            assert isinstance(layer, nn.Linear)
            max_ranks[name] = min(round((self.rho or 2) * rank), layer.out_features, layer.in_features)
        components = principal_inputs(model, ranks, max(max_ranks.values()), passes)
        new_ranks = {name: rank for name, rank in share_ranks(ranks, max_ranks, components).items() if rank > 0}

        chosen = {
            "target_modules": list(new_ranks),
            "exclude_modules": [],
            "layers": None,
            "rank_pattern": new_ranks,
            # The scaling, alpha / rank, stays the same.
            "alpha_pattern": {name: alphas[name] * rank / ranks[name] for name, rank in new_ranks.items()},
        }
        method = self.model_copy(update=chosen)
        method.apply(model)
        with torch.no_grad():
            for name, rank in new_ranks.items():
                model.get_parameter(f"{name}.lora_A").copy_(components[name].directions[:rank])
        return method

    def _init_lora_ga(self, model: nn.Module, ranks: Mapping[str, int], passes: Iterable[Pass]) -> LoRAConfig:
        """Set every ``A`` and ``B`` to singular vectors of its weight's gradient."""
        gradients = sum_gradients(model, ranks, passes)
        self.apply(model)
        for name, rank in ranks.items():
            layer = model.get_submodule(name)
            assert isinstance(layer, LoRALinear)
            layer.start_at(*gradient_factors(gradients.pop(name), rank))
        return self

    def apply(self, model: nn.Module) -> None:
        """Wrap the targets in place; call ``freeze`` first.

        Raises:
            UsageError: A name matches no module, two settings name the same module, or the model already has an
                adapter.
        """
        super().apply(model)
        self._adapt_parameters(model)
        if self.bias != "none":
            self._train_biases(model)
        self._train_tokens(model)

    def _adapt_parameters(self, model: nn.Module) -> None:
        """Wrap the modules that have parameters of ``target_parameters``, in place.

        Raises:
            UsageError: A rank is too large.
        """
        settings: dict[str, dict[str, tuple[int, float]]] = {}  # module -> its parameters' ranks and scalings
        for name, (rank, alpha) in self.ranks_and_alphas(self.parameters(model)).items():
            module, _, parameter = name.rpartition(".")
            self._check_parameter_rank(model, name, rank)
            settings.setdefault(module, {})[parameter] = rank, self.scaling(rank, alpha)
        random_init: Init = "gaussian" if self.init == "gaussian" else "kaiming"
        for name, of_module in settings.items():
            base = model.get_submodule(name)
            replace_module(model, name, LoRAParameters(base, of_module, random_init, train_A=not self.freeze_A))

    def _check_parameter_rank(self, model: nn.Module, name: str, rank: int) -> None:
        """Check that a parameter's rank is at most that of its matrices.

        Raises:
            UsageError: It is too large.
        """
        module_name, _, parameter = name.rpartition(".")
        module = model.get_submodule(module_name)
        size = matrix_size(module, tuple(getattr(module, parameter).shape))
        check_rank(rank, name, (size.outputs, size.inputs))

    def _train_biases(self, model: nn.Module) -> None:
        """Train the biases of modules that are not adapted too, if all should train, in place.

        Raises:
            UsageError: The model has no bias to train, those of adapted modules included.
        """
        own = own_modules(model)
        inside = tuple(f"{name}." for name in own)
        others = []
        if self.bias == "all":
            for name, module in model.named_modules():
                in_base = not isinstance(module, OwnModule) and not f"{name}.".startswith(inside)
                if in_base and isinstance(getattr(module, "bias", None), nn.Parameter):
                    others.append(name)
        for name in others:
            replace_module(model, name, TrainedCopy(model.get_submodule(name), ["bias"]))

        of_adapted = any(isinstance(module, LoRALinear) and module.trained_bias is not None for module in own.values())
        if not of_adapted and not others:
            where = "this model has" if self.bias == "all" else "the adapted modules have"
            raise UsageError(f"peft.bias: {self.bias!r}, but {where} no bias to train")

    def _train_tokens(self, model: nn.Module) -> None:
        """Train the rows of ``trainable_tokens``, in place.

        Raises:
            UsageError: They are texts, do not fit the model, or the embedding or head is adapted in another way.
        """
        if not self.trainable_tokens:
            return
        ids = [token for token in self.trainable_tokens if isinstance(token, int)]
        if len(ids) < len(self.trainable_tokens):
            raise UsageError("peft.trainable_tokens: expected token ids, got texts; call with_token_ids first")
        names = names_of(model)
        for name, module in own_modules(model).items():
            if matches(names.embedding, name) or matches(names.head, name):
                other = "modules_to_save" if isinstance(module, TrainedCopy) else "target_modules"
                raise UsageError(f"peft: {name} is in {other} and has trainable_tokens, expected only one of them")
        train_tokens(model, ids)


Number = TypeVar("Number", int, float)


def _adapted_parameters(own: Mapping[str, OwnModule]) -> list[str]:
    """The parameters outside linear layers that have an update."""
    return [
        f"{name}.{parameter}"
        for name, module in own.items()
        if isinstance(module, LoRAParameters)
        for parameter in module.sizes
    ]


def _short_parameter_names(model: nn.Module, names: Sequence[str]) -> list[str]:
    """The last two parts of parameters' names if they match these and no others, else the full names."""
    short = list(dict.fromkeys(".".join(name.split(".")[-2:]) for name in names))
    matching = [name for name in base_tensors(model) if any(matches(pattern, name) for pattern in short)]
    return short if sorted(matching) == sorted(names) else list(names)


def _token_indices(modules: Mapping[str, OwnModule]) -> dict[str, list[int]]:
    """Trained tokens by embedding or head; a tied head is left out, for PEFT ties it to the embedding when it loads."""
    indices: dict[str, list[int]] = {}
    seen: set[int] = set()
    for name, module in modules.items():
        if isinstance(module, TokenEmbedding | TokenHead) and id(module.token_rows) not in seen:
            seen.add(id(module.token_rows))
            indices[name.rpartition(".")[2]] = list(module.ids)
    return indices


def _shape(base: nn.Linear | nn.Embedding | Conv) -> Sequence[int]:
    """Shape of the weight, without reading it, which would dequantize a quantized one."""
    return (base.out_features, base.in_features) if isinstance(base, nn.Linear) else base.weight.shape


def _usual(values: Mapping[str, Number], setting: Number) -> Number:
    """The value that needs no pattern: the setting if any module has it, else the most frequent one."""
    counts = Counter(values.values())
    if setting in counts or not counts:
        return setting
    return counts.most_common(1)[0][0]


def _by_pattern(patterns: Mapping[str, float], targets: list[str], key: str) -> dict[str, float]:
    """The value of the first pattern that matches, for each target that one does.

    Raises:
        UsageError: A value is not positive.
    """
    values: dict[str, float] = {}
    for name in targets:
        value = _first_match(patterns, name)
        if value is None:
            continue
        if value <= 0:
            raise UsageError(f"{key}: {name}: expected more than 0, got {value}")
        values[name] = value
    return values


def _first_match(patterns: Mapping[str, Number], name: str) -> Number | None:
    """The value of the first pattern that matches ``name``."""
    for pattern, value in patterns.items():
        if matches(pattern, name):
            return value
    return None
