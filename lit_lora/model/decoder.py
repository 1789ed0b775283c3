"""The decoder. Parameters have the family's names, so checkpoints load and save without a mapping.

Modules look up their children by these names on every call, because methods put other modules in the children's places.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from lit_lora.model.attention.attend import Attend, LayerAttention
from lit_lora.model.attention.cached import CachedAttention
from lit_lora.model.attention.documents import Layout
from lit_lora.model.attention.packed import PackedAttention
from lit_lora.model.config import ModelConfig
from lit_lora.model.interface import Checkpointing
from lit_lora.model.kv_cache import KVCache
from lit_lora.model.layers import (
    MLP,
    AddRMSNorm,
    Linear,
    Projections,
    RMSNorm,
    ScaledEmbedding,
    add_part,
    checkpointed,
    recomputed,
)
from lit_lora.model.moe import MixtureOfExperts

__all__ = ["CausalLM", "Decoder", "DecoderLayer", "SelfAttention"]


class SelfAttention(nn.Module):
    """The projections around attention. The caller's ``attend`` computes the attention itself."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.layer = LayerAttention(
            index,
            window=config.window_of(index),
            scale=config.attention_scale,
            softcap=config.attn_logit_softcapping,
            rope=config.rope_of(index),
        )
        self.block = config.block
        self.head_dim = config.head_dim
        names = config.names
        width = config.hidden_size
        query_width = config.num_attention_heads * config.head_dim
        key_width = config.num_key_value_heads * config.head_dim
        bias = config.attention_bias
        out_bias = bias if config.attention_out_bias is None else config.attention_out_bias

        parts, sizes = (names.query, names.key, names.value), (query_width, key_width, key_width)
        self._projections = Projections(self, parts, width, sizes, bias=bias)
        self._out = add_part(self, names.attention_out, Linear(query_width, width, bias=out_bias))
        self._query_norm = self._add_norm(names.query_norm, query_width, config)
        self._key_norm = self._add_norm(names.key_norm, key_width, config)

    def forward(self, x: Tensor, attend: Attend) -> Tensor:
        """Attend among the tokens of ``x``, (T, D) to (T, D)."""
        query, key, value = self._projections(self, x)
        layer, value = self.layer, self._heads(value)
        if self.block.norm_after_rope:
            query, key = (attend.rotate(layer, self._heads(projected)) for projected in (query, key))
            layer = replace(layer, rope=None)  # already rotated
        query, key = self._normed(self._query_norm, query), self._normed(self._key_norm, key)
        context = attend(layer, query, key, value)  # (T, N, H)
        out: Tensor = getattr(self, self._out)(context.flatten(-2))
        return out

    def keys_and_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of ``x`` (T, D), each (T, K, H); the keys are not rotated."""
        _, key, value = self._projections(self, x)
        return self._normed(self._key_norm, key), self._heads(value)

    def _add_norm(self, name: str | None, width: int, config: ModelConfig) -> str | None:
        """Make a norm of queries or keys a child; returns what it is called, or ``None`` if there is none."""
        if name is None:
            return None
        spanned = width if self.block.query_key_norm == "width" else self.head_dim
        return add_part(self, name, RMSNorm(spanned, config))

    def _normed(self, norm: str | None, x: Tensor) -> Tensor:
        """Queries or keys, (T, heads · H) or (T, heads, H), normed if there is a norm, to (T, heads, H)."""
        if norm is None:
            return self._heads(x)
        over_width = self.block.query_key_norm == "width"
        normed: Tensor = getattr(self, norm)(x.flatten(1) if over_width else self._heads(x))
        return self._heads(normed)

    def _heads(self, projected: Tensor) -> Tensor:
        """(T, heads · H) to (T, heads, H)."""
        return projected.view(projected.shape[0], -1, self.head_dim)


class DecoderLayer(nn.Module):
    """Attention and MLP, each added to the residual stream, with a norm of its input, of its output, or both.

    The next norm does the addition, in one pass over memory. So a layer takes and returns two tensors: the stream, and
    the ``delta`` that is still to be added to it.
    """

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        names = config.names
        self._attention = add_part(self, names.attention, SelfAttention(config, index))
        self._mlp = add_part(self, names.mlp, MixtureOfExperts(config) if config.has_experts(index) else MLP(config))
        self._attention_norm = self._add_norm(names.attention_norm, AddRMSNorm, config)
        self._attention_post_norm = self._add_norm(names.attention_post_norm, RMSNorm, config)
        self._mlp_norm = self._add_norm(names.mlp_norm, AddRMSNorm, config)
        self._mlp_post_norm = self._add_norm(names.mlp_post_norm, RMSNorm, config)
        self.residual_multiplier = config.residual_multiplier
        self.checkpointing: Checkpointing = "none"

    def forward(self, x: Tensor, delta: Tensor | None, attend: Attend) -> tuple[Tensor, Tensor]:
        """Map stream and delta, each (T, D), to those after the layer. The first layer gets no delta."""
        if self.checkpointing == "full":
            return checkpointed(self._forward, x, delta, attend)
        return self._forward(x, delta, attend)

    def _forward(self, x: Tensor, delta: Tensor | None, attend: Attend) -> tuple[Tensor, Tensor]:
        attention, mlp = getattr(self, self._attention), getattr(self, self._mlp)
        if self.checkpointing == "selective":
            mlp = partial(checkpointed, mlp)

        def attended_to(normed: Tensor) -> Tensor:
            attended: Tensor = attention(normed, attend)  # not by keyword: hooks of added modules see positions only
            return attended

        x, attended = self._sublayer(attended_to, self._attention_norm, self._attention_post_norm, x, delta)
        return self._sublayer(mlp, self._mlp_norm, self._mlp_post_norm, x, attended)

    def _sublayer(
        self, call: Callable[[Tensor], Tensor], norm: str | None, post_norm: str | None, x: Tensor, delta: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Add ``delta`` to the stream; returns the stream and the output of attention or MLP for it, to be added."""
        if norm is None:
            x = x if delta is None else x + delta
            out = call(x)
        else:
            norm_module = getattr(self, norm)
            x, normed = norm_module(x, delta)
            with recomputed(normed, partial(_norm_again, norm_module, x)):
                out = call(normed)

        if post_norm is not None:
            out = getattr(self, post_norm)(out)
        if self.residual_multiplier != 1.0:
            out = out * self.residual_multiplier
        return x, out

    def _add_norm(self, name: str | None, kind: type[RMSNorm], config: ModelConfig) -> str | None:
        """Make a norm a child; returns what it is called, or ``None`` if the family has none."""
        return None if name is None else add_part(self, name, kind(config.hidden_size, config))


