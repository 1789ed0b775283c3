"""Capabilities of some methods beyond being applied: one small base class each, which a method with it inherits.

A caller asks by ``isinstance``, once. Where several callers have the same question, the function below the class asks
it and answers for all other methods. So a new capability changes neither :class:`Method` nor the methods without it.
Who asks, and when::

    TakesTokens, TakesText     recipes: once there is a tokenizer
    NeedsQuantizedBase         recipe/quantized_base: whether the base is one for the method
    WeighsErrors               recipe/quantized_base, estimate: before the base is loaded
    ChoosesCodes               recipe/quantized_base: while the base is loaded, and whether the run keeps it
    ChoosesTypes               estimate: for the size of the base
    GroupsTokens               recipe/data: what a micro-batch can compute once
    TrainsModulesInFull        classify: for a new head
    InitializesFromData        recipe/method: before training
    ScalesLearningRate         recipes: for the optimizer
    FinalizesAfterTraining     recipe/method: after training
    KeepsCodes, ChangesConfig  merge: how the merged model is stored, and its config
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol, TypeVar

from torch import Tensor, nn

from lit_lora.errors import UsageError
from lit_lora.peft.core.method import Method
from lit_lora.peft.core.passes import Pass
from lit_lora.peft.core.svd import Weights
from lit_lora.quantize import QuantizeConfig, Quantized, Quantizer

__all__ = [
    "AnyConfig",
    "ChangesConfig",
    "ChoosesCodes",
    "ChoosesTypes",
    "Decomposer",
    "FinalizesAfterTraining",
    "GroupsTokens",
    "InitializesFromData",
    "KeepsCodes",
    "NeedsQuantizedBase",
    "ScalesLearningRate",
    "TakesText",
    "TakesTokens",
    "TrainsModulesInFull",
    "WeighsErrors",
    "calibration_rows",
    "lr_factors",
    "rows_for_init",
    "with_modules_to_save",
    "with_text",
    "with_token_ids",
]

AnyConfig = TypeVar("AnyConfig")


class InitializesFromData(ABC):
    """A method that can initialize itself from the model's activations or gradients on rows of the data."""

    @property
    @abstractmethod
    def rows_for_init(self) -> int:
        """Number of rows of the data that these settings need for it; 0 for none."""

    @abstractmethod
    def init_from_data(self, model: nn.Module, passes: Iterable[Pass]) -> Method:
        """Apply the method, initialized from the rows; only for settings whose ``rows_for_init`` is not 0.

        Args:
            model: Frozen, without an adapter; changed in place.
            passes: At least ``rows_for_init`` rows, or all of the data if it has fewer.

        Returns:
            Settings with which ``apply`` creates modules of the same shapes.

        Raises:
            UsageError: The settings do not fit this model or the rows.
        """


def rows_for_init(method: Method) -> int:
    """Number of rows of the data that a method needs for its initialization."""
    return method.rows_for_init if isinstance(method, InitializesFromData) else 0


class FinalizesAfterTraining(ABC):
    """A method that can train several alternatives at once and then chooses one by the loss on validation rows."""

    @property
    @abstractmethod
    def finalizes(self) -> bool:
        """Whether these settings leave a choice to be made after training."""

    @abstractmethod
    def finalize(self, model: nn.Module, score: Callable[[], float]) -> Method:
        """Choose one of the trained alternatives, in place.

        Args:
            model: Trained.
            score: Returns the validation loss of the model in its current state.

        Returns:
            Settings with which ``apply`` creates modules of the same shapes.
        """


class NeedsQuantizedBase(ABC):
    """A method that works on some quantized bases only, or takes settings from the base's quantization."""

    @abstractmethod
    def for_quantized_base(self, quantize: QuantizeConfig) -> Method:
        """These settings for a base with this quantization.

        Raises:
            UsageError: The method does not work on such a base.
        """


class WeighsErrors(ABC):
    """A method that can weigh the quantization errors of the base by gradients on rows of the data."""

    @property
    @abstractmethod
    def calibration_rows(self) -> int:
        """Number of rows whose gradients weigh the errors; 0 to weigh all errors equally."""


def calibration_rows(method: Method) -> int:
    """Number of rows whose gradients weigh the base's quantization errors; needs the model in full precision once."""
    return method.calibration_rows if isinstance(method, WeighsErrors) else 0


