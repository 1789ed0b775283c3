"""QA-LoRA: LoRA over a base in groups, whose ``A`` sees the sums of groups of inputs, so that it merges into the zeros.

``y = W x + b + s B A P(x)`` with ``P`` (in,) -> (in / g,) the sum over each group of ``g`` inputs. That is a LoRA whose
``A`` is constant within a group, and so is its update: where the base is ``scale * code + zero`` by the same groups,
the update goes into the zeros and no code changes. It is computed as that LoRA. ``A`` starts as LoRA's (the authors
start it at Xavier's bounds over the pooled inputs, and their code takes means: another scale of ``A``), ``B`` at zero.
Source: Xu et al. 2023, "QA-LoRA: Quantization-Aware Low-Rank Adaptation of Large Language Models", arXiv:2309.14717,
section 3.3.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn

from lit_lora.errors import UsageError
from lit_lora.peft.core.capabilities import KeepsCodes, NeedsQuantizedBase
from lit_lora.peft.core.method import Kind
from lit_lora.peft.core.updates import LowRank, Update
from lit_lora.peft.lora.config import LoRAConfig
from lit_lora.peft.lora.function import Part
from lit_lora.peft.lora.linear import LoRALinear
from lit_lora.quantize import Groups, QuantizeConfig, QuantizedLinear

__all__ = ["QALoRAConfig", "QALoRALinear"]

_BASES = ("int4", "int2")


class QALoRALinear(LoRALinear):
    """A frozen linear layer with a low-rank update of the sums of groups of its inputs.

    ``lora_A`` (R, in / group) and ``lora_B`` (out, R), float32.

    Args:
        base_layer: The linear layer; it stays as it is.
        rank: R.
        scaling: The factor of the branch, alpha / rank.
        group: Inputs in a group; divides their number.
        settings: As of :class:`LoRALinear`.
    """

    def __init__(self, base_layer: nn.Linear, rank: int, scaling: float, group: int, **settings: Any) -> None:
        super().__init__(base_layer, rank, scaling, **settings)
        self.group = group
        self.lora_A = nn.Parameter(self.lora_A.detach()[:, ::group].clone())

    def _spread(self) -> Tensor:
        """``A`` for single inputs, (R, in)."""
        return self.lora_A.repeat_interleave(self.group, dim=1)

    def _part(self, keep: float) -> Part:
        return super()._part(keep)._replace(A=self._spread())

    def updates(self) -> dict[str, Update]:
        """``W + s B A P``, and the trained bias."""
        return {**super().updates(), "weight": LowRank(self.lora_B.detach(), self._spread().detach(), self.scaling)}

    def extra_repr(self) -> str:
        """Rank, scaling, dropout and group."""
        return f"{super().extra_repr()}, group={self.group}"


class QALoRAConfig(LoRAConfig, NeedsQuantizedBase, KeepsCodes):
    """QA-LoRA: LoRA that merges into the zeros of a base in int4 without loss; for recipe: qlora."""

    kind: ClassVar[Kind] = "quantized"
    peft_type: ClassVar[str] = "LIT_LORA_QA_LORA"
    adapts: ClassVar[tuple[type[nn.Module], ...]] = (nn.Linear,)
    name: Literal["qa-lora"] = Field("qa-lora", description="The method.")  # type: ignore[assignment]
    init: Literal["kaiming", "gaussian"] = Field("kaiming", description="How A starts; B starts at zero.")
    group_size: int | None = Field(
        None, ge=1, description="Inputs that A sees as one sum; those of a block of the base when omitted."
    )

    @property
    def title(self) -> str:
        """The method's name as one writes it."""
        return "QA-LoRA"

    def for_quantized_base(self, quantize: QuantizeConfig) -> QALoRAConfig:
        """These settings over a base: its blocks are the groups, unless given.

        Raises:
            UsageError: The base is not in groups.
        """
        if quantize.name not in _BASES:
            raise UsageError(
                f"peft.name: qa-lora trains over a base in groups, this one is {quantize}",
                hint="quantize: {name: int4, block_size: 32}",
            )
        return self if self.group_size else self.model_copy(update={"group_size": quantize.block_size})

    def keeps_codes(self, quantize: QuantizeConfig) -> bool:
        """Whether the update is constant within every block of the base."""
        return quantize.name in _BASES and (self.group_size or quantize.block_size) % quantize.block_size == 0

    def wrap(self, name: str, base: Any, rank: int, scaling: float) -> Any:
        """The module with an update of ``rank`` beside ``base``.

        Raises:
            UsageError: The rank or the group does not fit, or the base is not in groups.
        """
        quantized = base.quantized if isinstance(base, QuantizedLinear) else None
        if quantized is not None and not isinstance(quantized, Groups):
            self.for_quantized_base(quantized.config)
        group = self.group_size or (quantized.config.block_size if quantized is not None else None)
        if group is None:
            raise UsageError(f"peft.name: qa-lora trains over a base in groups, {name} is not quantised")
        if base.in_features % group:
            raise UsageError(f"peft.group_size: {group} does not divide the {base.in_features} columns of {name}")
        if rank > (most := min(base.out_features, base.in_features // group)):
            raise UsageError(
                f"peft.rank: {rank} is too large for {name} ({base.out_features}×{base.in_features} in groups of "
                f"{group}), expected at most {most}"
            )
        settings = {"dropout": self.dropout, "init": self.init, "train_bias": self.trains_bias(name)}
        wrapped = QALoRALinear(base, rank, scaling, group, **settings)
        wrapped.lora_A.requires_grad_(not self.freeze_A)
        return wrapped

    def peft_config(self, model: nn.Module) -> dict[str, Any]:
        """``adapter_config.json``, but for the base model's name: PEFT has no such update of this scale."""
        return {"peft_type": self.peft_type, "task_type": "CAUSAL_LM", "inference_mode": True}
