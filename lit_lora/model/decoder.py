"""The Llama-shaped decoder. Parameters have the family's names, so checkpoints load and save without a mapping."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor, nn

from lit_lora.model.attention.attend import Attend
from lit_lora.model.attention.cached import CachedAttention
from lit_lora.model.attention.packed import PackedAttention
from lit_lora.model.config import ModelConfig
from lit_lora.model.interface import Checkpointing
from lit_lora.model.kv_cache import KVCache
from lit_lora.model.layers import MLP, Linear, RMSNorm, add_part, checkpointed, project, recomputed

__all__ = ["CausalLM", "Decoder", "DecoderLayer", "SelfAttention"]


class SelfAttention(nn.Module):
    """Projections around attention; how tokens attend is the caller's ``attend``."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.index = index
        self.head_dim = config.head_dim
        queries = config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        width, bias, names = config.hidden_size, config.attention_bias, config.names
        self._query = add_part(self, names.query, Linear(width, queries, bias=bias))
        self._key = add_part(self, names.key, Linear(width, keys, bias=bias))
        self._value = add_part(self, names.value, Linear(width, keys, bias=bias))
        self._out = add_part(self, names.attention_out, Linear(queries, width, bias=bias))

    def forward(self, x: Tensor, attend: Attend) -> Tensor:
        """Attend among the tokens of ``x``, (T, D) to (T, D)."""
        layers = (getattr(self, name) for name in (self._query, self._key, self._value))
        query, key, value = (self._heads(projected) for projected in project(x, *layers))
        context = attend(self.index, query, key, value)  # (T, N, H)
        out: Tensor = getattr(self, self._out)(context.flatten(-2))
        return out

    def keys_and_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Those of ``x`` (T, D), each (T, K, H), the keys not rotated."""
        return self._heads(getattr(self, self._key)(x)), self._heads(getattr(self, self._value)(x))

    def _heads(self, projected: Tensor) -> Tensor:
        """(T, heads · H) to (T, heads, H)."""
        return projected.view(*projected.shape[:-1], -1, self.head_dim)


class DecoderLayer(nn.Module):
    """Attention and MLP, each on a normed input and added to the residual stream.

    The addition happens in the next norm, in one pass over memory: a layer takes the stream with what is still to be
    added to it, and returns the same.
    """

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        names, width, eps = config.names, config.hidden_size, config.rms_norm_eps
        self._attention = add_part(self, names.attention, SelfAttention(config, index))
        self._mlp = add_part(self, names.mlp, MLP(config))
        self._attention_norm = add_part(self, names.attention_norm, RMSNorm(width, eps))
        self._mlp_norm = add_part(self, names.mlp_norm, RMSNorm(width, eps))
        self.checkpointing: Checkpointing = "none"

    def forward(self, x: Tensor, delta: Tensor | None, attend: Attend) -> tuple[Tensor, Tensor]:
        """The residual stream (T, D) and what is to be added to it (T, D) or ``None``; both again after the layer."""
        if self.checkpointing == "full":
            return checkpointed(self._forward, x, delta, attend)
        return self._forward(x, delta, attend)

    def _forward(self, x: Tensor, delta: Tensor | None, attend: Attend) -> tuple[Tensor, Tensor]:
        attention, attention_norm = getattr(self, self._attention), getattr(self, self._attention_norm)
        mlp, mlp_norm = getattr(self, self._mlp), getattr(self, self._mlp_norm)
        x, normed = attention_norm(x, delta)
        with recomputed(normed, partial(_norm_again, attention_norm, x)):
            attended = attention(normed, attend)
        x, normed = mlp_norm(x, attended)
        if self.checkpointing == "selective":
            return x, checkpointed(mlp, normed)
        with recomputed(normed, partial(_norm_again, mlp_norm, x)):
            return x, mlp(normed)


def _norm_again(norm: nn.Module, total: Tensor) -> Tensor:
    """The norm of what ``norm`` returned as the sum, the same bits; a method may have put another module there."""
    normed: Tensor = norm(total)[1]
    return normed


class Decoder(nn.Module):
    """Embedding, layers and final norm."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        names, width = config.names, config.hidden_size
        self._embedding = add_part(self, names.embedding, nn.Embedding(config.vocab_size, width))
        layers = nn.ModuleList(DecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self._layers = add_part(self, names.layers, layers)
        self._norm = add_part(self, names.norm, RMSNorm(width, config.rms_norm_eps))
        self.prefix_length = 0
        """Positions before every document that something added to the model takes up."""

    @property
    def embedding(self) -> nn.Module:
        """The token embedding, or what a method put in its place."""
        found: nn.Module = getattr(self, self._embedding)
        return found

    @property
    def blocks(self) -> dict[str, nn.Module]:
        """The layers by their names here."""
        return {f"{self._layers}.{index}": layer for index, layer in getattr(self, self._layers).named_children()}

    def forward(self, x: Tensor, attend: Attend) -> Tensor:
        """Embedded tokens (T, D) to (T, D)."""
        delta: Tensor | None = None
        for layer in getattr(self, self._layers):
            x, delta = layer(x, delta, attend)
        _, normed = getattr(self, self._norm)(x, delta)
        out: Tensor = normed
        return out


class CausalLM(nn.Module):
    """A decoder with its head, whose weight is the embedding's parameter where the two are tied."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self._decoder = add_part(self, config.names.decoder, Decoder(config))
        self._head = add_part(self, config.names.head, Linear(config.hidden_size, config.vocab_size, bias=False))
        if config.tie_word_embeddings:
            self.tie_weights()

    @property
    def context(self) -> int:
        """The longest document, in tokens."""
        return self.config.max_position_embeddings - self.get_decoder().prefix_length

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding, or what a method put in its place."""
        return self.get_decoder().embedding

    def get_output_embeddings(self) -> nn.Module:
        """The head, or what a method put in its place."""
        found: nn.Module = getattr(self, self._head)
        return found

    def get_decoder(self) -> Decoder:
        """What runs from embedded tokens to the final norm."""
        found: Decoder = getattr(self, self._decoder)
        return found

    def blocks(self) -> dict[str, nn.Module]:
        """The layers by name."""
        return {f"{self._decoder}.{name}": layer for name, layer in self.get_decoder().blocks.items()}

    def tie_weights(self) -> None:
        """Make the head's weight the embedding's parameter."""
        self.get_output_embeddings().weight = self.get_input_embeddings().weight

    def checkpoint_activations(self, what: Checkpointing) -> None:
        """Trade time for memory in training; losses and gradients stay the same bits.

        Of what a layer keeps for the backward, ``selective`` drops the MLP's half, ``full`` all but the layer's input.
        """
        for layer in self.blocks().values():
            assert isinstance(layer, DecoderLayer)
            layer.checkpointing = what

    @property
    def recomputes(self) -> bool:
        """Whether activations are computed again in the backward."""
        return any(layer.checkpointing != "none" for layer in self.blocks().values())

    def forward(
        self, input_ids: Tensor, *, lengths: Sequence[int] | None = None, cache: KVCache | None = None
    ) -> Tensor:
        """Logits of the next token after every token, (B, T, V). The arguments are those of :meth:`hidden_states`."""
        return self.logits(self.hidden_states(input_ids, lengths=lengths, cache=cache))

    def logits(self, hidden: Tensor) -> Tensor:
        """Those of hidden states, (..., D) to (..., V)."""
        logits: Tensor = self.get_output_embeddings()(hidden)
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
        embedded = self.get_input_embeddings()(input_ids.reshape(-1))
        hidden: Tensor = self.get_decoder()(embedded, how)
        if cache is not None:
            cache.advance(tokens)
        return hidden.view(batch_size, tokens, -1)
