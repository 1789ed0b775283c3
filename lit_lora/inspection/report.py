"""What an inspection finds, as plain data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from lit_lora.errors import InputError, LitLoraError

__all__ = ["AdapterFacts", "Inspection", "ModelFacts", "Part", "Problem", "Target", "TokenizerFacts"]


@dataclass(frozen=True)
class Problem:
    """Something wrong, or worth knowing before use."""

    text: str
    hint: str | None
    """How to fix it."""
    fatal: bool
    """Whether nothing can be done with the model until it is fixed."""


@dataclass(frozen=True)
class ModelFacts:
    """The model that ``config.json`` describes."""

    model_type: str
    architecture: str | None
    """Its class in transformers."""
    runs_by: str
    """The code that will run it."""
    layers: int
    width: int
    rows: int
    """Rows of the embedding."""
    context: int | None
    """Maximum length of a document, in tokens."""
    window: int | None
    """Tokens that a token attends to in layers with a sliding window."""
    layer_types: dict[str, int]
    """Number of layers of each type, where they differ."""
    rope: dict[str, Any]
    """Type, base and scaling of the rotary position embedding."""
    experts: int | None
    """Experts per layer of a mixture of experts."""
    tied: bool
    """Whether the head shares the embedding's weight."""
    quantization: str | None
    """How the weights are quantized."""


@dataclass(frozen=True)
class TokenizerFacts:
    """The tokenizer and its chat template."""

    vocabulary: int
    """The largest id plus one."""
    special_tokens: dict[str, tuple[str, int]]
    """Purpose -> token and id: ``bos``, ``eos``, ``pad`` and ``end of turn``."""
    starts_with_bos: bool
    """Whether plain text begins with BOS."""
    template: str | None
    """Where the chat template comes from."""


@dataclass
class Part:
    """A part of the model: all its attention layers, say."""

    name: str
    parameters: int = 0
    bytes: int = 0
    """Stored size."""
    dtypes: dict[str, int] = field(default_factory=dict)
    """Stored bytes by dtype."""

    def add(self, dtype: str, size: int) -> None:
        """Count a stored tensor."""
        self.bytes += size
        self.dtypes[dtype] = self.dtypes.get(dtype, 0) + size


@dataclass(frozen=True)
class Target:
    """Modules or parameters of one kind, mostly one per layer, that a finetuning method can name."""

    name: str
    """Their name within a layer, or in full."""
    shape: tuple[int, ...]
    """Shape of the weight."""
    count: int
    all_linear: bool | None
    """Whether ``all-linear`` takes them; ``None`` where the model is not known."""
    setting: Literal["target_modules", "target_parameters"] | None
    """The setting that names them."""


@dataclass(frozen=True)
class AdapterFacts:
    """An adapter."""

    method: str
    peft_type: str
    rank: int | None
    alpha: float | None
    targets: list[str]
    modules_to_save: list[str]
    base: str | None
    """The base that it names."""
    base_folder: str | None
    """Where that base is on this machine."""
    data: str | None
    """What it was trained on."""
    parameters: int
    bytes: int
    dtypes: dict[str, int]
    """Bytes by dtype."""


@dataclass
class Inspection:
    """All that was found at a path."""

    path: str
    kind: Literal["checkpoint", "adapter", "run", "file"] = "checkpoint"
    format: str | None = None
    """Format of the weights."""
    run: dict[str, Any] = field(default_factory=dict)
    """Of a run: recipe, data, whether it is complete, and its metrics."""
    model: ModelFacts | None = None
    tokenizer: TokenizerFacts | None = None
    adapter: AdapterFacts | None = None
    parts: list[Part] = field(default_factory=list)
    targets: list[Target] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    @property
    def usable(self) -> bool:
        """Whether nothing is in the way of using it."""
        return not any(problem.fatal for problem in self.problems)

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        return sum(part.parameters for part in self.parts)

    @property
    def precision(self) -> str:
        """How most of the weights are stored: quantization or dtype, as safetensors names it."""
        if self.model is not None and self.model.quantization is not None:
            return self.model.quantization
        sizes: Counter[str] = Counter()
        for part in self.parts:
            sizes.update(part.dtypes)
        return max(sizes, key=sizes.__getitem__, default="an unknown dtype")

    def require_usable(self) -> None:
        """Raise what stands in the way of using it.

        Raises:
            InputError: One line per problem, and the first remedy.
        """
        fatal = [problem for problem in self.problems if problem.fatal]
        if fatal:
            hint = next((problem.hint for problem in fatal if problem.hint), None)
            raise InputError("\n".join(problem.text for problem in fatal), hint=hint)

    def warn(self, text: str, hint: str | None = None) -> None:
        """Note something that does not stand in the way of use."""
        self.problems.append(Problem(text, hint, fatal=False))

    @contextmanager
    def noting_errors(self) -> Iterator[None]:
        """Turn an error within the block into a problem, and go on after the block."""
        try:
            yield
        except LitLoraError as error:
            self.problems += [Problem(line, error.hint, fatal=True) for line in str(error).splitlines()]

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON values."""
        return {**asdict(self), "usable": self.usable}
