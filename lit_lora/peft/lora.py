"""LoRA: keep ``W``, learn a low-rank update beside it.

::

            x ────────────┬─────────────► W (out, in), frozen ────► + ──► y
                          │                                         ▲
                          └─► dropout ─► A (R, in) ─► B (out, R) ─► s

``y = W x + b + s B A x`` with ``s = alpha / rank``. ``B`` starts at zero, so nothing changes until the first step.
Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", section 4.1; the init of ``A`` follows
loralib (github.com/microsoft/LoRA), Kaiming-uniform with a = sqrt(5); rsLoRA is Kalajdzievski 2023, LoRA+ Hayou et al.
2024, LoRA-FA Zhang et al. 2023 (a frozen ``A``: the backward needs ``A x`` in the place of ``x``).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from lit_lora.errors import UsageError
from lit_lora.peft.base import Kind, Method, OwnModule, device_of, matches, own_modules, replace_module, select
from lit_lora.peft.lora_function import Part, lora_linears
from lit_lora.peft.trained import TrainedCopy, train_tokens
from lit_lora.peft.updates import LowRank, Replace, Update
from lit_lora.quantize import QuantizedLinear

__all__ = ["LoRAConfig", "LoRAEmbedding", "LoRALinear", "layer_number"]

Init = Literal["kaiming", "gaussian"]

# Output heads by the last part of their name: "all-linear" leaves them alone.
_HEADS = {"lm_head", "score", "classifier", "qa_outputs"}
_PRESETS = {"q,v": ["q_proj", "v_proj"]}


class LoRALinear(OwnModule):
    """A frozen linear layer with a trained low-rank update beside it.

    ``lora_A`` (R, in) and ``lora_B`` (out, R) are float32 whatever the dtype of the base layer: in bfloat16 a small
    learning rate would round every update away.

    Args:
        base_layer: The linear layer; it stays as it is.
        rank: R.
        scaling: The factor of the branch, alpha / rank.
        dropout: Share of the branch's inputs that are zeroed in training.
        init: How ``lora_A`` starts; ``lora_B`` starts at zero.
        train_bias: Train a float32 copy of the base layer's bias too.
    """

    def __init__(
        self,
        base_layer: nn.Linear,
        rank: int,
        scaling: float,
        dropout: float = 0.0,
        init: Init = "kaiming",
        *,
        train_bias: bool = False,
    ) -> None:
        super().__init__()
        self.base_layer: nn.Linear = base_layer
        self.rank, self.scaling, self.dropout = rank, scaling, dropout
        device = device_of(base_layer)
        self.lora_A = nn.Parameter(torch.empty(rank, base_layer.in_features, dtype=torch.float32, device=device))
        self.lora_B = nn.Parameter(torch.zeros(base_layer.out_features, rank, dtype=torch.float32, device=device))
        if init == "kaiming":
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        else:
            nn.init.normal_(self.lora_A, std=1 / rank)
        self.trained_bias: nn.Parameter | None = None
        if train_bias and base_layer.bias is not None:
            self.trained_bias = nn.Parameter(base_layer.bias.detach().to(torch.float32, copy=True))

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in) to (..., out)."""
        return LoRALinear.forward_together([self], x)[0]

    @staticmethod
    def forward_together(layers: Sequence[LoRALinear], x: Tensor) -> tuple[Tensor, ...]:
        """The outputs of layers that read the same input; see :func:`lit_lora.model.layers.project`."""
        dropout = layers[0].dropout if layers[0].training else 0.0
        mask = torch.empty(x.shape, dtype=torch.bool, device=x.device).bernoulli_(1 - dropout) if dropout else None
        return lora_linears(x, [layer._part(1 - dropout) for layer in layers], mask)

    def _part(self, keep: float) -> Part:
        base = self.base_layer
        bias = base.bias if self.trained_bias is None else self.trained_bias
        weight = base.quantized if isinstance(base, QuantizedLinear) else base.weight
        return Part(weight, bias, self.lora_A, self.lora_B, self.scaling / keep)

    def updates(self) -> dict[str, Update]:
        """``W + s B A``, and the trained bias."""
        updates: dict[str, Update] = {"weight": LowRank(self.lora_B.detach(), self.lora_A.detach(), self.scaling)}
        return updates if self.trained_bias is None else {**updates, "bias": Replace(self.trained_bias.detach())}

    def extra_repr(self) -> str:
        """Rank, scaling and dropout."""
        return f"rank={self.rank}, scaling={self.scaling:g}, dropout={self.dropout:g}"


