"""What some methods do beyond being applied: one small base class for each, which a method that does it inherits.

A caller asks by ``isinstance``, once. Where several callers have the same question, the function below the class asks
for them and knows the answer of all other methods. So a new capability changes neither :class:`Method` nor the methods
without it. Who asks, and when::

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
    KeepsCodes, ChangesConfig  merge: what the merged model is held as, and its config
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
    """A method that can start from what the model does with rows of the data."""

    @property
    @abstractmethod
    def rows_for_init(self) -> int:
        """How many rows of the data these settings look at before they start; 0 for none."""

    @abstractmethod
    def init_from_data(self, model: nn.Module, passes: Iterable[Pass]) -> Method:
        """As ``apply``, starting from what the model does with rows, where ``rows_for_init`` asks for some.

        Args:
            model: Frozen, without an adapter; changed in place.
            passes: At least so many rows, or all that there are.

        Returns:
            Settings by which ``apply`` gives modules of the same shapes.

        Raises:
            UsageError: The settings do not fit this model or the rows.
        """


def rows_for_init(method: Method) -> int:
    """How many rows of the data a method looks at before it starts."""
    return method.rows_for_init if isinstance(method, InitializesFromData) else 0


class FinalizesAfterTraining(ABC):
    """A method that can leave something open in training, and chooses it by the loss on validation rows."""

    @property
    @abstractmethod
    def finalizes(self) -> bool:
        """Whether these settings leave something open."""

    @abstractmethod
    def finalize(self, model: nn.Module, score: Callable[[], float]) -> Method:
        """Choose, in place, what training has left open.

        Args:
            model: Trained.
            score: The validation loss of the model as it is when called.

        Returns:
            Settings by which ``apply`` gives modules of the same shapes.
        """


class NeedsQuantizedBase(ABC):
    """A method for which not every quantised base will do, or that takes settings from it."""

    @abstractmethod
    def for_quantized_base(self, quantize: QuantizeConfig) -> Method:
        """These settings as they are over a base quantised so.

        Raises:
            UsageError: The method needs another base.
        """


class WeighsErrors(ABC):
    """A method whose codes can weigh errors of the base by gradients on rows of the data."""

    @property
    @abstractmethod
    def calibration_rows(self) -> int:
        """How many rows' gradients say how much errors matter; 0 for errors that all count the same."""


def calibration_rows(method: Method) -> int:
    """How many rows' gradients say how much errors of the base matter; needs the model in full precision once."""
    return method.calibration_rows if isinstance(method, WeighsErrors) else 0


class Decomposer(Protocol):
    """Quantises layer by layer and keeps what the adapter then starts from."""

    def __call__(self, name: str, weight: Tensor) -> Quantized:
        """Quantise the weight (out, in) of the layer ``name``."""

    def fill(self, model: nn.Module) -> None:
        """Give the adapter in ``model`` the values it starts from, in place."""


class ChoosesCodes(ABC):
    """A method that quantises the base itself and starts from what the codes lose.

    Its codes are not those of the original weights: the run keeps the base, the original cannot stand in for it.
    """

    @abstractmethod
    def decomposer(
        self,
        model: nn.Module,
        quantize: QuantizeConfig,
        read: Callable[[str], Tensor],
        weights: Mapping[str, Weights] | None = None,
    ) -> Decomposer:
        """What quantises the base.

        Args:
            model: Without values, such as on the meta device, and without an adapter; it may be changed.
            quantize: How the base is quantised.
            read: Gives the weight (out, in) of a linear layer by its name.
            weights: How much errors matter, by layer, for a method that :class:`WeighsErrors`.

        Raises:
            UsageError: The settings do not fit this model.
        """


class ChoosesTypes(ABC):
    """A method that gives each layer of the base a type of its own."""

    @abstractmethod
    def planned(self, model: nn.Module) -> Quantizer:
        """How large the base will be: what quantises weights without values, of a model without an adapter.

        Raises:
            UsageError: The settings do not fit this model.
        """


class KeepsCodes(ABC):
    """A method whose update can be merged into a quantised base without changing its codes: nothing is lost."""

    @abstractmethod
    def keeps_codes(self, quantize: QuantizeConfig) -> bool:
        """Whether a merged model has the codes of its base, which was quantised so."""


class TakesTokens(ABC):
    """A method whose settings can name tokens by their text."""

    @abstractmethod
    def with_token_ids(self, add_tokens: Callable[[list[str]], list[int]]) -> Method:
        """These settings with tokens named by text turned into ids; themselves where none is named so."""


def with_token_ids(method: Method, add_tokens: Callable[[list[str]], list[int]]) -> Method:
    """The settings with tokens named by text turned into ids, such as by ``Tokenizer.add_tokens``."""
    return method.with_token_ids(add_tokens) if isinstance(method, TakesTokens) else method


class TakesText(ABC):
    """A method whose settings can hold text that the model reads."""

    @abstractmethod
    def with_text(self, encode: Callable[[str], list[int]]) -> Method:
        """These settings with texts turned into token ids."""


def with_text(method: Method, encode: Callable[[str], list[int]]) -> Method:
    """The settings with texts turned into token ids, such as by ``Tokenizer.encode``."""
    return method.with_text(encode) if isinstance(method, TakesText) else method


class ChangesConfig(ABC):
    """A method that changes the model's config, such as its context."""

    @abstractmethod
    def configure(self, config: AnyConfig) -> AnyConfig:
        """The model's config with what the method changes of it."""


class GroupsTokens:
    """A method under which tokens attend within groups in training.

    A prefix that all documents share then does not come out the same in each, so a micro-batch cannot compute it once.
    """


class ScalesLearningRate(ABC):
    """A method some of whose parameters can learn at another rate than the rest."""

    @abstractmethod
    def lr_factors(self, model: nn.Module) -> dict[str, float]:
        """Factors of the learning rate by parameter name, of an adapted model, where they are not 1."""


def lr_factors(method: Method, model: nn.Module) -> dict[str, float]:
    """Factors of the learning rate by parameter name, of an adapted model, where they are not 1."""
    return method.lr_factors(model) if isinstance(method, ScalesLearningRate) else {}


class TrainsModulesInFull(ABC):
    """A method beside which other modules can train in full, such as a new head."""

    @abstractmethod
    def with_modules_to_save(self, names: Sequence[str]) -> Method:
        """These settings with ``names`` among the modules that train in full."""


def with_modules_to_save(method: Method, names: Sequence[str]) -> Method:
    """The settings with modules that train in full beside the method, such as a new head.

    Raises:
        UsageError: The method has no place for them.
    """
    if not names:
        return method
    if isinstance(method, TrainsModulesInFull):
        return method.with_modules_to_save(names)
    raise UsageError(
        f"peft.name: {method.name} trains nothing beside its own modules, and {', '.join(names)} must train too",
        hint="take lora, another low-rank method, houlsby or full",
    )