def _norm_again(norm: nn.Module, total: Tensor) -> Tensor:
    """The norm of ``total``, the sum that ``norm`` returned before: the same bits again."""
    normed: Tensor = norm(total)[1]
    return normed


class Decoder(nn.Module):
    """Embedding, layers and final norm."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        names = config.names
        layers = nn.ModuleList(DecoderLayer(config, index) for index in range(config.num_hidden_layers))
        embedding = ScaledEmbedding if config.block.scaled_embedding else nn.Embedding
        self._embedding = add_part(self, names.embedding, embedding(config.vocab_size, config.hidden_size))
        self._layers = add_part(self, names.layers, layers)
        self._norm = add_part(self, names.norm, AddRMSNorm(config.hidden_size, config))
        self.embedding_multiplier = config.embedding_multiplier
        self.prefix_length = 0
        """Positions before every document that are taken by an added module, such as a prefix."""

    @property
    def embedding(self) -> nn.Module:
        """The token embedding, or what a method put in its place."""
        embedding: nn.Module = getattr(self, self._embedding)
        return embedding

    @property
    def blocks(self) -> dict[str, nn.Module]:
        """The layers by their names within the decoder."""
        return {f"{self._layers}.{index}": layer for index, layer in getattr(self, self._layers).named_children()}

    def forward(self, x: Tensor, attend: Attend) -> Tensor:
        """Map embedded tokens (T, D) to normed hidden states (T, D)."""
        if self.embedding_multiplier != 1.0:
            x = x * self.embedding_multiplier
        delta: Tensor | None = None
        for layer in getattr(self, self._layers):
            x, delta = layer(x, delta, attend)
        normed: Tensor = getattr(self, self._norm)(x, delta)[1]
        return normed


class CausalLM(nn.Module):
    """A decoder with its head. If the config ties the two, the head's weight is the embedding's parameter."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.not_wrappable: frozenset[str] = frozenset()
        self._decoder = add_part(self, config.names.decoder, Decoder(config))
        self._head = add_part(self, config.names.head, Linear(config.hidden_size, config.vocab_size, bias=False))
        if config.tie_word_embeddings:
            self.tie_weights()

    @property
    def context(self) -> int:
        """The maximum length of a document, in tokens."""
        return self.config.max_position_embeddings - self.get_decoder().prefix_length

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding, or what a method put in its place."""
        return self.get_decoder().embedding

    def get_output_embeddings(self) -> nn.Module:
        """The head, or what a method put in its place."""
        head: nn.Module = getattr(self, self._head)
        return head

    def get_decoder(self) -> Decoder:
        """The module from the embedding to the final norm."""
        decoder: Decoder = getattr(self, self._decoder)
        return decoder

    def blocks(self) -> dict[str, nn.Module]:
        """The layers by name, first to last."""
        return {f"{self._decoder}.{name}": layer for name, layer in self.get_decoder().blocks.items()}

    def tie_weights(self) -> None:
        """Make the head's weight the embedding's parameter."""
        self.get_output_embeddings().weight = self.get_input_embeddings().weight

    def new_cache(self, batch_size: int, max_length: int, *, padding: Tensor | None = None) -> KVCache:
        """An empty cache; see :class:`lit_lora.model.LanguageModel`."""
        return KVCache(batch_size, max_length, device=next(self.parameters()).device, padding=padding)

    def checkpoint_activations(self, what: Checkpointing) -> None:
        """Trade time for memory in training; losses and gradients stay the same bits.

        ``selective`` recomputes the MLPs in the backward pass, ``full`` whole layers.
        """
        for layer in self.blocks().values():
            assert isinstance(layer, DecoderLayer)
            layer.checkpointing = what

    @property
    def recomputes(self) -> bool:
        """Whether activations are recomputed in the backward pass."""
        return any(layer.checkpointing != "none" for layer in self.blocks().values())

    def forward(
        self, input_ids: Tensor, *, lengths: Sequence[int] | None = None, cache: KVCache | None = None
    ) -> Tensor:
        """Logits of the token after each token, (B, T, V). Arguments as for :meth:`hidden_states`."""
        return self.logits(self.hidden_states(input_ids, lengths=lengths, cache=cache))

    def logits(self, hidden: Tensor) -> Tensor:
        """Map hidden states (..., D) to logits (..., V)."""
        logits: Tensor = self.get_output_embeddings()(hidden)
        if self.config.logits_scaling != 1.0:
            logits = logits / self.config.logits_scaling
        cap = self.config.final_logit_softcapping
        return logits if cap is None else cap * torch.tanh(logits / cap)

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
            lengths: With B = 1: the number of tokens of each document packed into the row, T in total. Documents do
                not see each other, and their positions restart. ``None`` if every row is one document.
            shared_prefix: With ``lengths``: the number of tokens that every document begins with. The row contains
                them once, at its beginning; ``lengths`` count them in every document.
            cache: Continue after the tokens in the cache; it grows by T in place.
            attend: Replaces ``lengths`` and ``shared_prefix``: an attention that was built from them.

        Returns:
            (B, T, D) in the dtype of the model.

        Raises:
            ValueError: The cache is too short, or ``lengths`` do not cover the row.
        """
        batch_size, tokens = input_ids.shape
        attention: Attend
        if cache is not None:
            if cache.length + tokens > cache.max_length:
                raise ValueError(f"{cache.length} + {tokens} tokens, the cache has room for {cache.max_length}")
            attention = CachedAttention(self.config, cache, batch_size, tokens)
        elif attend is not None:
            attention = attend
        else:
            lengths = list(lengths) if lengths is not None else [tokens] * batch_size
            packed_length = sum(lengths) - shared_prefix * (len(lengths) - 1)
            if packed_length != batch_size * tokens or min(lengths) < shared_prefix:
                raise ValueError(f"lengths sum to {packed_length}, the row has {batch_size * tokens} tokens")
            if shared_prefix and not self.config.rotates_alike(lengths):
                layout = Layout(lengths, shared_prefix)  # the prefix is not the same in all of them
                whole_rows = self.hidden_states(layout.spread(input_ids[0])[None], lengths=lengths)
                return layout.gather(whole_rows[0])[None]
            attention = PackedAttention(self.config, lengths, input_ids.device, shared_prefix=shared_prefix)

        # The decoder sees one flat row of tokens; only attention knows where documents and rows begin.
        embedded = self.get_input_embeddings()(input_ids.reshape(-1))
        hidden: Tensor = self.get_decoder()(embedded, attention)
        if cache is not None:
            cache.advance(tokens)
        return hidden.view(batch_size, tokens, -1)
