"""P-tuning: virtual tokens computed by a small network, among the fixed tokens of a template.

::

    template [3, "The answer to", 3]:   e_1 … e_6 ─► encoder ─► p_1 … p_6
    prefix                          :   p_1 p_2 p_3  E(The answer to)  p_4 p_5 p_6

Source: Liu et al. 2021, "GPT Understands, Too", section 3.2 (a bidirectional LSTM and two linear layers); the encoder
of three linear layers is PEFT's default. The network is only used in training: its output is saved, as a prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn

from lit_lora.errors import UsageError
from lit_lora.peft.prompts.prompt import Prompt, PromptConfig, PromptMethod
from lit_lora.peft.prompts.virtual_tokens import embedded, embedding_of, only_rows, refuse

__all__ = ["EncodedPrompt", "PTuningConfig"]


class EncodedPrompt(Prompt):
    """Virtual tokens computed by an encoder, among fixed embeddings.

    Args:
        rows: (n, D), initial values of the encoder's trained inputs.
        template: In order, numbers of virtual tokens, whose sum is n, and fixed embeddings (m, D) of texts.
        encoder: ``lstm`` or ``mlp``.
        hidden: Hidden size of the encoder; of an LSTM, in each direction.
        layers: Number of layers of an LSTM.
    """

    def __init__(
        self, rows: Tensor, template: Sequence[int | Tensor], encoder: Literal["lstm", "mlp"], hidden: int, layers: int
    ) -> None:
        super().__init__(rows)
        width = rows.shape[1]
        self.lengths = [part if isinstance(part, int) else len(part) for part in template]
        self.is_fixed = [isinstance(part, Tensor) for part in template]
        self.prefix_length = sum(self.lengths)
        texts = [part for part in template if isinstance(part, Tensor)]
        self.fixed: Tensor
        # Starts with no rows, for torch.cat needs a tensor even without texts.
        self.register_buffer("fixed", torch.cat([rows.new_empty(0, width), *texts]).float(), persistent=False)

        self.lstm_head: nn.LSTM | None = None
        if encoder == "lstm":
            self.lstm_head = nn.LSTM(width, hidden, num_layers=layers, bidirectional=True, batch_first=True)
            self.mlp_head = nn.Sequential(
                nn.Linear(2 * hidden, 2 * hidden),
                nn.ReLU(),
                nn.Linear(2 * hidden, width),
            )
        else:
            self.mlp_head = nn.Sequential(
                nn.Linear(width, hidden),
                nn.ReLU(),
                nn.Linear(hidden, hidden),
                nn.ReLU(),
                nn.Linear(hidden, width),
            )

    def rows(self) -> Tensor:
        """The embeddings of the whole template in order, (P, D) float32."""
        x = self.embedding
        if self.lstm_head is not None:
            outputs, _ = self.lstm_head(x[None])  # a batch of one
            x = outputs[0]
        virtual = self.mlp_head(x)

        rows = []
        virtual_taken = fixed_taken = 0
        for length, is_fixed in zip(self.lengths, self.is_fixed, strict=True):
            if is_fixed:
                rows.append(self.fixed[fixed_taken : fixed_taken + length])
                fixed_taken += length
            else:
                rows.append(virtual[virtual_taken : virtual_taken + length])
                virtual_taken += length
        return torch.cat(rows)


class PTuningConfig(PromptMethod):
    """P-tuning: virtual tokens computed by a small network, among fixed tokens."""

    default_lr: ClassVar[float | None] = 3e-4
    peft_type: ClassVar[str | None] = "P_TUNING"
    name: Literal["p-tuning"] = Field("p-tuning", description="The method.")
    template: list[int | str | list[int]] | None = Field(
        None,
        description="Tokens before every document, such as [3, 'The answer to', 3]: numbers of virtual tokens, and "
        "texts (or lists of token ids) that stay fixed; num_virtual_tokens alone if omitted.",
    )
    encoder: Literal["mlp", "lstm"] = Field(
        "lstm", description="Network that computes them: lstm (the paper's) or mlp."
    )
    encoder_hidden_size: int | None = Field(
        None, ge=1, description="Hidden size of the network; the model's width (mlp) or half of it (lstm) if omitted."
    )
    encoder_num_layers: int = Field(2, ge=1, description="Number of layers of an lstm.")

    @field_validator("template", mode="before")
    @classmethod
    def _check_template(cls, value: Any) -> Any:
        if value is None:
            return value
        parts = value if isinstance(value, list) else []
        counts = [part for part in parts if type(part) is int and part > 0]  # by type: true is an int too
        texts = [part for part in parts if isinstance(part, str | list)]
        if not counts or len(counts) + len(texts) < len(parts):
            raise ValueError(f"expected numbers of virtual tokens and texts, such as [3, 'Answer:', 3], got {value!r}")
        return value

    @model_validator(mode="after")
    def _check_used(self) -> PTuningConfig:
        number_given = "num_virtual_tokens" in self.model_fields_set
        if self.template is not None and number_given and self.num_virtual_tokens != self._virtual:
            raise ValueError(
                f"the template has {self._virtual} virtual tokens, but num_virtual_tokens is {self.num_virtual_tokens}"
            )
        if self.encoder == "mlp" and self.encoder_num_layers != 2:
            raise ValueError("encoder_num_layers has no effect with encoder: mlp")
        return self

    @property
    def _virtual(self) -> int:
        """Number of virtual tokens, without those of texts."""
        if self.template is None:
            return self.num_virtual_tokens
        return sum(part for part in self.template if isinstance(part, int))

    @property
    def length(self) -> int:
        """Number of all tokens of the template, fixed ones included."""
        fixed = sum(len(part) for part in self.template or [] if isinstance(part, list))
        return self._virtual + fixed

    def with_text(self, encode: Callable[[str], list[int]]) -> PTuningConfig:
        """These settings with all texts turned into token ids."""
        settings = super().with_text(encode)
        if settings.template is None:
            return settings
        parts = [encode(part) if isinstance(part, str) else part for part in settings.template]
        return settings.model_copy(update={"template": parts})

    def add(self, model: nn.Module) -> None:
        """Put the virtual tokens and their encoder before the decoder's input.

        Raises:
            UsageError: They leave no room in the context, the model is not one of lit-lora's decoders, or the template
                has texts or ids that are not the model's.
        """
        host = self._host(model)
        embedding = embedding_of(model)
        # The encoder reads one row per virtual token, none for the fixed ones.
        sized = self.model_copy(update={"num_virtual_tokens": self._virtual})
        rows = embedded(model, sized._start_ids(model))
        template = self._embedded_template(model)

        width = embedding.shape[1]
        default_hidden = width if self.encoder == "mlp" else max(width // 2, 1)
        hidden = self.encoder_hidden_size or default_hidden
        with torch.device(embedding.device):
            prompt = EncodedPrompt(rows, template, self.encoder, hidden, self.encoder_num_layers)
        prompt.join(host)

    def _embedded_template(self, model: nn.Module) -> list[int | Tensor]:
        """The template with token ids replaced by their embeddings, (m, D) each.

        Raises:
            UsageError: It has texts, or ids that the model does not have.
        """
        vocabulary = len(embedding_of(model))
        parts: list[int | Tensor] = []
        for part in self.template or [self._virtual]:
            if isinstance(part, int):
                parts.append(part)
                continue
            if isinstance(part, str):
                raise UsageError("peft.template: expected token ids, got text; call with_text first")
            if not part or min(part) < 0 or max(part) >= vocabulary:
                raise UsageError(f"peft.template: expected token ids from 0 to {vocabulary - 1}, got {part[:10]}")
            parts.append(embedded(model, torch.tensor(part)))
        return parts

    def peft_config(self, model: nn.Module) -> dict[str, Any]:
        """``adapter_config.json`` without the base model's name."""
        config = super().peft_config(model)
        # PEFT requires the encoder's size, though its file has the rows only.
        return {
            **config,
            "encoder_hidden_size": config["token_dim"],
            "encoder_reparameterization_type": "MLP",
        }

    @classmethod
    def from_peft(cls, raw: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> PromptConfig:
        """A prompt: the file has the encoder's output only."""
        sizes = {"num_virtual_tokens", "token_dim", "num_transformer_submodules", "num_attention_heads", "num_layers"}
        encoder = {"encoder_reparameterization_type", "encoder_hidden_size", "encoder_num_layers", "encoder_dropout"}
        refuse(raw, sizes | encoder)
        return PromptConfig(num_virtual_tokens=len(only_rows(tensors)), init="random")