class Decomposer(Protocol):
    """Quantizes layer by layer and keeps the initial values of the adapter."""

    def __call__(self, name: str, weight: Tensor) -> Quantized:
        """Quantize the weight (out, in) of the layer ``name``."""

    def fill(self, model: nn.Module) -> None:
        """Give the adapter in ``model`` its initial values, in place."""


class ChoosesCodes(ABC):
    """A method that quantizes the base itself and initializes the adapter from the quantization error.

    Its codes differ from those of the original weights quantized, so the run saves its base: the original checkpoint
    cannot replace it.
    """

    @abstractmethod
    def decomposer(
        self,
        model: nn.Module,
        quantize: QuantizeConfig,
        read: Callable[[str], Tensor],
        weights: Mapping[str, Weights] | None = None,
    ) -> Decomposer:
        """The function that quantizes the base.

        Args:
            model: Without an adapter; no values are read, so it may be on the meta device. May be changed in place.
            quantize: How the base is quantized.
            read: Returns the weight (out, in) of a linear layer by its name.
            weights: Weights of the errors, by layer, for a method that :class:`WeighsErrors`.

        Raises:
            UsageError: The settings do not fit this model.
        """


class ChoosesTypes(ABC):
    """A method that chooses a quantization type for each layer of the base."""

    @abstractmethod
    def planned(self, model: nn.Module) -> Quantizer:
        """A quantizer that gives every layer the size it will have, to estimate the base's.

        Args:
            model: Without an adapter; no values are read.

        Raises:
            UsageError: The settings do not fit this model.
        """


class KeepsCodes(ABC):
    """A method whose update can be merged into a quantized base without changing its codes, so without loss."""

    @abstractmethod
    def keeps_codes(self, quantize: QuantizeConfig) -> bool:
        """Whether the merged model has the codes of its base, given how the base was quantized."""


class TakesTokens(ABC):
    """A method whose settings can name tokens by their text."""

    @abstractmethod
    def with_token_ids(self, add_tokens: Callable[[list[str]], list[int]]) -> Method:
        """These settings with token texts turned into ids; returned unchanged if they contain no texts."""


def with_token_ids(method: Method, add_tokens: Callable[[list[str]], list[int]]) -> Method:
    """The settings with token texts turned into ids, such as by ``Tokenizer.add_tokens``."""
    return method.with_token_ids(add_tokens) if isinstance(method, TakesTokens) else method


class TakesText(ABC):
    """A method whose settings can contain text that the model reads."""

    @abstractmethod
    def with_text(self, encode: Callable[[str], list[int]]) -> Method:
        """These settings with texts turned into token ids."""


def with_text(method: Method, encode: Callable[[str], list[int]]) -> Method:
    """The settings with texts turned into token ids, such as by ``Tokenizer.encode``."""
    return method.with_text(encode) if isinstance(method, TakesText) else method


class ChangesConfig(ABC):
    """A method that changes the model's config, such as its context length."""

    @abstractmethod
    def configure(self, config: AnyConfig) -> AnyConfig:
        """The model's config with the method's changes."""


class GroupsTokens:
    """A method that limits attention to groups of tokens in training.

    The groups depend on the document, so a prefix that all documents share has other activations in each, and a
    micro-batch cannot compute it just once.
    """


class ScalesLearningRate(ABC):
    """A method that can train some of its parameters at a different learning rate."""

    @abstractmethod
    def lr_factors(self, model: nn.Module) -> dict[str, float]:
        """Factors of the learning rate by parameter name, of an adapted model, where they are not 1."""


def lr_factors(method: Method, model: nn.Module) -> dict[str, float]:
    """Factors of the learning rate by parameter name, of an adapted model, where they are not 1."""
    return method.lr_factors(model) if isinstance(method, ScalesLearningRate) else {}


class TrainsModulesInFull(ABC):
    """A method that can train other modules in full as well, such as a new head."""

    @abstractmethod
    def with_modules_to_save(self, names: Sequence[str]) -> Method:
        """These settings with ``names`` among the modules that train in full."""


def with_modules_to_save(method: Method, names: Sequence[str]) -> Method:
    """The settings with more modules that train in full, such as a new head.

    Raises:
        UsageError: The method cannot train other modules.
    """
    if not names:
        return method
    if isinstance(method, TrainsModulesInFull):
        return method.with_modules_to_save(names)
    raise UsageError(
        f"peft.name: {method.name} trains only its own modules, but {', '.join(names)} must train too",
        hint="use lora, another low-rank method, houlsby or full",
    )
