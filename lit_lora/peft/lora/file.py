"""LoRA adapters in PEFT's format, trained with any method or program.

PEFT's keys (``r``, ``lora_alpha``) appear only in this file and in the methods' ``peft_config``. Features that are not
supported are refused by name, never ignored.
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
from lit_lora.peft.core.matching import listed, matches
from lit_lora.peft.core.modules import own_modules, replace_module
from lit_lora.peft.core.modules_to_save import TrainedCopy, find_embedding, find_head, train_rows
from lit_lora.peft.core.targeted import TargetedMethod
from lit_lora.peft.lora.config import LoRAConfig
from lit_lora.peft.lora.dora import DoRALinear
from lit_lora.peft.lora.linear import LoRALinear
from lit_lora.peft.lora.parameters import adaptable_parameters

__all__ = ["LoRAFile"]

# Values of init_lora_weights that leave the base unchanged; PiSSA and the like need a changed base.
_PLAIN_INITS = {None, True, False, "gaussian", "eva", "orthogonal"}
_TOKEN_ROWS = ".token_adapter.trainable_tokens_delta"
_INNER = ".base_layer"
"""PEFT wraps a module again for each of its parameters; this is the end of the name of all wrappers but the last."""


class LoRAFile(LoRAConfig):
    """LoRA or DoRA as described by a file: each module by its full name, with the tensors that the file has for it.

    Unlike settings for training, it accepts any rank: that of concatenated factors may exceed the matrix's.
    """

    as_written: ClassVar[bool] = False
    name: Literal["lora", "dora"] = Field("lora", description="The method.")  # type: ignore[assignment]
    trained_biases: list[str] = Field([], description="Modules whose bias is in the file.")
    token_ids: dict[str, list[int]] = Field({}, description="Tokens whose rows are in the file, by embedding or head.")
    saved_rows: dict[str, int] = Field({}, description="Number of rows in the file, by module saved in full.")

    @property
    def title(self) -> str:
        """The method's name as written in text."""
        return "DoRA" if self.name == "dora" else "LoRA"

    def apply(self, model: nn.Module) -> None:
        """Put in the modules that the file has tensors for, in place.

        Raises:
            UsageError: The model lacks such a module, or already has an adapter.
        """
        self._require_modules(model)
        # Before wrapping: both must be plain modules to be found, and to be seen to share a weight.
        embedding = find_embedding(model)
        head = find_head(model)
        tied = embedding is not None and head is not None and _share_weight(model, embedding, head)

        TargetedMethod.apply(self, model)
        self._adapt_parameters(model)
        own = own_modules(model)
        for name in self.trained_biases:
            if name not in own:
                replace_module(model, name, TrainedCopy(model.get_submodule(name), ["bias"]))
        rows = {name: train_rows(model, name, ids) for name, ids in self.token_ids.items()}
        if tied and embedding in rows and head is not None and head not in rows:  # a tied head is not in the file
            train_rows(model, head, self.token_ids[embedding], rows[embedding])

        for name, count in self.saved_rows.items():
            copy = own.get(name)
            if name in (embedding, head) and isinstance(copy, TrainedCopy):  # may have tokens that the base lacks
                copy.grow(count)

    def _require_modules(self, model: nn.Module) -> None:
        """Check that the model has all modules that the file has tensors for.

        Raises:
            UsageError: With the names of the missing ones.
        """
        modules = dict(model.named_modules())
        named = dict.fromkeys([*self.target_modules, *self.modules_to_save, *self.trained_biases, *self.token_ids])
        missing = [name for name in named if name not in modules]
        if missing:
            raise UsageError(f"{listed(missing, 'module')} of {len(named)} not found in this model")
        without_bias = [name for name in self.trained_biases if getattr(modules[name], "bias", None) is None]
        if without_bias:
            raise UsageError(f"{listed(without_bias, 'module')} without a bias in this model, but with one in the file")

    def targets(self, model: nn.Module, copies: list[str] | None = None) -> list[str]:
        """The modules that the file has factors for.

        Raises:
            UsageError: One is of a kind that LoRA does not adapt.
        """
        with_parameters = {name.rpartition(".")[0] for name in self.parameters(model)}
        targets = [name for name in self.target_modules if name not in with_parameters]
        for name in targets:
            module = model.get_submodule(name)
            if not self.adaptable(module):
                kinds = ", ".join(kind.__name__ for kind in self.adapts)
                raise UsageError(f"{name} is {type(module).__name__}, {self.title} adapts {kinds}")
        return targets

    def parameters(self, model: nn.Module) -> list[str]:
        """The parameters outside linear layers that the file has factors for: PEFT allows names that match nothing."""
        available = adaptable_parameters(model)
        return [name for name in available if any(matches(target, name) for target in self.target_parameters)]

    def _check_parameter_rank(self, model: nn.Module, name: str, rank: int) -> None:
        """None, as for modules."""

    def misfits(self, targets: Mapping[str, Any]) -> list[str]:
        """None: a rank higher than the matrix's makes no sense in training, but computes the right product."""
        return []

    def ranks_and_alphas(self, targets: list[str]) -> dict[str, tuple[int, float]]:
        """Rank and alpha of each target; the patterns are full names."""
        return {
            name: (self.rank_pattern.get(name, self.rank), self.alpha_pattern.get(name, self.base_alpha))
            for name in targets
        }

    def trains_bias(self, name: str) -> bool:
        """Whether the file has the module's bias."""
        return name in self.trained_biases

    def linear(self, base: nn.Linear, rank: int, scaling: float, **settings: Any) -> LoRALinear:
        """The wrapper of a linear layer."""
        wrapper = DoRALinear if self.name == "dora" else LoRALinear
        return wrapper(base, rank, scaling, **settings)

    def peft_config(self, model: nn.Module) -> dict[str, Any]:
        """``adapter_config.json`` without the base model's name."""
        return {**super().peft_config(model), "use_dora": self.name == "dora"}

    @classmethod
    def normalized(cls, raw: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors under PEFT's current names, with the rows of tokens in ascending order of their ids.

        Earlier versions of PEFT named the bias of an adapted module without ``base_layer``.
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
        """Settings with full module names, derived from the tensors and checked against ``raw``."""
        init = raw.get("init_lora_weights")
        if init not in _PLAIN_INITS:
            raise InputError(
                f"{CONFIG}: init_lora_weights {init!r} is not supported: such an adapter needs a changed base model",
                hint="save it in PEFT with path_initial_model_for_weight_conversion, which makes it a plain one",
            )
        contents = _contents(tensors)
        is_dora = bool(raw.get("use_dora"))
        expected_magnitudes = set(contents.ranks) if is_dora else set()
        if contents.magnitudes != expected_magnitudes or (is_dora and not contents.magnitudes):
            raise InputError(
                f"{WEIGHTS}: {len(contents.magnitudes)} magnitude vectors for {len(contents.ranks)} modules, but "
                f"use_dora is {json.dumps(raw.get('use_dora', False))}"
            )
        parameters = raw.get("target_parameters") or []
        modules = [name for name in contents.ranks if not name.endswith(_INNER)]
        names = [*modules, *(f"{name}.{target.rpartition('.')[2]}" for name in modules for target in parameters)]
        rank = raw.get("r", 8)
        ranks = _by_regex(raw.get("rank_pattern") or {}, names)
        for name, actual in contents.ranks.items():
            expected = ranks.get(name, rank)
            # Only the model tells how many matrices a parameter has, which share the rank of the file's tensors.
            if actual != expected and not parameters:
                raise InputError(f"{CONFIG}: rank {expected} for {name}, but its tensors have rank {actual}")
        settings = {
            "name": "dora" if is_dora else "lora",
            "rank": rank,
            "alpha": raw.get("lora_alpha", 8),
            "dropout": raw.get("lora_dropout", 0.0),
            "target_modules": modules,
            "target_parameters": parameters,
            "rank_pattern": ranks,
            "alpha_pattern": _by_regex(raw.get("alpha_pattern") or {}, names),
            "bias": raw.get("bias", "none"),
            "use_rslora": raw.get("use_rslora", False),
            "modules_to_save": list(contents.rows),
            "trained_biases": contents.biases,
            "token_ids": {name: sorted(_ids(raw, name, count)) for name, count in contents.tokens.items()},
            "saved_rows": contents.rows,
        }
        return validate(settings, cls, name=CONFIG)


class _Contents(NamedTuple):
    """The contents of a file, by module."""

    ranks: dict[str, int]
    """Ranks of the modules with two factors."""
    magnitudes: set[str]
    """Modules with a magnitude vector."""
    tokens: dict[str, int]
    """Number of trained token rows, by embedding or head."""
    biases: list[str]
    """Modules with a bias and no other full tensor; they may have factors too."""
    rows: dict[str, int]
    """Rows of the first tensor of every other module, which is saved in full."""


def _contents(tensors: Mapping[str, Tensor]) -> _Contents:
    """Sort a file's tensors by their names, and check that factors come in matching pairs.

    Raises:
        InputError: A name is unknown, a factor is missing or does not match the other, or the file has no tensors.
    """
    factors: dict[str, dict[str, Tensor]] = {}
    magnitudes: set[str] = set()
    tokens: dict[str, int] = {}
    full: dict[str, dict[str, int]] = {}  # module -> parameter -> rows
    for key, tensor in tensors.items():
        if match := re.fullmatch(r"(.+)\.lora_(embedding_)?([AB])(\.weight)?", key):
            factors.setdefault(match[1], {})[match[3]] = tensor
        elif key.endswith(_TOKEN_ROWS):
            tokens[key.removesuffix(_TOKEN_ROWS)] = _rows(tensor)
        elif match := re.fullmatch(r"(.+)\.lora_magnitude_vector", key):
            magnitudes.add(match[1])
        elif ".lora_" in key:
            raise InputError(f"{WEIGHTS}: unknown tensor {key}")
        else:
            module, _, parameter = key.replace(".base_layer.", ".").rpartition(".")
            full.setdefault(module, {})[parameter] = _rows(tensor)
    if not factors and not tokens and not full:
        raise InputError(f"{WEIGHTS}: contains no adapter tensors")
    _check_pairs(factors)

    ranks = {name: len(pair["A"]) for name, pair in factors.items()}
    biases = [name for name, parameters in full.items() if parameters.keys() == {"bias"}]
    rows = {
        name: next(iter(parameters.values()))
        for name, parameters in full.items()
        if name not in ranks and name not in biases
    }
    return _Contents(ranks, magnitudes, tokens, biases, rows)


def _check_pairs(factors: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Check that every module has both factors, and that their ranks are the same.

    Raises:
        InputError: With the names of those without.
    """
    missing = [f"{name}.lora_{side}" for name, pair in factors.items() for side in "AB" if side not in pair]
    if missing:
        raise InputError(f"{WEIGHTS}: {listed(missing)} missing, but the other factor is in the file")
    for name, pair in factors.items():
        A, B = pair["A"], pair["B"]
        if A.ndim < 2 or B.ndim < 2 or A.shape[0] != B.shape[1]:
            raise InputError(f"{WEIGHTS}: the shapes of the factors of {name} do not match: {[*B.shape]}, {[*A.shape]}")


def _rows(tensor: Tensor) -> int:
    return tensor.shape[0] if tensor.ndim else 0


def _ids(raw: Mapping[str, Any], module: str, rows: int) -> list[int]:
    """The ids of a module's trained tokens, in the order of the rows in PEFT's file.

    Raises:
        InputError: Their number is not ``rows``, or they are not distinct ids.
    """
    indices = raw.get("trainable_token_indices") or {}
    if isinstance(indices, list):  # without a name they are the embedding's, whose rows are the only ones in the file
        indices = {module: indices}
    ids: list[int] = []
    for name, its_ids in indices.items():
        if f".{module}".endswith(f".{name}"):
            ids = list(its_ids)
            break
    if not ids or len(ids) != rows or len(set(ids)) != len(ids) or min(ids) < 0:
        raise InputError(f"{CONFIG}: trainable_token_indices do not match the {rows} rows of {module}")
    return ids


def _by_regex(patterns: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """The value for each name that a pattern matches; PEFT's rule: the first that matches the name's end applies.

    Raises:
        InputError: A pattern is not a regular expression.
    """
    try:
        rules = [(re.compile(rf"(.*\.)?({pattern})$"), value) for pattern, value in patterns.items()]
    except re.error as error:
        raise InputError(f"{CONFIG}: a rank or alpha pattern is not a regular expression: {error}") from error
    values: dict[str, Any] = {}
    for name in names:
        for rule, value in rules:
            if rule.match(name):
                values[name] = value
                break
    return values


def _share_weight(model: nn.Module, one: str, other: str) -> bool:
    """Whether two modules have the same parameter as their weight.

    Looked up among the parameters, because ``module.weight`` of a base that stays on disk reads the tensor.
    """
    parameters = dict(model.get_submodule(one).named_parameters(recurse=False))
    other_parameters = dict(model.get_submodule(other).named_parameters(recurse=False))
    return "weight" in parameters and parameters["weight"] is other_parameters.get("weight")
