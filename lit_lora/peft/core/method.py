"""What every method needs: freeze, find modules by name, replace them, count and collect what trains.

A method is: which modules it wraps, and which parameters then require a gradient. Its parameters live in modules that
derive from :class:`OwnModule`, so they are found by type and never by a substring of their name. The wrapped module
stays untouched as ``base_layer``. Works on any tree of ``nn.Module``.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import ClassVar, Literal, Protocol, TypeVar

from pydantic import Field
from torch import Tensor, nn

from lit_lora.config import Settings
from lit_lora.errors import UsageError
from lit_lora.peft.core.passes import Pass
from lit_lora.peft.core.svd import Weights
from lit_lora.quantize import QuantizeConfig, Quantized, Quantizer

__all__ = ["AnyConfig", "Decomposer", "Kind", "Method"]

AnyConfig = TypeVar("AnyConfig")

Kind = Literal["mergeable", "quantized", "added", "full"]


class Method(Settings):
    """Settings of one finetuning method; ``apply`` changes a model in place into one that trains by it."""

    kind: ClassVar[Kind]
    name: str = Field("", description="The method.")
    default_lr: ClassVar[float | None] = None
    """The learning rate where the config gives none; ``None`` for that of the optimizer's settings."""
    own_base: ClassVar[bool] = False
    """The base has codes that the method chose: the run keeps it, the original cannot stand in for it."""
    chooses_types: ClassVar[bool] = False
    """Each layer of the base is quantised in a type that the method chose."""
    groups_tokens: ClassVar[bool] = False
    """Tokens attend within groups in training, so what all documents begin with does not come out the same in each."""

    @abstractmethod
    def apply(self, model: nn.Module) -> None:
        """Wrap the modules that the method adapts and let its own parameters require a gradient.

        What required one before still does, so a recipe calls :func:`freeze` first.

        Raises:
            UsageError: The settings do not fit this model, such as a target that matches nothing.
        """

    @property
    def graph_safe(self) -> bool:
        """Whether every training step does the same operations, so that a GPU's may be recorded once and repeated."""
        return False

    @property
    def init_rows(self) -> int:
        """Rows of the data that the method looks at before it starts."""
        return 0

    def init_from_data(self, model: nn.Module, passes: Iterable[Pass]) -> Method:
        """As :meth:`apply`, starting from what the model does with the rows that ``init_rows`` asks for.

        Returns:
            Settings by which ``apply`` gives modules of the same shapes.

        Raises:
            UsageError: The settings do not fit this model or the rows.
        """
        self.apply(model)
        return self

    @property
    def finalizes(self) -> bool:
        """Whether :meth:`finalize` has something to choose, by the loss on validation rows."""
        return False

    def finalize(self, model: nn.Module, score: Callable[[], float]) -> Method:
        """Choose, in place, what training has left open.

        Args:
            model: Trained.
            score: The validation loss of the model as it is when called.

        Returns:
            Settings by which ``apply`` gives modules of the same shapes.
        """
        return self

    def configure(self, config: AnyConfig) -> AnyConfig:
        """The model's config with what the method changes of it."""
        return config

    def lr_factors(self, model: nn.Module) -> dict[str, float]:
        """Factors of the learning rate by parameter name, of an adapted model, where they are not 1."""
        return {}

    def for_quantized_base(self, quantize: QuantizeConfig) -> Method:
        """These settings as they are over a base quantised so.

        Raises:
            UsageError: The method needs another base.
        """
        return self

    @property
    def calibration_rows(self) -> int:
        """Rows of the data whose gradients say how much errors of the base matter."""
        return 0

    def keeps_codes(self, quantize: QuantizeConfig) -> bool:
        """Whether a merged model has the codes of its base, which was quantised so: nothing is lost."""
        return False

    def decomposer(
        self,
        model: nn.Module,
        quantize: QuantizeConfig,
        read: Callable[[str], Tensor],
        weights: Mapping[str, Weights] | None = None,
    ) -> Decomposer | None:
        """What quantises the base, where the method starts from what the codes lose; ``None`` where it does not.

        Args:
            model: Without values, such as on the meta device, and without an adapter.
            quantize: How the base is quantised.
            read: Gives the weight (out, in) of a linear layer by its name.
            weights: How much errors matter, by layer, where ``calibration_rows`` asks for it.

        Raises:
            UsageError: The settings do not fit this model.
        """
        return None

    def planned(self, model: nn.Module, quantize: QuantizeConfig) -> QuantizeConfig | Quantizer:
        """How large the base will be: what quantises weights without values, of a model without an adapter.

        Raises:
            UsageError: The settings do not fit this model.
        """
        return quantize

    def with_token_ids(self, add_tokens: Callable[[list[str]], list[int]]) -> Method:
        """These settings with tokens named by text turned into ids; a method without such tokens stays as it is."""
        return self

    def with_text(self, encode: Callable[[str], list[int]]) -> Method:
        """These settings with texts turned into token ids; a method without texts stays as it is."""
        return self

    def with_modules_to_save(self, names: Sequence[str]) -> Method:
        """These settings with modules that train in full beside the method, such as a new head.

        Raises:
            UsageError: The method has no place for them.
        """
        if not names:
            return self
        raise UsageError(
            f"peft.name: {self.name} trains nothing beside its own modules, and {', '.join(names)} must train too",
            hint="take lora, another low-rank method, houlsby or full",
        )

    @property
    def about(self) -> str:
        """The method and its main settings in a few words."""
        return self.name

    @property
    def lr(self) -> float | None:
        """The learning rate of these settings where the config gives none."""
        return self.default_lr

    @property
    def title(self) -> str:
        """The method's name as one writes it."""
        return self.name.replace("-", " ").capitalize()


class Decomposer(Protocol):
    """Quantises layer by layer and keeps what the adapter then starts from."""

    def __call__(self, name: str, weight: Tensor) -> Quantized:
        """Quantise the weight (out, in) of the layer ``name``."""

    def fill(self, model: nn.Module) -> None:
        """Give the adapter in ``model`` the values it starts from, in place."""
