"""What the loss, methods, merging, generation and estimates ask of any language model.

Members have transformers' names where it has them. Ask for a part each time you need it, because a finetuning method
may have put another module in its place.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal, Protocol, TypeVar, runtime_checkable

from torch import Tensor, nn

from lit_lora.model.config import ModelConfig

__all__ = ["Cache", "Checkpointing", "LanguageModel"]

Checkpointing = Literal["none", "selective", "full"]
"""Activations to recompute in the backward pass: none, the MLPs' (selective) or whole layers' (full)."""

Self = TypeVar("Self", bound="LanguageModel")


class Cache(Protocol):
    """What a model has read of several rows, so that decoding computes each token once."""

    length: int
    """Tokens read per row, left padding included."""
    max_length: int
    """Room for tokens per row."""

    def copy_row(self, other: Any, row: int, tokens: int, start: int = 0) -> None:
        """Copy the first ``tokens`` tokens of the first row of ``other`` to ``row``, behind ``start`` of padding."""

    def select(self, rows: Tensor) -> None:
        """Keep only these rows, given as (rows,) int64 or a mask (B,)."""

    def advance(self, tokens: int) -> None:
        """Count ``tokens`` tokens as read."""

    def truncate(self, length: int) -> None:
        """Forget all but the first ``length`` tokens."""


@runtime_checkable
class LanguageModel(Protocol):
    """A model that predicts the next token; an ``nn.Module``."""

    config: ModelConfig
    """Sizes, and the names of the model's parts."""
    training: bool
    """As in ``nn.Module``."""
    not_wrappable: frozenset[str]
    """Names of linear layers whose weights the model reads itself: it would not call a module in their place."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """All parameters, on one device."""

    def train(self: Self, mode: bool = True) -> Self:
        """As in ``nn.Module``."""

    def eval(self: Self) -> Self:
        """As in ``nn.Module``."""

    @property
    def context(self) -> int:
        """The maximum length of a document, in tokens."""

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding."""

    def get_output_embeddings(self) -> nn.Module:
        """The head."""

    def get_decoder(self) -> nn.Module:
        """The module from the embedding to the final norm."""

    def blocks(self) -> dict[str, nn.Module]:
        """The layers by name, first to last."""

    def tie_weights(self) -> Any:
        """Make the head's weight the embedding's parameter, in place."""

    def checkpoint_activations(self, what: Checkpointing) -> None:
        """Trade time for memory in training, in place; losses and gradients stay the same bits."""

    def new_cache(self, batch_size: int, max_length: int, *, padding: Tensor | None = None) -> Cache:
        """An empty cache for ``batch_size`` rows of up to ``max_length`` tokens.

        Args:
            batch_size: Rows B.
            max_length: Tokens per row, left padding included.
            padding: (B,) int64, how many tokens at the left of each row are padding; ``None`` for no padding.
        """

    def hidden_states(
        self,
        input_ids: Tensor,
        *,
        lengths: Sequence[int] | None = None,
        shared_prefix: int = 0,
        cache: Any | None = None,
    ) -> Tensor:
        """Map token ids (B, T) int64 to the final norm's output (B, T, D); see :class:`lit_lora.model.CausalLM`."""

    def logits(self, hidden: Tensor) -> Tensor:
        """Map hidden states (..., D) to logits (..., V), scaled and capped as the model does it."""
