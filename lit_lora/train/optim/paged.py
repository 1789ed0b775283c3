"""AdamW whose state a CUDA device moves to the machine's memory when its own runs short.

Source: Dettmers et al. 2023, arXiv:2305.14314, section 3.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field

from lit_lora import log
from lit_lora.train.optim.adamw import AdamWConfig
from lit_lora.train.optim.adamw8bit import AdamW8bitConfig
from lit_lora.train.optim.small_state import SmallStateAdamW

__all__ = ["PagedAdamW8bitConfig", "PagedAdamWConfig"]


class PagedAdamWConfig(AdamWConfig):
    """AdamW with float32 state that a CUDA device pages out when its memory runs short."""

    smaller_state: ClassVar[str | None] = "paged_adamw8bit"

    name: Literal["paged_adamw"] = Field("paged_adamw", description="The optimizer.")  # type: ignore[assignment]

    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """As :class:`AdamWConfig`, with a warning, where nothing can be paged.

        Raises:
            UsageError: bitsandbytes, which the paging needs, is not installed.
        """
        if not _can_page(groups, self.name, otherwise="adamw"):
            return super().build(groups)
        return SmallStateAdamW(groups, lr=self.lr, betas=self.betas, eps=self.eps, bits=32, paged=True)


class PagedAdamW8bitConfig(AdamW8bitConfig):
    """AdamW with 8-bit state that a CUDA device pages out when its memory runs short."""

    name: Literal["paged_adamw8bit"] = Field("paged_adamw8bit", description="The optimizer.")  # type: ignore[assignment]

    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """As :class:`AdamW8bitConfig`, with a warning, where nothing can be paged.

        Raises:
            UsageError: bitsandbytes, which the paging needs, is not installed.
        """
        if not _can_page(groups, self.name, otherwise="adamw8bit"):
            return super().build(groups)
        return SmallStateAdamW(groups, lr=self.lr, betas=self.betas, eps=self.eps, bits=8, paged=True)


def _can_page(groups: list[dict[str, Any]], name: str, *, otherwise: str) -> bool:
    """Whether the parameters are on a CUDA device; warns that ``otherwise`` is used instead where they are not."""
    on_cuda: bool = groups[0]["params"][0].is_cuda
    if not on_cuda:
        log.warn(f"optimizer.name={name}: paging needs a CUDA device; using {otherwise}")
    return on_cuda