class LoRAEmbedding(OwnModule):
    """A frozen embedding with a trained low-rank update: ``E[x] + s A^T[x] B^T``.

    Here ``lora_A`` (R, V) starts at zero and ``lora_B`` (D, R) normal: the roles are reversed. Both float32.

    Args:
        base_layer: The embedding (V, D); it stays as it is.
        rank: R.
        scaling: The factor of the branch, alpha / rank.
    """

    def __init__(self, base_layer: nn.Embedding, rank: int, scaling: float) -> None:
        super().__init__()
        self.base_layer: nn.Embedding = base_layer
        self.rank, self.scaling = rank, scaling
        vocabulary, width = base_layer.weight.shape
        device = base_layer.weight.device
        self.lora_A = nn.Parameter(torch.zeros(rank, vocabulary, dtype=torch.float32, device=device))
        self.lora_B = nn.Parameter(torch.randn(width, rank, dtype=torch.float32, device=device))

    def forward(self, input_ids: Tensor) -> Tensor:
        """Embed (...,) int64 to (..., D)."""
        base: Tensor = self.base_layer(input_ids)
        low = nn.functional.embedding(input_ids, self.lora_A.T)  # (..., R)
        return base + (self.scaling * low @ self.lora_B.T).to(base.dtype)

    def updates(self) -> dict[str, Update]:
        """``E + s (B A)^T``."""
        return {"weight": LowRank(self.lora_A.detach().T, self.lora_B.detach().T, self.scaling)}

    def extra_repr(self) -> str:
        """Rank and scaling."""
        return f"rank={self.rank}, scaling={self.scaling:g}"


class LoRAConfig(Method):
    """LoRA: a low-rank update beside frozen linear layers.

    A name is matched by its last parts (``q_proj``, ``mlp.up_proj``) or in full, with ``*`` for anything; a name that
    matches nothing is an error.
    """

    kind: ClassVar[Kind] = "low-rank"
    name: Literal["lora"] = Field("lora", description="The method.")
    rank: int = Field(8, ge=1, description="Rank of the update: more rank, more capacity and memory.")
    alpha: float | None = Field(None, gt=0, description="The update is scaled by alpha / rank; 2 x rank when omitted.")
    dropout: float = Field(
        0.0, ge=0, lt=1, description="Share of the branch's inputs zeroed in training; try 0.05 on little data."
    )
    target_modules: Literal["all-linear", "q,v"] | list[str] = Field(
        "all-linear",
        description="Modules to adapt: all-linear (every linear layer but the output head), q,v (the paper's choice), "
        "or a list of names such as q_proj, mlp.up_proj, model.layers.*.v_proj, embed_tokens or lm_head.",
    )
    exclude_modules: list[str] = Field([], description="Names taken out of the targets.")
    layers: list[int] | None = Field(None, description="Adapt these layers only, counted from 0; all when omitted.")
    rank_pattern: dict[str, int] = Field({}, description="Name: rank, where it differs; the first that matches holds.")
    alpha_pattern: dict[str, float] = Field({}, description="Name: alpha, where it differs; the first match holds.")
    bias: Literal["none", "all", "lora_only"] = Field(
        "none", description="Train no bias, every bias of the model, or those of the adapted modules."
    )
    use_rslora: bool = Field(False, description="Scale by alpha / sqrt(rank), which stays stable for large ranks.")
    loraplus_lr_ratio: float = Field(
        1.0, gt=0, description="LoRA+: B learns at this many times optimizer.lr; try 16, with half the lr."
    )
    freeze_A: bool = Field(False, description="LoRA-FA: A keeps its random start, only B trains: less memory.")
    init: Init = Field("kaiming", description="How A starts; B starts at zero.")
    modules_to_save: list[str] = Field([], description="Modules trained in full and saved with the adapter.")
    trainable_tokens: list[int] | list[str] = Field(
        [], description="Tokens whose embedding and head rows train, by id or by text; new ones are added."
    )

    @field_validator("target_modules", mode="before")
    @classmethod
    def _names(cls, value: Any) -> Any:
        """A text that is no preset is names with commas between."""
        if isinstance(value, str) and value not in ("all-linear", *_PRESETS):
            return [name.strip() for name in value.split(",")]
        if isinstance(value, str) or (isinstance(value, list) and all(isinstance(name, str) for name in value)):
            return value
        raise ValueError(f"expected all-linear, {', '.join(_PRESETS)} or a list of names, got {value!r}")

    @field_validator("trainable_tokens", mode="before")
    @classmethod
    def _ids_or_texts(cls, value: Any) -> Any:
        if isinstance(value, list) and ({type(token) for token in value} in (set(), {int}, {str})):
            return value
        raise ValueError(f"expected a list of token ids or a list of token texts, got {value!r}")

    def with_token_ids(self, add_tokens: Callable[[list[str]], list[int]]) -> LoRAConfig:
        """These settings with tokens named by text turned into ids, such as by ``Tokenizer.add_tokens``."""
        texts = [token for token in self.trainable_tokens if isinstance(token, str)]
        return self.model_copy(update={"trainable_tokens": add_tokens(texts)}) if texts else self

    @property
    def title(self) -> str:
        """The method's name as one writes it."""
        return "LoRA"

    @property
    def about(self) -> str:
        """Rank and alpha."""
        return f"LoRA, rank {self.rank}, alpha {self.base_alpha:g}"

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

    def ranks_and_alphas(self, targets: list[str]) -> dict[str, tuple[int, float]]:
        """Rank and alpha of each target.

        Raises:
            UsageError: A pattern matches none of them, or gives a value that is not positive.
        """
        ranks = _by_pattern(self.rank_pattern, targets, "peft.rank_pattern")
        alphas = _by_pattern(self.alpha_pattern, targets, "peft.alpha_pattern")
        return {name: (int(ranks.get(name, self.rank)), alphas.get(name, self.base_alpha)) for name in targets}

    def apply(self, model: nn.Module) -> None:
        """Wrap the targets in place; call ``freeze`` first.

        Raises:
            UsageError: A name matches no module, two settings want the same module, or there is an adapter already.
        """
        if own_modules(model):
            raise UsageError("peft: the model has an adapter already", hint="load the base model again")
        copies = _with_parameters(model, self.modules_to_save)
        targets = self._targets(model, copies)
        for name, (rank, alpha) in self.ranks_and_alphas(targets).items():
            scaling = self.scaling(rank, alpha)
            base = model.get_submodule(name)
            if isinstance(base, nn.Embedding):
                replace_module(model, name, LoRAEmbedding(base, rank, scaling))
            elif isinstance(base, nn.Linear):
                bias = self.bias != "none"
                _check_rank(name, rank, base)
                wrapped = LoRALinear(base, rank, scaling, self.dropout, self.init, train_bias=bias)
                wrapped.lora_A.requires_grad_(not self.freeze_A)
                replace_module(model, name, wrapped)
        for name in copies:
            replace_module(model, name, TrainedCopy(model.get_submodule(name)))
        if self.bias != "none":
            self._train_biases(model)
        self._train_tokens(model)

    def _targets(self, model: nn.Module, copies: list[str]) -> list[str]:
        known = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Embedding)}
        if isinstance(self.target_modules, list):
            targets = select(self.target_modules, known, key="peft.target_modules")
            both = [name for name in targets if name in copies]
            if both:
                raise UsageError(f"peft: {both[0]} is in target_modules and in modules_to_save, expected it in one")
        else:
            linears = [name for name, module in known.items() if isinstance(module, nn.Linear)]
            patterns = _PRESETS.get(self.target_modules)
            if patterns is None:
                targets = [name for name in linears if name.rpartition(".")[2] not in _HEADS]
            else:
                targets = select(patterns, linears, key="peft.target_modules")
            targets = [name for name in targets if name not in copies]
        excluded = select(self.exclude_modules, targets, key="peft.exclude_modules")
        targets = self._in_layers([name for name in targets if name not in excluded])
        if not targets:
            raise UsageError("peft.target_modules: no linear layer is left to adapt")
        return targets

    def _in_layers(self, targets: list[str]) -> list[str]:
        """The targets within the chosen layers, and those that are in no numbered layer."""
        if self.layers is None:
            return targets
        layer = {name: layer_number(name) for name in targets}
        there = sorted({number for number in layer.values() if number is not None})
        missing = [number for number in self.layers if number not in there]
        if missing:
            span = f"{there[0]} to {there[-1]}" if there else "no numbered layers"
            raise UsageError(f"peft.layers: there is no layer {missing[0]} with a target, the model has {span}")
        return [name for name in targets if layer[name] is None or layer[name] in self.layers]

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
        for name, module in own_modules(model).items():
            if name.rpartition(".")[2] in ("embed_tokens", "lm_head"):
                other = "modules_to_save" if isinstance(module, TrainedCopy) else "target_modules"
                raise UsageError(f"peft: {name} is in {other} and has trainable_tokens, expected one of the two")
        train_tokens(model, ids)


