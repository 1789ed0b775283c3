"""LLaMA-Adapter: prompts in the upper layers that attention reads apart, behind a gate that starts at zero.

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
from torch.nn import functional as F

from lit_lora.errors import InputError, UsageError
from lit_lora.peft.adapters.bottleneck import norms
from lit_lora.peft.core.adapter_method import WEIGHTS
from lit_lora.peft.core.added import AddedMethod, AddedModule, Attend, blocks, decoder_of
from lit_lora.peft.core.module_names import names_of
from lit_lora.peft.core.modules import own_modules, replace_module
from lit_lora.peft.core.modules_to_save import TrainedCopy
from lit_lora.peft.prompts.virtual_tokens import refuse

__all__ = ["AdaptionPrompt", "LlamaAdapterConfig", "LlamaAdapterV2Config", "ScaleAndBias"]


class AdaptionPrompt(AddedModule):
    """A prompt of one attention layer, and its gate.

    Args:
        length: Rows of the prompt, K.
        width: D.
        gates: One for each query head, or one.
        tanh: The gate is tanh of its parameter.
    """

    child = "adaption"

    def __init__(self, length: int, width: int, gates: int, *, tanh: bool) -> None:
        super().__init__()
        self.adaption_prompt = nn.Parameter(torch.randn(length, width))
        self.adaption_gate = nn.Parameter(torch.zeros(gates))
        self.tanh = tanh

    def before(self, host: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The layer's attention, with the gated prompt beside it."""
        x, attend = args
        return x, _Gated(attend, self, host)

    def extra_repr(self) -> str:
        """Sizes."""
        return f"{self.adaption_prompt.shape[0]} tokens × {self.adaption_prompt.shape[1]}"


class _Gated:
    """Attention plus gated attention to a layer's prompt."""

    def __init__(self, attend: Attend, adaption: AdaptionPrompt, layer: Any) -> None:
        self.attend, self.adaption, self.layer, self.prefix_length = attend, adaption, layer, attend.prefix_length
        self.rotate, self.with_prefix = attend.rotate, attend.with_prefix

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """(T, N, H), (T, K, H), (T, K, H) -> (T, N, H)."""
        own = self.adaption
        keys, values = self.layer.keys_and_values(own.adaption_prompt.to(query.dtype))
        q, k, v = (part.transpose(0, 1)[None] for part in (self.attend.rotate(query), keys, values))
        grouped = query.shape[1] != key.shape[1]
        read = F.scaled_dot_product_attention(q, k, v, enable_gqa=grouped)[0].transpose(0, 1)
        gate = own.adaption_gate.tanh() if own.tanh else own.adaption_gate
        return self.attend(layer, query, key, value) + gate.to(query.dtype)[:, None] * read


class ScaleAndBias(AddedModule):
    """``s ⊙ (y + b)`` of a linear layer's output ``y``."""

    child = "scale_and_bias"

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def after(self, host: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """(..., out) to (..., out)."""
        return torch.addcmul((self.scale * self.bias).to(output.dtype), output, self.scale.to(output.dtype))

    def extra_repr(self) -> str:
        """Width."""
        return str(len(self.scale))


class LlamaAdapterConfig(AddedMethod):
    """LLaMA-Adapter: gated prompts in the upper layers."""

    default_lr: ClassVar[float | None] = 5e-3
    peft_type: ClassVar[str | None] = "ADAPTION_PROMPT"
    name: Literal["llama-adapter"] = Field("llama-adapter", description="The method.")
    adapter_len: int = Field(10, ge=1, description="Rows of every layer's prompt.")
    adapter_layers: int | None = Field(
        None, ge=1, description="Layers with a prompt, the last ones; all but the first two when omitted."
    )
    gate: Literal["per-head", "per-layer"] = Field(
        "per-head", description="Gates of a layer: one for each head, or one (the only form that PEFT opens)."
    )
    tanh: bool = Field(False, description="The gate is tanh of its parameter, as in the official code.")

    @property
    def about(self) -> str:
        """Name and length."""
        return f"{self.model_dump()['name']}, prompts of {self.adapter_len} rows"

    def add(self, model: nn.Module) -> None:
        """Add the prompts.

        Raises:
            UsageError: More layers than there are, or the model is not one of this package's decoders.
        """
        decoder_of(model)
        config: Any = model.config
        attention = names_of(model).attention
        layers = [block.get_submodule(attention) for block in blocks(model).values()]
        chosen = max(len(layers) - 2, 1) if self.adapter_layers is None else self.adapter_layers
        if chosen > len(layers):
            raise UsageError(f"peft.adapter_layers: {chosen}, the model has {len(layers)} layers")
        gates = config.num_attention_heads if self.gate == "per-head" else 1
        for layer in layers[len(layers) - chosen :]:
            AdaptionPrompt(self.adapter_len, config.hidden_size, gates, tanh=self.tanh).join(layer)

    @property
    def _known_to_peft(self) -> bool:
        """Whether PEFT has this form: one gate per layer, without tanh, and nothing else."""
        return self.peft_type is not None and self.gate == "per-layer" and not self.tanh

    def peft_config(self, model: nn.Module) -> dict[str, Any]:
        """``adapter_config.json``, but for the base model's name; in a form of ours where PEFT has none."""
        if not self._known_to_peft:
            return super().peft_config(model)
        found = own_modules(model).values()
        return {
            "peft_type": self.peft_type,
            "task_type": "CAUSAL_LM",
            "inference_mode": True,
            "target_modules": names_of(model).attention,
            "adapter_len": self.adapter_len,
            "adapter_layers": sum(isinstance(module, AdaptionPrompt) for module in found),
        }

    def file_tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """Prompts and gates; in PEFT's form under the names of the layers that they are in, prompts as (1, K, D)."""
        tensors = super().file_tensors(model)
        if not self._known_to_peft:
            return tensors
        named = {name.replace(f".{AdaptionPrompt.child}.", "."): value for name, value in tensors.items()}
        return {n: value[None] if n.endswith("adaption_prompt") else value for n, value in named.items()}

    @classmethod
    def from_peft(cls, raw: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> LlamaAdapterConfig:
        """One gate a layer.

        Raises:
            InputError: It asks for something else.
        """
        refuse(raw, {"target_modules", "adapter_len", "adapter_layers"})
        prompts = [value for name, value in tensors.items() if name.endswith("adaption_prompt")]
        if not prompts:
            raise InputError(f"{WEIGHTS}: holds no adaption_prompt")
        return cls(adapter_len=prompts[0].shape[1], adapter_layers=len(prompts), gate="per-layer")


class LlamaAdapterV2Config(LlamaAdapterConfig):
    """LLaMA-Adapter V2: gated prompts, trained norms, a bias and a scale of every linear layer."""

    default_lr: ClassVar[float | None] = 1e-3
    peft_type: ClassVar[str | None] = None
    name: Literal["llama-adapter-v2"] = Field("llama-adapter-v2", description="The method.")  # type: ignore[assignment]

    def add(self, model: nn.Module) -> None:
        """Add the prompts, the biases and the scales, and let the norms train.

        Raises:
            UsageError: As version 1, or a linear layer is adapted in another way already.
        """
        if own_modules(model):
            raise UsageError("peft: a bias and scale of every linear layer do not go together with another method")
        linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
        super().add(model)
        for linear in linears:
            ScaleAndBias(linear.out_features).join(linear)
        for name in norms(model):
            replace_module(model, name, TrainedCopy(model.get_submodule(name)))
