"""P-tuning: virtual tokens that a small network computes, among fixed tokens of a template.

::

    template  [3, "The answer to", 3]:   e_1 e_2 e_3 ─► encoder ─► p_1 p_2 p_3, then E(The answer to), then p_4 p_5 p_6

Source: Liu et al. 2021, "GPT Understands, Too", section 3.2 (a bidirectional LSTM and a network of two layers); the
encoder of three linear layers is PEFT's default. The network serves training only: its output is saved, and from then
on this is a prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn

from lit_lora.errors import UsageError
from lit_lora.peft.prompts.prompt import Prompt, PromptConfig, PromptMethod
from lit_lora.peft.prompts.virtual_tokens import embedding_of, only_rows, refuse

__all__ = ["EncodedPrompt", "PTuningConfig"]


class EncodedPrompt(Prompt):
    """Virtual tokens computed by an encoder, between fixed embeddings.

    Args:
        rows: (n, D): what the encoder reads at first.
        template: In order: so many virtual tokens, or the fixed (m, D) embeddings of a text.
        encoder: ``lstm`` or ``mlp``.
        hidden: Width of the encoder's middle, of each direction of the LSTM.
        layers: Of the LSTM.
    """

    def __init__(
        self, rows: Tensor, template: Sequence[int | Tensor], encoder: Literal["lstm", "mlp"], hidden: int, layers: int
    ) -> None:
        super().__init__(rows)
        width = rows.shape[1]
        self.parts = [part if isinstance(part, int) else len(part) for part in template]
        fixed = [part for part in template if isinstance(part, Tensor)]
        self.is_fixed = [isinstance(part, Tensor) for part in template]
        self.prefix_length = sum(self.parts)
        self.fixed: Tensor
        self.register_buffer("fixed", torch.cat([rows.new_empty(0, width), *fixed]).float(), persistent=False)
        self.lstm_head: nn.LSTM | None = None
        if encoder == "lstm":
            self.lstm_head = nn.LSTM(width, hidden, num_layers=layers, bidirectional=True, batch_first=True)
            middle: list[nn.Module] = [nn.Linear(2 * hidden, 2 * hidden), nn.ReLU(), nn.Linear(2 * hidden, width)]
        else:
            middle = [nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU()]
            middle += [nn.Linear(hidden, width)]
        self.mlp_head = nn.Sequential(*middle)

    def rows(self) -> Tensor:
        """(P, D) float32."""
        x = self.embedding if self.lstm_head is None else self.lstm_head(self.embedding[None])[0][0]
        sources = [self.mlp_head(x), self.fixed]
        taken, rows = [0, 0], []
        for part, fixed in zip(self.parts, self.is_fixed, strict=True):
            rows.append(sources[fixed][taken[fixed] : taken[fixed] + part])
            taken[fixed] += part
        return torch.cat(rows)


class PTuningConfig(PromptMethod):
    """P-tuning: virtual tokens computed by a small network, among fixed tokens."""

    default_lr: ClassVar[float | None] = 3e-4
    peft_type: ClassVar[str | None] = "P_TUNING"
    name: Literal["p-tuning"] = Field("p-tuning", description="The method.")
    template: list[int | str | list[int]] | None = Field(
        None,
        description="What stands before every document, such as [3, 'The answer to', 3]: numbers of virtual tokens, "
        "and texts (or lists of token ids) that stay fixed; num_virtual_tokens alone when omitted.",
    )
    encoder: Literal["mlp", "lstm"] = Field("lstm", description="The network: lstm (the paper's) or mlp.")
    encoder_hidden_size: int | None = Field(
        None, ge=1, description="Width of its middle; the model's width (mlp) or half of it (lstm) when omitted."
    )
    encoder_num_layers: int = Field(2, ge=1, description="lstm: its layers.")

    @field_validator("template", mode="before")
    @classmethod
    def _parts(cls, value: Any) -> Any:
        good = isinstance(value, list) and all(
            isinstance(part, str | list) or (type(part) is int and part > 0) for part in value
        )
        if value is None or (good and any(isinstance(part, int) for part in value)):
            return value
        raise ValueError(f"expected numbers of virtual tokens and texts, such as [3, 'Answer:', 3], got {value!r}")

    @model_validator(mode="after")
    def _used(self) -> PTuningConfig:
        given = self.model_fields_set
        if self.template is not None and "num_virtual_tokens" in given and self.num_virtual_tokens != self._virtual:
            raise ValueError(f"the template has {self._virtual} virtual tokens, num_virtual_tokens is another number")
        if self.encoder == "mlp" and self.encoder_num_layers != 2:
            raise ValueError("encoder_num_layers has no effect with encoder: mlp")
        return self

    @property
    def _virtual(self) -> int:
        if self.template is None:
            return self.num_virtual_tokens
        return sum(part for part in self.template if isinstance(part, int))

    @property
    def length(self) -> int:
        """All tokens of the template, fixed ones too."""
        return self._virtual + sum(len(part) for part in self.template or () if isinstance(part, list))

    def with_text(self, encode: Callable[[str], list[int]]) -> PTuningConfig:
        """These settings with all texts as token ids."""
        settings = super().with_text(encode)
        if settings.template is None:
            return settings
        parts = [encode(part) if isinstance(part, str) else part for part in settings.template]
        return settings.model_copy(update={"template": parts})

    def add(self, model: nn.Module) -> None:
        """Put the virtual tokens and their encoder before the decoder's input.

        Raises:
            UsageError: They leave no room in the context, or the model is not one of this package's decoders.
        """
        host = self._host(model)
        embedding = embedding_of(model)
        counted = self.model_copy(update={"num_virtual_tokens": self._virtual})
        rows = embedding[counted._start_ids(model).to(embedding.device)]
        template: list[int | Tensor] = []
        for part in self.template or [self._virtual]:
            if isinstance(part, str):
                raise UsageError("peft.template: has a text, but no tokenizer has turned it into ids")
            if isinstance(part, list) and not 0 <= min(part, default=-1) <= max(part, default=0) < len(embedding):
                raise UsageError(f"peft.template: expected token ids from 0 to {len(embedding) - 1}, got {part[:10]}")
            template.append(part if isinstance(part, int) else embedding[part])
        width = embedding.shape[1]
        hidden = self.encoder_hidden_size or (width if self.encoder == "mlp" else max(width // 2, 1))
        with torch.device(embedding.device):
            prompt = EncodedPrompt(rows, template, self.encoder, hidden, self.encoder_num_layers)
        prompt.join(host)

    def peft_config(self, model: nn.Module) -> dict[str, Any]:
        """``adapter_config.json``, but for the base model's name."""
        config = super().peft_config(model)
        return {
            **config,
            "encoder_hidden_size": config["token_dim"],
            "encoder_reparameterization_type": "MLP",
        }

    @classmethod
    def from_peft(cls, raw: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> PromptConfig:
        """A prompt: plain rows, whatever encoder they came from."""
        known = {"num_virtual_tokens", "token_dim", "num_transformer_submodules", "num_attention_heads", "num_layers"}
        known |= {"encoder_reparameterization_type", "encoder_hidden_size", "encoder_num_layers", "encoder_dropout"}
        refuse(raw, known)
        return PromptConfig(num_virtual_tokens=len(only_rows(tensors)), init="random")
