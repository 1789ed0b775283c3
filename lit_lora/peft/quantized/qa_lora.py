"""QA-LoRA: LoRA whose ``A`` reads sums over groups of inputs, so that it merges into a quantized base without loss.

``y = W x + b + s B A P(x)`` with ``P`` (in,) -> (in / g,) the sum over each group of ``g`` inputs. This is a LoRA whose
``A``, and so its update, is constant within a group, and it is computed as one. If the base is ``scale * code + zero``
with the same groups, the update is added to the zeros and no code changes. ``A`` starts like LoRA's (the authors use
Xavier's bounds over the pooled inputs, and their code takes means: a different scale of ``A``), ``B`` at zero.
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
    """A frozen linear layer plus a trained low-rank update that reads sums over groups of its inputs.

    ``lora_A`` (R, in / group) and ``lora_B`` (out, R) are float32.

    Args:
        base_layer: The linear layer; it stays unchanged.
        rank: R.
        scaling: The factor of the update, alpha / rank.
        group: Inputs per group; divides their number.
        settings: Further arguments of :class:`LoRALinear`.
    """

    def __init__(self, base_layer: nn.Linear, rank: int, scaling: float, group: int, **settings: Any) -> None:
        super().__init__(base_layer, rank, scaling, **settings)
        self.group = group
        # One column per group, with the bounds of LoRA's init over all inputs.
        self.lora_A = nn.Parameter(self.lora_A.detach()[:, ::group].clone())

    def _spread(self) -> Tensor:
        """``A`` of the equivalent LoRA, (R, in): each column repeated for all inputs of its group."""
        return self.lora_A.repeat_interleave(self.group, dim=1)

    def _part(self, keep: float) -> Part:
        return super()._part(keep)._replace(A=self._spread())

    def updates(self) -> dict[str, Update]:
        """``W + s B A P``, and the trained bias."""
        updates = super().updates()
        updates["weight"] = LowRank(self.lora_B.detach(), self._spread().detach(), self.scaling)
        return updates

    def extra_repr(self) -> str:
        """Rank, scaling, dropout and group."""
        return f"{super().extra_repr()}, group={self.group}"


class QALoRAConfig(LoRAConfig, NeedsQuantizedBase, KeepsCodes):
    """QA-LoRA: LoRA that merges into the zero points of an int4 base without loss; for recipe: qlora."""

    kind: ClassVar[Kind] = "quantized"
    peft_type: ClassVar[str] = "LIT_LORA_QA_LORA"
    adapts: ClassVar[tuple[type[nn.Module], ...]] = (nn.Linear,)
    name: Literal["qa-lora"] = Field("qa-lora", description="The method.")  # type: ignore[assignment]
    init: Literal["kaiming", "gaussian"] = Field("kaiming", description="Initial values of A; B starts at zero.")
    group_size: int | None = Field(
        None, ge=1, description="Number of inputs that A reads as one sum; the base's block size if omitted."
    )

    @property
    def title(self) -> str:
        """The method's name as written in text."""
        return "QA-LoRA"

    def for_quantized_base(self, quantize: QuantizeConfig) -> QALoRAConfig:
        """These settings for a base, whose block size is the default of ``group_size``.

        Raises:
            UsageError: The base has no zero points to merge into.
        """
        if quantize.name not in _BASES:
            raise UsageError(
                f"peft.name: qa-lora needs a base in int4 or int2, got {quantize}",
                hint="quantize: {name: int4, block_size: 32}",
            )
        if self.group_size:
            return self
        return self.model_copy(update={"group_size": quantize.block_size})

    def keeps_codes(self, quantize: QuantizeConfig) -> bool:
        """Whether the update is constant within every block of the base."""
        group = self.group_size or quantize.block_size
        return quantize.name in _BASES and group % quantize.block_size == 0

    def wrap(self, name: str, base: Any, rank: int, scaling: float) -> Any:
        """The wrapper of ``base``, with an update of ``rank``.

        Raises:
            UsageError: The rank or the group does not fit, or the base has no zero points to merge into.
        """
        group = self.group_size
        if isinstance(base, QuantizedLinear):
            if not isinstance(base.quantized, Groups):
                self.for_quantized_base(base.quantized.config)  # refuses every type that is not stored in groups
            group = group or base.quantized.config.block_size
        if group is None:
            raise UsageError(f"peft.name: qa-lora needs a base in int4 or int2, but {name} is not quantized")
        if base.in_features % group:
            raise UsageError(f"peft.group_size: {group} does not divide the {base.in_features} columns of {name}")
        largest = min(base.out_features, base.in_features // group)
        if rank > largest:
            raise UsageError(
                f"peft.rank: {rank} is too large for {name} ({base.out_features}×{base.in_features} in groups of "
                f"{group}), expected at most {largest}"
            )
        settings = {"dropout": self.dropout, "init": self.init, "train_bias": self.trains_bias(name)}
        wrapped = QALoRALinear(base, rank, scaling, group, **settings)
        wrapped.lora_A.requires_grad_(not self.freeze_A)
        return wrapped

    def peft_config(self, model: nn.Module) -> dict[str, Any]:
        """``adapter_config.json`` in our own format: PEFT's QA-LoRA scales the update differently."""
        return {"peft_type": self.peft_type, "task_type": "CAUSAL_LM", "inference_mode": True}
