"""What the loss, methods, merging, generation and estimates ask of a language model, whoever wrote it.

Methods have transformers' names where transformers has them. The parts that they give are asked for anew each time:
a finetuning method may have put another module in a part's place.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal, Protocol, TypeVar, runtime_checkable

from torch import Tensor, nn

from lit_lora.model.config import ModelConfig
from lit_lora.model.kv_cache import KVCache

__all__ = ["Checkpointing", "LanguageModel"]

Checkpointing = Literal["none", "selective", "full"]
"""What is computed again in the backward instead of being kept: nothing, the MLPs' inner states, or whole layers."""

Self = TypeVar("Self", bound="LanguageModel")


@runtime_checkable
class LanguageModel(Protocol):
    """A model that predicts the next token; an ``nn.Module``."""

    config: ModelConfig
    """Sizes, and the names of its parts."""
    training: bool
    """As of any module."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """All parameters; they are on one device."""

    def train(self: Self, mode: bool = True) -> Self:
        """As of any module."""

    def eval(self: Self) -> Self:
        """As of any module."""

    @property
    def context(self) -> int:
        """The longest document, in tokens."""

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding."""

    def get_output_embeddings(self) -> nn.Module:
        """The head's matrix."""

    def get_decoder(self) -> nn.Module:
        """What runs from embedded tokens to the final norm."""

    def blocks(self) -> dict[str, nn.Module]:
        """The layers by name, first to last."""

    def tie_weights(self) -> Any:
        """Make the head's weight the embedding's parameter, in place."""

    def checkpoint_activations(self, what: Checkpointing) -> None:
        """Trade time for memory in training, in place; losses and gradients stay the same bits."""

    def hidden_states(
        self,
        input_ids: Tensor,
        *,
        lengths: Sequence[int] | None = None,
        shared_prefix: int = 0,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Token ids (B, T) int64 to the final norm's output (B, T, D); see :class:`lit_lora.model.CausalLM`."""

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits of hidden states, (..., D) to (..., V), with all that the model does to them."""
