"""LLaMA-Adapter: prompts in the upper layers with attention of their own, behind a gate that starts at zero.

::

    k_P, v_P = W_k P, W_v P  (frozen W, no rotation)
    y = W_o [ softmax(q kᵀ / √h) v  +  g · softmax(q k_Pᵀ / √h) v_P ]          g per head, 0 at first

Source: Zhang et al. 2023, "LLaMA-Adapter: Efficient Fine-tuning of Language Models with Zero-init Attention", section
3.2; version 2, Gao et al. 2023, "LLaMA-Adapter V2", section 3.1, also trains the norms, and a bias and a scale of
every linear layer: ``y = s ⊙ (W x + b)``, s = 1 and b = 0 at first.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from lit_lora.errors import InputError, UsageError
from lit_lora.model import CausalLM
from lit_lora.model.attention.attend import Attend, LayerAttention
from lit_lora.model.ops import attention
from lit_lora.peft.adapters.bottleneck import norms
from lit_lora.peft.core.adapter_method import WEIGHTS
from lit_lora.peft.core.added import AddedMethod, AddedModule, blocks, decoder_of
from lit_lora.peft.core.module_names import names_of
from lit_lora.peft.core.modules import own_modules, replace_module
from lit_lora.peft.core.modules_to_save import TrainedCopy
from lit_lora.peft.prompts.virtual_tokens import refuse

__all__ = ["AdaptionPrompt", "LlamaAdapterConfig", "LlamaAdapterV2Config", "ScaleAndBias"]


class AdaptionPrompt(AddedModule):
    """The prompt and gate of one attention layer.

    Args:
        length: Rows of the prompt, K.
        width: D.
        gates: Number of gates, one per query head or only one.
        tanh: The gate is tanh of its parameter.
    """

    child = "adaption"

    def __init__(self, length: int, width: int, gates: int, *, tanh: bool) -> None:
        super().__init__()
        self.adaption_prompt = nn.Parameter(torch.randn(length, width))
        self.adaption_gate = nn.Parameter(torch.zeros(gates))
        self.tanh = tanh

    def before(self, host: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The layer's input, and attention to which that of the gated prompt is added."""
        x, attend = args
        return x, _Gated(attend, self, host)

    def extra_repr(self) -> str:
        """Sizes."""
        return f"{self.adaption_prompt.shape[0]} tokens × {self.adaption_prompt.shape[1]}"


