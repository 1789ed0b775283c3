"""The Llama-shaped decoder. Parameter names are Hugging Face's, so checkpoints load and save without a mapping."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Literal

from torch import Tensor, nn

from lit_lora.model.attention.attend import Attend
from lit_lora.model.attention.cached import CachedAttention
from lit_lora.model.attention.packed import PackedAttention
from lit_lora.model.config import ModelConfig
from lit_lora.model.kv_cache import KVCache
from lit_lora.model.layers import MLP, Linear, RMSNorm, checkpointed, project, recomputed

__all__ = ["CausalLM", "Checkpointing", "Decoder", "DecoderLayer", "SelfAttention"]

Checkpointing = Literal["none", "selective", "full"]
"""What is computed again in the backward instead of being kept: nothing, the MLPs' inner states, or whole layers."""


class SelfAttention(nn.Module):
    """Projections around attention; how tokens attend is the caller's ``attend``."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.index = index
        self.head_dim = config.head_dim
        queries = config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        bias = config.attention_bias
        self.q_proj = Linear(config.hidden_size, queries, bias=bias)
        self.k_proj = Linear(config.hidden_size, keys, bias=bias)
        self.v_proj = Linear(config.hidden_size, keys, bias=bias)
        self.o_proj = Linear(queries, config.hidden_size, bias=bias)

    def forward(self, x: Tensor, attend: Attend) -> Tensor:
        """Attend among the tokens of ``x``, (T, D) to (T, D)."""
        query, key, value = (
            projected.view(*projected.shape[:-1], -1, self.head_dim)  # (T, heads, H)
            for projected in project(x, self.q_proj, self.k_proj, self.v_proj)
        )
        context = attend(self.index, query, key, value)  # (T, N, H)
        out: Tensor = self.o_proj(context.flatten(-2))
        return out


class DecoderLayer(nn.Module):
    """Attention and MLP, each on a normed input and added to the residual stream.

    The addition happens in the next norm, in one pass over memory: a layer takes the stream with what is still to be
    added to it, and returns the same.
    """

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.self_attn = SelfAttention(config, index)
        self.mlp = MLP(config.hidden_size, config.intermediate_size, config.mlp_bias)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.checkpointing: Checkpointing = "none"

    def forward(self, x: Tensor, delta: Tensor | None, attend: Attend) -> tuple[Tensor, Tensor]:
        """The residual stream (T, D) and what is to be added to it (T, D) or ``None``; both again after the layer."""
        if self.checkpointing == "full":
            return checkpointed(self._forward, x, delta, attend)
        return self._forward(x, delta, attend)

    def _forward(self, x: Tensor, delta: Tensor | None, attend: Attend) -> tuple[Tensor, Tensor]:
        x, normed = self.input_layernorm(x, delta)
        with recomputed(normed, partial(_norm_again, self.input_layernorm, x)):
            attended = self.self_attn(normed, attend)
        x, normed = self.post_attention_layernorm(x, attended)
        if self.checkpointing == "selective":
            return x, checkpointed(self.mlp, normed)
        with recomputed(normed, partial(_norm_again, self.post_attention_layernorm, x)):
            return x, self.mlp(normed)


def _norm_again(norm: nn.Module, total: Tensor) -> Tensor:
    """The norm of what ``norm`` returned as the sum, the same bits; a method may have put another module there."""
    normed: Tensor = norm(total)[1]
    return normed


class Decoder(nn.Module):
    """Embedding, layers and final norm."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.prefix_length = 0
        """Positions before every document that something added to the model takes up."""

    def forward(self, x: Tensor, attend: Attend) -> Tensor:
        """Embedded tokens (T, D) to (T, D)."""
        delta: Tensor | None = None
        for layer in self.layers:
            x, delta = layer(x, delta, attend)
        _, normed = self.norm(x, delta)
        out: Tensor = normed
        return out


class CausalLM(nn.Module):
    """A decoder with its head. ``lm_head.weight`` is the embedding's parameter where the two are tied."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.tie_weights()

    @property
    def context(self) -> int:
        """The longest document, in tokens."""
        return self.config.max_position_embeddings - self.model.prefix_length

    def tie_weights(self) -> None:
        """Make the head's weight the embedding's parameter."""
        self.lm_head.weight = self.model.embed_tokens.weight

    def checkpoint_activations(self, what: Checkpointing) -> None:
        """Trade time for memory in training; losses and gradients stay the same bits.

        Of what a layer keeps for the backward, ``selective`` drops the MLP's half, ``full`` all but the layer's input.
        """
        for layer in self.model.layers:
            assert isinstance(layer, DecoderLayer)
            layer.checkpointing = what

    @property
    def recomputes(self) -> bool:
        """Whether activations are computed again in the backward."""
        return any(layer.checkpointing != "none" for layer in self.model.layers)

    def forward(
        self, input_ids: Tensor, *, lengths: Sequence[int] | None = None, cache: KVCache | None = None
    ) -> Tensor:
        """Logits of the next token after every token, (B, T, V). The arguments are those of :meth:`hidden_states`."""
        logits: Tensor = self.lm_head(self.hidden_states(input_ids, lengths=lengths, cache=cache))
        return logits

    def hidden_states(
        self,
        input_ids: Tensor,
        *,
        lengths: Sequence[int] | None = None,
        shared_prefix: int = 0,
        cache: KVCache | None = None,
        attend: PackedAttention | None = None,
    ) -> Tensor:
        """Run the decoder up to its final norm.

        Args:
            input_ids: (B, T) int64.
            lengths: With B = 1: tokens of each document packed into the row, which do not see each other and whose
                positions restart; they sum to T. ``None``: every row is one document.
            shared_prefix: With ``lengths``: the row begins with this many tokens, which every document begins with, and
                continues with the rest of each document. ``lengths`` count them in every document.
            cache: Continue after the tokens in the cache; it grows by T in place.
            attend: In the place of ``lengths`` and ``shared_prefix``: what was made of them before.

        Returns:
            (B, T, D) in the dtype of the model.

        Raises:
            ValueError: The cache has no room, or ``lengths`` do not cover the row.
        """
        batch_size, tokens = input_ids.shape
        how: Attend
        if cache is not None:
            if cache.length + tokens > cache.max_length:
                raise ValueError(f"{cache.length} + {tokens} tokens, the cache has room for {cache.max_length}")
            how = CachedAttention(self.config, cache, batch_size, tokens)
        elif attend is not None:
            how = attend
        else:
            lengths = list(lengths) if lengths is not None else [tokens] * batch_size
            given = sum(lengths) - shared_prefix * (len(lengths) - 1)
            if given != batch_size * tokens or min(lengths) < shared_prefix:
                raise ValueError(f"lengths sum to {given}, the row has {batch_size * tokens} tokens")
            how = PackedAttention(self.config, lengths, input_ids.device, shared_prefix=shared_prefix)
        hidden: Tensor = self.model(self.model.embed_tokens(input_ids.reshape(-1)), how)
        if cache is not None:
            cache.advance(tokens)
        return hidden.view(batch_size, tokens, -1)
