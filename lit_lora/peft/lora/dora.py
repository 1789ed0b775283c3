"""DoRA: train the length of each row of a weight separately from its direction.

``y = m / |V| * (V x) + b`` with ``V = W + s B A`` and ``|V|`` the norms of its rows. ``m`` starts at the norms of
``W``, so nothing changes until the first step. ``|V|`` is a constant in the backward pass.
Source: Liu et al. 2024, "DoRA: Weight-Decomposed Low-Rank Adaptation", equation 5 and section 4.3.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from lit_lora.peft.core.updates import LowRank, Magnitude, Replace, Update
from lit_lora.peft.lora.config import LoRAConfig
from lit_lora.peft.lora.function import drop_inputs, lora_linears
from lit_lora.peft.lora.linear import Init, LoRALinear

__all__ = ["DoRAConfig", "DoRALinear"]


class DoRALinear(LoRALinear):
    """A LoRA linear layer whose rows have a trained length, ``lora_magnitude_vector`` (out,) float32.

    Dropout applies to the update's inputs only; PEFT drops the base layer's inputs too.

    Args:
        base_layer: The linear layer; it stays unchanged.
        rank: R.
        scaling: The factor of the update, alpha / rank.
        dropout: Share of the update's inputs that are zeroed in training.
        init: Initialization of ``lora_A``; ``lora_B`` starts at zero.
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
        super().__init__(base_layer, rank, scaling, dropout, init, train_bias=train_bias)
        squares = base_layer.weight.detach().float().square().sum(1)  # (out,)
        self.base_squares: Tensor
        self.register_buffer("base_squares", squares, persistent=False)
        self.lora_magnitude_vector = nn.Parameter(squares.sqrt())
        self._cached_norms: tuple[Any, Tensor] | None = None  # the state of A and B they are for, and the norms

    @staticmethod
    def forward_together(layers: Sequence[LoRALinear], x: Tensor) -> tuple[Tensor, ...]:
        """The outputs of layers that read the same input; see :func:`lit_lora.model.layers.project`."""
        keep, mask = drop_inputs(x, layers[0].dropout, layers[0].training)
        parts = [layer._part(keep)._replace(bias=None) for layer in layers]  # a bias is not rescaled
        outputs = []
        for layer, y in zip(layers, lora_linears(x, parts, mask), strict=True):
            assert isinstance(layer, DoRALinear)
            outputs.append(layer._rescaled(y))
        return tuple(outputs)

    def _rescaled(self, y: Tensor) -> Tensor:
        """``V x``, (..., out), at the trained lengths, plus the bias."""
        bias = self.base_layer.bias if self.trained_bias is None else self.trained_bias
        norms = self.norms(decoding=not torch.is_grad_enabled())
        y32 = y * (self.lora_magnitude_vector / norms)  # float32: in bfloat16, factors near 1 would be rounded to 1
        if bias is not None:
            y32 = y32 + bias
        return y32.to(y.dtype)

    @torch.no_grad()
    def norms(self, *, decoding: bool = False) -> Tensor:
        """Norms of the rows of ``W + s B A``, (out,) float32, without forming that matrix.

        ``|w + s b A|^2 = |w|^2 + 2 s b (A w) + s^2 b (A A^T) b^T``.

        Args:
            decoding: Reuse the norms of the call before while ``A`` and ``B`` are the same.
        """
        # A version is counted up by in-place changes, except by a fused optimizer's. But between two of its steps is a
        # forward pass with gradients, which drops the cache.
        state = (self.lora_A._version, self.lora_B._version, self.lora_A.data_ptr(), self.lora_B.data_ptr())
        if not decoding:
            self._cached_norms = None
        if self._cached_norms is not None and self._cached_norms[0] == state:
            return self._cached_norms[1]

        A = self.lora_A
        B = self.lora_B * self.scaling
        cross = self.base_layer.weight.to(A.dtype) @ A.T  # (out, R)
        squares = self.base_squares + (B * (2 * cross + B @ (A @ A.T))).sum(1)
        norms = squares.clamp(min=torch.finfo(squares.dtype).tiny).sqrt()
        if decoding:
            self._cached_norms = (state, norms)
        return norms

    def updates(self) -> dict[str, Update]:
        """Rows of ``W + s B A`` at the length ``m``, and the trained bias."""
        low = LowRank(self.lora_B.detach(), self.lora_A.detach(), self.scaling)
        updates: dict[str, Update] = {"weight": Magnitude(low, self.lora_magnitude_vector.detach())}
        if self.trained_bias is not None:
            updates["bias"] = Replace(self.trained_bias.detach())
        return updates

    def file_tensors(self) -> dict[str, Tensor]:
        """Both factors, the lengths, and the trained bias."""
        return {**super().file_tensors(), "lora_magnitude_vector": self.lora_magnitude_vector}


class DoRAConfig(LoRAConfig):
    """DoRA: LoRA that trains the length of each row of the weight separately from its direction."""

    adapts: ClassVar[tuple[type[nn.Module], ...]] = (nn.Linear,)

    name: Literal["dora"] = Field("dora", description="The method.")  # type: ignore[assignment]

    @property
    def title(self) -> str:
        """The method's name as written in text."""
        return "DoRA"

    def linear(self, base: nn.Linear, rank: int, scaling: float, **settings: Any) -> LoRALinear:
        """The wrapper of a linear layer."""
        return DoRALinear(base, rank, scaling, **settings)

    def peft_config(self, model: nn.Module) -> dict[str, Any]:
        """``adapter_config.json`` without the base model's name."""
        return {**super().peft_config(model), "use_dora": True}