class _Gated:
    """Attention plus gated attention to a layer's prompt.

    Args:
        attend: Attention to the documents.
        adaption: The prompt and gate.
        attention: The attention layer, whose projections give the prompt's keys and values.
    """

    def __init__(self, attend: Attend, adaption: AdaptionPrompt, attention: Any) -> None:
        self.attend = attend
        self.adaption = adaption
        self.attention = attention
        self.prefix_length = attend.prefix_length
        self.rotate = attend.rotate
        self.token_positions = attend.token_positions
        self.with_prefix = attend.with_prefix

    def __call__(self, layer: LayerAttention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """(T, N, H), (T, K, H), (T, K, J) -> (T, N, J)."""
        prompt = self.adaption.adaption_prompt.to(query.dtype)
        keys, values = self.attention.keys_and_values(prompt)
        # Queries are rotated and keys are not, as in the official code: the prompt has no position. All tokens see all
        # of the prompt, so it is one batch without a mask, (1, heads, rows, H).
        q, k, v = (rows.transpose(0, 1)[None] for rows in (self.attend.rotate(layer, query), keys, values))
        from_prompt = attention(q, k, v, scale=layer.scale, softcap=layer.softcap)[0].transpose(0, 1)

        gate: Tensor = self.adaption.adaption_gate
        if self.adaption.tanh:
            gate = gate.tanh()
        return self.attend(layer, query, key, value) + gate.to(query.dtype)[:, None] * from_prompt


class ScaleAndBias(AddedModule):
    """``s ⊙ (y + b)`` of a linear layer's output ``y``."""

    child = "scale_and_bias"

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def after(self, host: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """(..., out) to (..., out)."""
        # s b + s y in one pass over the output.
        return torch.addcmul((self.scale * self.bias).to(output.dtype), output, self.scale.to(output.dtype))

    def extra_repr(self) -> str:
        """Width."""
        return str(len(self.scale))


class LlamaAdapterConfig(AddedMethod):
    """LLaMA-Adapter: gated prompts in the upper layers."""

    default_lr: ClassVar[float | None] = 5e-3
    peft_type: ClassVar[str | None] = "ADAPTION_PROMPT"
    name: Literal["llama-adapter"] = Field("llama-adapter", description="The method.")
    adapter_len: int = Field(10, ge=1, description="Rows of each layer's prompt.")
    adapter_layers: int | None = Field(
        None, ge=1, description="Number of last layers with a prompt; all but the first two if omitted."
    )
    gate: Literal["per-head", "per-layer"] = Field(
        "per-head", description="Gates: one per head, or one per layer (the only form that PEFT can load)."
    )
    tanh: bool = Field(False, description="Apply tanh to the gate's parameter, as the official code does.")

    @property
    def about(self) -> str:
        """The method and the length of its prompts."""
        return f"{self.model_dump()['name']}, prompts of {self.adapter_len} rows"

    def add(self, model: nn.Module) -> None:
        """Add the prompts.

        Raises:
            UsageError: ``adapter_layers`` exceeds the model's layers, or the model is not one of lit-lora's decoders.
        """
        decoder_of(model)  # only lit-lora's decoders pass attention to their layers, which the prompts act on
        config: Any = model.config
        if not isinstance(model, CausalLM):
            raise UsageError(
                f"peft.name: {self.model_dump()['name']} needs a decoder of lit-lora's own, and model_type "
                f"{config.model_type!r} is one of transformers",
                hint="use lora or prefix",
            )
        attention = names_of(model).attention
        layers = [block.get_submodule(attention) for block in blocks(model).values()]
        chosen = max(len(layers) - 2, 1) if self.adapter_layers is None else self.adapter_layers
        if chosen > len(layers):
            raise UsageError(f"peft.adapter_layers: expected at most the model's {len(layers)} layers, got {chosen}")
        gates = config.num_attention_heads if self.gate == "per-head" else 1
        for layer in layers[len(layers) - chosen :]:
            AdaptionPrompt(self.adapter_len, config.hidden_size, gates, tanh=self.tanh).join(layer)

    @property
    def _known_to_peft(self) -> bool:
        """Whether PEFT has this form: version 1 with one gate per layer, without tanh."""
        return self.peft_type is not None and self.gate == "per-layer" and not self.tanh

    def peft_config(self, model: nn.Module) -> dict[str, Any]:
        """``adapter_config.json`` without the base model's name; in our own format for forms that PEFT lacks."""
        if not self._known_to_peft:
            return super().peft_config(model)
        prompts = [module for module in own_modules(model).values() if isinstance(module, AdaptionPrompt)]
        return {
            "peft_type": self.peft_type,
            "task_type": "CAUSAL_LM",
            "inference_mode": True,
            "target_modules": names_of(model).attention,
            "adapter_len": self.adapter_len,
            "adapter_layers": len(prompts),
        }

    def file_tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """Prompts and gates; in PEFT's format under the names of their attention layers, prompts as (1, K, D)."""
        tensors = super().file_tensors(model)
        if not self._known_to_peft:
            return tensors
        in_peft: dict[str, Tensor] = {}
        for name, value in tensors.items():
            peft_name = name.replace(f".{AdaptionPrompt.child}.", ".")
            in_peft[peft_name] = value[None] if name.endswith("adaption_prompt") else value
        return in_peft

    @classmethod
    def from_peft(cls, raw: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> LlamaAdapterConfig:
        """Settings of an adapter that PEFT wrote, which has one gate per layer.

        Raises:
            InputError: It needs an unsupported feature, or has no prompts.
        """
        refuse(raw, {"target_modules", "adapter_len", "adapter_layers"})
        prompts = [value for name, value in tensors.items() if name.endswith("adaption_prompt")]
        if not prompts:
            raise InputError(f"{WEIGHTS}: contains no adaption_prompt")
        return cls(adapter_len=prompts[0].shape[1], adapter_layers=len(prompts), gate="per-layer")


class LlamaAdapterV2Config(LlamaAdapterConfig):
    """LLaMA-Adapter V2: gated prompts, trained norms, and a bias and scale for every linear layer."""

    default_lr: ClassVar[float | None] = 1e-3
    peft_type: ClassVar[str | None] = None
    name: Literal["llama-adapter-v2"] = Field("llama-adapter-v2", description="The method.")  # type: ignore[assignment]

    def add(self, model: nn.Module) -> None:
        """Add the prompts, biases and scales, and let the norms train.

        Raises:
            UsageError: As for version 1, or another method has already put modules in.
        """
        if own_modules(model):
            raise UsageError("peft: llama-adapter-v2 adapts every linear layer and cannot follow another method")
        linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
        super().add(model)
        for linear in linears:
            ScaleAndBias(linear.out_features).join(linear)
        for name in norms(model):
            replace_module(model, name, TrainedCopy(model.get_submodule(name)))
