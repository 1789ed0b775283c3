"""LoRA for embeddings, with a row lookup instead of a product."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lit_lora.peft.core.modules import OwnModule, embed_scale
from lit_lora.peft.core.updates import LowRank, Update

__all__ = ["LoRAEmbedding"]


class LoRAEmbedding(OwnModule):
    """A frozen embedding plus a trained low-rank update: ``E[x] + s A^T[x] B^T``.

    Unlike in a linear layer, ``lora_A`` (R, V) starts at zero and ``lora_B`` (D, R) random, normal. Both are float32.

    Args:
        base_layer: The embedding (V, D); it stays unchanged.
        rank: R.
        scaling: The factor of the update, alpha / rank.
    """

    def __init__(self, base_layer: nn.Embedding, rank: int, scaling: float) -> None:
        super().__init__()
        self.base_layer: nn.Embedding = base_layer
        self.rank, self.scaling = rank, scaling
        vocabulary, width = base_layer.weight.shape
        device = base_layer.weight.device
        self.lora_A = nn.Parameter(torch.zeros(rank, vocabulary, dtype=torch.float32, device=device))
        self.lora_B = nn.Parameter(torch.randn(width, rank, dtype=torch.float32, device=device))

    def forward(self, input_ids: Tensor) -> Tensor:
        """Embed (...,) int64 to (..., D)."""
        base: Tensor = self.base_layer(input_ids)
        low = nn.functional.embedding(input_ids, self.lora_A.T)  # (..., R)
        return base + (self.scaling * low @ self.lora_B.T * embed_scale(self.base_layer)).to(base.dtype)

    def updates(self) -> dict[str, Update]:
        """``E + s (B A)^T``."""
        return {"weight": LowRank(self.lora_A.detach().T, self.lora_B.detach().T, self.scaling)}

    def file_tensors(self) -> dict[str, Tensor]:
        """Both factors."""
        return {"lora_embedding_A": self.lora_A, "lora_embedding_B": self.lora_B}

    def extra_repr(self) -> str:
        """Rank and scaling."""
        return f"rank={self.rank}, scaling={self.scaling:g}"
