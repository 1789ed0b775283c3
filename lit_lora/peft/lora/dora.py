"""DoRA: learn the length of every row of a weight apart from its direction.

``y = m / |V| * (V x) + b`` with ``V = W + s B A`` and ``|V|`` the norms of its rows. ``m`` starts at the norms of
``W``, so nothing changes until the first step. ``|V|`` counts as a constant in the backward.
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

    Dropout touches the branch only; PEFT drops the base layer's inputs too.

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
        super().__init__(base_layer, rank, scaling, dropout, init, train_bias=train_bias)
        squares = base_layer.weight.detach().float().square().sum(1)  # (out,)
        self.base_squares: Tensor
        self.register_buffer("base_squares", squares, persistent=False)
        self.lora_magnitude_vector = nn.Parameter(squares.sqrt())
        self._known: tuple[Any, Tensor] | None = None

    @staticmethod
    def forward_together(layers: Sequence[LoRALinear], x: Tensor) -> tuple[Tensor, ...]:
        """The outputs of layers that read the same input; see :func:`lit_lora.model.layers.project`."""
        keep, mask = drop_inputs(x, layers[0].dropout, layers[0].training)
        outputs = lora_linears(x, [layer._part(keep)._replace(bias=None) for layer in layers], mask)
        return tuple(
            layer._stretched(y) for layer, y in zip(layers, outputs, strict=True) if isinstance(layer, DoRALinear)
        )

    def _stretched(self, y: Tensor) -> Tensor:
        """Rows of ``V x``, (..., out), at their trained length, and the bias."""
        bias = self.base_layer.bias if self.trained_bias is None else self.trained_bias
        norms = self.norms(decoding=not torch.is_grad_enabled())
        stretched = y * (self.lora_magnitude_vector / norms)  # float32: in bfloat16 small stretches would vanish
        return (stretched if bias is None else stretched + bias).to(y.dtype)

    @torch.no_grad()
    def norms(self, *, decoding: bool = False) -> Tensor:
        """Norms of the rows of ``W + s B A``, (out,) float32, without forming that matrix.

        ``|w + s b A|^2 = |w|^2 + 2 s b (A w) + s^2 b (A A^T) b^T``. For what is decoded they are kept until ``A`` or
        ``B`` change or a gradient is taken: a fused optimizer changes both without counting their version up.
        """
        state = (self.lora_A._version, self.lora_B._version, self.lora_A.data_ptr(), self.lora_B.data_ptr())
        if not decoding:
            self._known = None
        if self._known is not None and self._known[0] == state:
            return self._known[1]
        A, B = self.lora_A, self.lora_B * self.scaling
        cross = self.base_layer.weight.to(A.dtype) @ A.T  # (out, R)
        squares = self.base_squares + (B * (2 * cross + B @ (A @ A.T))).sum(1)
        norms = squares.clamp(min=torch.finfo(squares.dtype).tiny).sqrt()
        self._known = (state, norms) if decoding else None
        return norms

    def updates(self) -> dict[str, Update]:
        """Rows of ``W + s B A`` at the length ``m``, and the trained bias."""
        low = LowRank(self.lora_B.detach(), self.lora_A.detach(), self.scaling)
        updates: dict[str, Update] = {"weight": Magnitude(low, self.lora_magnitude_vector.detach())}
        return updates if self.trained_bias is None else {**updates, "bias": Replace(self.trained_bias.detach())}

    def file_tensors(self) -> dict[str, Tensor]:
        """Both factors, the lengths, and the trained bias."""
        return {**super().file_tensors(), "lora_magnitude_vector": self.lora_magnitude_vector}


class DoRAConfig(LoRAConfig):
    """DoRA: LoRA, with the length of every row of the weight trained beside its direction."""

    adapts: ClassVar[tuple[type[nn.Module], ...]] = (nn.Linear,)

    name: Literal["dora"] = Field("dora", description="The method.")  # type: ignore[assignment]

    @property
    def title(self) -> str:
        """The method's name as one writes it."""
        return "DoRA"

    def linear(self, base: nn.Linear, rank: int, scaling: float, **settings: Any) -> LoRALinear:
        """What takes the place of a linear layer."""
        return DoRALinear(base, rank, scaling, **settings)

    def peft_config(self, model: nn.Module) -> dict[str, Any]:
        """``adapter_config.json``, but for the base model's name."""
        return {**super().peft_config(model), "use_dora": True}