def _with_parameters(model: nn.Module, patterns: list[str]) -> list[str]:
    """Names of the modules with parameters of their own that are, or lie in, a module that a pattern names.

    Raises:
        UsageError: One of them is quantised, or a pattern matches nothing.
    """
    known = dict(model.named_modules())
    roots = select(patterns, [name for name in known if name], key="peft.modules_to_save")
    inside = tuple(f"{root}." for root in roots)
    for name, module in known.items():
        if f"{name}.".startswith(inside) and isinstance(module, QuantizedLinear):
            raise UsageError(
                f"peft.modules_to_save: {name} is quantised ({module.quantized.config}), its codes cannot train; "
                "expected modules in full precision, such as lm_head or a norm"
            )
    return [
        name
        for name, module in known.items()
        if f"{name}.".startswith(inside) and any(True for _ in module.parameters(recurse=False))
    ]


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


def _check_rank(name: str, rank: int, base: nn.Linear) -> None:
    """An update of a matrix has at most the rank of the matrix.

    Raises:
        UsageError: ``rank`` is larger.
    """
    most = min(base.out_features, base.in_features)
    if rank > most:
        shape = f"{base.out_features}×{base.in_features}"
        raise UsageError(f"peft.rank: {rank} is too large for {name} ({shape}), expected at most {most}")


def layer_number(name: str) -> int | None:
    """The layer that a module lies in: the first number in its dotted name."""
    match = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
    return int(match[1]) if match else None
