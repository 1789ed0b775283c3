"""LoRA adapters in PEFT's format, by whatever method or program they were trained.

PEFT's names (``r``, ``lora_alpha``) appear only here and in the methods' ``peft_config``. What a file asks for and this
package does not do is refused by name, never ignored.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Literal, NamedTuple

from pydantic import Field
from torch import Tensor, nn

from lit_lora.config import validate
from lit_lora.errors import InputError, UsageError
from lit_lora.peft.core.adapter_method import CONFIG, WEIGHTS
from lit_lora.peft.core.matching import listed
from lit_lora.peft.core.modules import own_modules, replace_module
from lit_lora.peft.core.modules_to_save import TrainedCopy, find_embedding, find_head, train_rows
from lit_lora.peft.core.targeted import TargetedMethod
from lit_lora.peft.lora.config import LoRAConfig
from lit_lora.peft.lora.dora import DoRALinear
from lit_lora.peft.lora.linear import LoRALinear

__all__ = ["LoRAFile"]

# Inits that leave the base as it is; PiSSA and its like store an adapter that needs a changed base.
_PLAIN_INITS = {None, True, False, "gaussian", "eva", "orthogonal"}
_TOKEN_ROWS = ".token_adapter.trainable_tokens_delta"


class LoRAFile(LoRAConfig):
    """LoRA or DoRA as a file has it: each module by its full name, with what the file holds for it.

    Unlike settings to train by, it takes any rank: that of factors laid side by side may be larger than the matrix's.
    """

    as_written: ClassVar[bool] = False
    name: Literal["lora", "dora"] = Field("lora", description="The method.")  # type: ignore[assignment]
    trained_biases: list[str] = Field([], description="Modules whose bias is in the file.")
    token_ids: dict[str, list[int]] = Field({}, description="Embedding or head: tokens whose rows are in the file.")
    saved_rows: dict[str, int] = Field({}, description="Module saved in full: rows in the file.")

    @property
    def title(self) -> str:
        """The method's name as one writes it."""
        return "DoRA" if self.name == "dora" else "LoRA"

    def apply(self, model: nn.Module) -> None:
        """Put in the modules that the file's tensors are for, in place.

        Raises:
            UsageError: The model has no such modules, or has an adapter already.
        """
        self._require_modules(model)
        embedding, head = find_embedding(model), find_head(model)
        tied = embedding is not None and head is not None and _share_weight(model, embedding, head)
        TargetedMethod.apply(self, model)
        own = own_modules(model)
        for name in self.trained_biases:
            if name not in own:
                replace_module(model, name, TrainedCopy(model.get_submodule(name), ["bias"]))
        rows = {name: train_rows(model, name, ids) for name, ids in self.token_ids.items()}
        if tied and embedding in rows and head is not None and head not in rows:  # a tied head is not in the file
            train_rows(model, head, self.token_ids[embedding], rows[embedding])
        for name, count in self.saved_rows.items():
            copy = own.get(name)
            if name in (embedding, head) and isinstance(copy, TrainedCopy):  # it may have tokens that the base has not
                copy.grow(count)

    def _require_modules(self, model: nn.Module) -> None:
        """Look whether the model has all modules that the file has tensors for.

        Raises:
            UsageError: With the names of those that it has not.
        """
        modules = dict(model.named_modules())
        named = dict.fromkeys([*self.target_modules, *self.modules_to_save, *self.trained_biases, *self.token_ids])
        missing = [name for name in named if name not in modules]
        if missing:
            raise UsageError(f"{listed(missing, 'module')} of {len(named)} have no place in this model")
        bare = [name for name in self.trained_biases if getattr(modules[name], "bias", None) is None]
        if bare:
            raise UsageError(f"{listed(bare, 'module')} without a bias in this model, the file has one")

    def targets(self, model: nn.Module, copies: list[str] | None = None) -> list[str]:
        """The modules that the file has factors for.

        Raises:
            UsageError: One is of a kind that LoRA does not adapt.
        """
        for name in self.target_modules:
            if not self.adaptable(module := model.get_submodule(name)):
                kinds = ", ".join(kind.__name__ for kind in self.adapts)
                raise UsageError(f"{name} is {type(module).__name__}, {self.title} adapts {kinds}")
        return list(self.target_modules)

    def misfits(self, targets: Mapping[str, Any]) -> list[str]:
        """Nothing: a rank that is too large to train by does no harm once it is trained."""
        return []

    def ranks_and_alphas(self, targets: list[str]) -> dict[str, tuple[int, float]]:
        """Rank and alpha of each target, by its full name."""
        patterns = self.rank_pattern, self.alpha_pattern
        return {name: (patterns[0].get(name, self.rank), patterns[1].get(name, self.base_alpha)) for name in targets}

    def trains_bias(self, name: str) -> bool:
        """Whether the file has the bias of the module."""
        return name in self.trained_biases

    def linear(self, base: nn.Linear, rank: int, scaling: float, **settings: Any) -> LoRALinear:
        """What takes the place of a linear layer."""
        return (DoRALinear if self.name == "dora" else LoRALinear)(base, rank, scaling, **settings)

    def peft_config(self, model: nn.Module) -> dict[str, Any]:
        """``adapter_config.json``, but for the base model's name."""
        return {**super().peft_config(model), "use_dora": self.name == "dora"}

    @classmethod
    def normalized(cls, raw: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors as PEFT names them now, and the rows of tokens in the order of their ids.

        Earlier versions of PEFT left ``base_layer`` out of the names of the biases of adapted modules.
        """
        adapted = {name.rpartition(".lora_")[0] for name in tensors if ".lora_" in name}
        result: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            module, _, last = name.rpartition(".")
            if last == "bias" and module in adapted:
                name = f"{module}.base_layer.bias"
            elif name.endswith(_TOKEN_ROWS):
                ids = _ids(raw, name.removesuffix(_TOKEN_ROWS), _rows(tensor))
                tensor = tensor[sorted(range(len(ids)), key=ids.__getitem__)]
            result[name] = tensor
        return result

    @classmethod
    def from_peft(cls, raw: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> LoRAFile:
        """Settings with full module names, by what the tensors show; ranks are checked against the tensors."""
        init = raw.get("init_lora_weights")
        if init not in _PLAIN_INITS:
            raise InputError(
                f"{CONFIG}: init_lora_weights {init!r} is not supported: such an adapter needs a changed base model",
                hint="save it in PEFT with path_initial_model_for_weight_conversion, which makes it a plain one",
            )
        found = _sorted(tensors)
        if bool(raw.get("use_dora")) != bool(found.lengths) or (found.lengths and found.lengths != found.ranks.keys()):
            raise InputError(
                f"{WEIGHTS}: {len(found.lengths)} magnitude vectors for {len(found.ranks)} modules, while use_dora is "
                f"{json.dumps(raw.get('use_dora', False))}"
            )
        rank, ranks = raw.get("r", 8), _by_regex(raw.get("rank_pattern") or {}, found.ranks)
        for name, has in found.ranks.items():
            if has != ranks.get(name, rank):
                raise InputError(f"{CONFIG}: rank {ranks.get(name, rank)} for {name}, the tensors have {has}")
        settings = {
            "name": "dora" if raw.get("use_dora") else "lora",
            "rank": rank,
            "alpha": raw.get("lora_alpha", 8),
            "dropout": raw.get("lora_dropout", 0.0),
            "target_modules": list(found.ranks),
            "rank_pattern": ranks,
            "alpha_pattern": _by_regex(raw.get("alpha_pattern") or {}, found.ranks),
            "bias": raw.get("bias", "none"),
            "use_rslora": raw.get("use_rslora", False),
            "modules_to_save": list(found.rows),
            "trained_biases": found.biases,
            "token_ids": {name: sorted(_ids(raw, name, count)) for name, count in found.tokens.items()},
            "saved_rows": found.rows,
        }
        return validate(settings, cls, name=CONFIG)


class _Tensors(NamedTuple):
    """What the tensors of a file are for."""

    ranks: dict[str, int]
    """By module with two factors."""
    lengths: set[str]
    """Modules with a magnitude vector."""
    tokens: dict[str, int]
    """Rows of trained tokens, by module."""
    biases: list[str]
    """Modules of which the file has nothing but the bias, or the bias beside the factors."""
    rows: dict[str, int]
    """Rows of the first tensor of every other module."""


def _sorted(tensors: Mapping[str, Tensor]) -> _Tensors:
    """Sort a file's tensors by their names, and check that factors come in pairs that fit.

    Raises:
        InputError: A name is not known, a factor is missing, or nothing is in the file.
    """
    factors: dict[str, dict[str, Tensor]] = {}
    lengths: set[str] = set()
    tokens: dict[str, int] = {}
    rest: dict[str, dict[str, int]] = {}
    for key, tensor in tensors.items():
        if match := re.fullmatch(r"(.+)\.lora_(embedding_)?([AB])(\.weight)?", key):
            factors.setdefault(match[1], {})[match[3]] = tensor
        elif key.endswith(_TOKEN_ROWS):
            tokens[key.removesuffix(_TOKEN_ROWS)] = _rows(tensor)
        elif match := re.fullmatch(r"(.+)\.lora_magnitude_vector", key):
            lengths.add(match[1])
        elif ".lora_" in key:
            raise InputError(f"{WEIGHTS}: tensor {key} is not known here")
        else:
            module, _, last = key.replace(".base_layer.", ".").rpartition(".")
            rest.setdefault(module, {})[last] = _rows(tensor)
    odd = [f"{name}.lora_{side}" for name, pair in factors.items() for side in "AB" if side not in pair]
    if odd:
        raise InputError(f"{WEIGHTS}: {listed(odd)} missing, the other factor is in the file")
    if not factors and not tokens and not rest:
        raise InputError(f"{WEIGHTS}: holds no adapter tensors")
    for name, pair in factors.items():
        A, B = pair["A"], pair["B"]
        if A.ndim < 2 or B.ndim < 2 or A.shape[0] != B.shape[1]:
            raise InputError(f"{WEIGHTS}: the factors of {name} do not fit: {[*B.shape]}, {[*A.shape]}")
    ranks = {name: len(pair["A"]) for name, pair in factors.items()}
    biases = [name for name, parts in rest.items() if parts.keys() == {"bias"}]
    rows = {name: next(iter(parts.values())) for name, parts in rest.items() if name not in [*ranks, *biases]}
    return _Tensors(ranks, lengths, tokens, biases, rows)


def _rows(tensor: Tensor) -> int:
    return tensor.shape[0] if tensor.ndim else 0


def _ids(raw: Mapping[str, Any], module: str, rows: int) -> list[int]:
    """The tokens whose rows a module has, in the order of the rows in PEFT's file.

    Raises:
        InputError: They are not as many as the rows.
    """
    indices = raw.get("trainable_token_indices") or {}
    if isinstance(indices, list):  # of the embedding, whose rows are then the only ones in the file
        indices = {module: indices}
    ids = next((ids for name, ids in indices.items() if f".{module}".endswith(f".{name}")), None)
    if not ids or len(ids) != rows or len(set(ids)) != len(ids) or min(ids) < 0:
        raise InputError(f"{CONFIG}: trainable_token_indices do not fit the {rows} rows of {module}")
    return list(ids)


def _by_regex(patterns: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """PEFT's rule: the first pattern that matches the end of a module's name holds."""
    try:
        compiled = {re.compile(rf"(.*\.)?({pattern})$"): value for pattern, value in patterns.items()}
    except re.error as error:
        raise InputError(f"{CONFIG}: a rank or alpha pattern is not a regular expression: {error}") from error
    first = {name: next((value for rule, value in compiled.items() if rule.match(name)), None) for name in names}
    return {name: value for name, value in first.items() if value is not None}


def _share_weight(model: nn.Module, one: str, other: str) -> bool:
    """Whether two modules have one parameter as their weight; looked up and not asked for, which may read it."""
    first, second = (dict(model.get_submodule(name).named_parameters(recurse=False)) for name in (one, other))
    return "weight" in first and first["weight"] is second.get("weight")
