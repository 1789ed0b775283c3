"""Prefix tuning: trained keys and values before those of every document, in every layer.

::

    layer l:   keys   = [P_K(l) ; k_1 … k_T]      attention is unchanged; token i has position P + i
               values = [P_V(l) ; v_1 … v_T]

Source: Li and Liang 2021, "Prefix-Tuning: Optimizing Continuous Prompts for Generation", section 4. With
``prefix_projection``, a network computes the keys and values in training (section 4.3), and its final output is saved.
The keys are those after rotation, as in a cache.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from lit_lora.errors import UsageError
from lit_lora.model.attention.attend import Attend, LayerAttention
from lit_lora.peft.core.added import AddedModule, decoder_of
from lit_lora.peft.core.modules import own_modules
from lit_lora.peft.prompts.virtual_tokens import EMBEDDINGS, VirtualTokens, only_rows, refuse

__all__ = ["Prefix", "PrefixConfig"]


class Prefix(AddedModule):
    """The keys and values of the virtual tokens for all layers.

    Args:
        length: Number of virtual tokens, P.
        shape: (layers, 2, K, H).
        width: D, of the embeddings that the network reads.
        hidden: Hidden size of the network; ``None`` for no network: the keys and values are the parameters.
    """

    child = "prefix"

    def __init__(self, length: int, shape: tuple[int, int, int, int], width: int, hidden: int | None) -> None:
        super().__init__()
        self.prefix_length = length
        self.shape = shape
        row_size = torch.Size(shape).numel()
        self.embedding = nn.Parameter(torch.randn(length, width if hidden else row_size))
        self.transform: nn.Sequential | None = None
        if hidden:
            self.transform = nn.Sequential(nn.Linear(width, hidden), nn.Tanh(), nn.Linear(hidden, row_size))

    def rows(self) -> Tensor:
        """The keys and values, (P, layers · 2 · K · H) float32."""
        if self.transform is None:
            return self.embedding
        rows: Tensor = self.transform(self.embedding)
        return rows

    @torch.no_grad()
    def start(self, rows: Tensor) -> None:
        """Change the parameters so that :meth:`rows` returns these, (P, layers · 2 · K · H).

        With a network, only its last layer is set, to the smallest weights with this output for the P embeddings.
        """
        if self.transform is None:
            self.embedding.copy_(rows)
            return
        last = self.transform[-1]
        assert isinstance(last, nn.Linear)
        hidden: Tensor = self.transform[:-1](self.embedding)  # (P, hidden)
        # hidden @ weight.T + bias = rows: linear equations, in which the bias is the weight of one more input, 1. There
        # are fewer of them than unknowns, and the pseudoinverse gives the smallest solution.
        inputs = torch.cat([hidden, hidden.new_ones(len(hidden), 1)], dim=1).double()
        solution = torch.linalg.pinv(inputs) @ rows.to(inputs)
        last.weight.copy_(solution[:-1].T)
        last.bias.copy_(solution[-1])

    def before(self, host: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The decoder's input, and its attention after the prefix."""
        x, attend = args
        return x, _Prefixed(attend, self, x.dtype)

    def extra_repr(self) -> str:
        """Sizes."""
        return f"{self.prefix_length} tokens × {self.shape[0]} layers"


class _Prefixed:
    """Attention after a prefix of given keys and values.

    The attention inside expects rows for the prefix's tokens too, where a prompt has its activations. Here they exist
    only as keys and values, so their queries are zeros, and their outputs are dropped.
    """

    prefix_length = 0  # it adds no rows to the decoder's input

    def __init__(self, attend: Attend, prefix: Prefix, dtype: torch.dtype) -> None:
        self.attend = attend.with_prefix(prefix.prefix_length, rotated=True)
        self.keys_values: Tensor | None = None  # (P, layers, 2, K, H)
        if self.attend.prefix_length:  # 0 once a cache contains them
            self.keys_values = prefix.rows().to(dtype).view(prefix.prefix_length, *prefix.shape)

    def __call__(self, layer: LayerAttention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """(T, N, H), (T, K, H), (T, K, H) -> (T, N, H)."""
        if self.keys_values is None:
            return self.attend(layer, query, key, value)
        prefix_keys, prefix_values = self.keys_values[:, layer.index].unbind(1)
        if not prefix_keys.shape[1:] == key.shape[1:] == value.shape[1:]:
            raise UsageError(
                f"peft.name: prefix needs keys and values of one size, but layer {layer.index} has keys of "
                f"{'×'.join(map(str, key.shape[1:]))} and values of {'×'.join(map(str, value.shape[1:]))}",
                hint="use lora or prompt",
            )
        queries = self._after_zeros(query)
        keys = torch.cat([prefix_keys, key])
        values = torch.cat([prefix_values, value])
        return self.attend(layer, queries, keys, values)[self.attend.prefix_length :]

    def rotate(self, layer: LayerAttention, x: Tensor) -> Tensor:
        """(T, heads, H), rotated by the positions of its rows."""
        return self.attend.rotate(layer, self._after_zeros(x))[self.attend.prefix_length :]

    def token_positions(self) -> Tensor:
        """(T,) int64, the position of each row in its document, after the prefix."""
        return self.attend.token_positions()[self.attend.prefix_length :]

    def with_prefix(self, prefix_length: int, *, rotated: bool = False) -> Attend:
        """Raises: the attention inside already has a prefix."""
        return self.attend.with_prefix(prefix_length, rotated=rotated)

    def _after_zeros(self, x: Tensor) -> Tensor:
        return torch.cat([x.new_zeros(self.attend.prefix_length, *x.shape[1:]), x])


class PrefixConfig(VirtualTokens):
    """Prefix tuning: trained keys and values before every document, in every layer."""

    peft_type: ClassVar[str | None] = "PREFIX_TUNING"
    name: Literal["prefix"] = Field("prefix", description="The method.")
    init: Literal["tokens", "random", "zeros"] = Field(
        "tokens",
        description="Initial keys and values: tokens (the model's own for init_text or for random tokens), random or "
        "zeros; the last two learn much more slowly.",
    )
    prefix_projection: bool = Field(
        False, description="Train a network that computes keys and values; only its output is saved."
    )
    encoder_hidden_size: int = Field(512, ge=1, description="Hidden size of that network.")

    @property
    def lr(self) -> float | None:
        """Lower with a network, each of whose weights changes all keys and values."""
        return 3e-4 if self.prefix_projection else self.default_lr

    @model_validator(mode="after")
    def _text_is_used(self) -> PrefixConfig:
        if self.init_text is not None and self.init != "tokens":
            raise ValueError(f"init_text has no effect with init: {self.init}, expected init: tokens")
        return self

    def add(self, model: nn.Module) -> None:
        """Put the prefix into the decoder.

        Raises:
            UsageError: It leaves no room in the context, or the model is not one of lit-lora's decoders.
        """
        host = self._host(model)
        config: Any = model.config
        shape = (config.num_hidden_layers, 2, config.num_key_value_heads, config.head_dim)
        hidden = self.encoder_hidden_size if self.prefix_projection else None
        device = next(host.parameters()).device
        rows: Tensor | None = None
        if self.init == "tokens" and device.type != "meta":  # a model without values computes nothing to start from
            rows = _keys_and_values(model, self._start_ids(model))
        elif self.init == "zeros":
            rows = torch.zeros(self.length, torch.Size(shape).numel())
        with torch.device(device):
            prefix = Prefix(self.length, shape, config.hidden_size, hidden)
        if rows is not None:
            prefix.start(rows)
        prefix.join(host)

    def peft_config(self, model: nn.Module) -> dict[str, Any]:
        """``adapter_config.json`` without the base model's name; a network is not saved, so it has none."""
        layers, _, heads, head_size = _prefix_of(model).shape
        return self._peft_config(
            token_dim=heads * head_size, num_attention_heads=heads, num_layers=layers, prefix_projection=False
        )

    def file_tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """The keys and values; a network that computes them is not saved."""
        return {EMBEDDINGS: _prefix_of(model).rows().detach()}

    @classmethod
    def from_peft(cls, raw: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> PrefixConfig:
        """Settings by the keys and values alone: the file has a network's output only."""
        sizes = {"num_virtual_tokens", "token_dim", "num_transformer_submodules", "num_attention_heads", "num_layers"}
        training = {"encoder_hidden_size", "prefix_projection", "init_weights"}
        refuse(raw, sizes | training)
        return cls(num_virtual_tokens=len(only_rows(tensors)), init="zeros")


def _prefix_of(model: nn.Module) -> Prefix:
    return next(module for module in own_modules(model).values() if isinstance(module, Prefix))


class _Recorder:
    """Attention that records the keys, rotated, and values that each layer passes to it, float32."""

    prefix_length = 0

    def __init__(self, attend: Attend, recorded: dict[int, tuple[Tensor, Tensor]]) -> None:
        self.attend = attend
        self.rotate = attend.rotate
        self.token_positions = attend.token_positions
        self.with_prefix = attend.with_prefix
        self.recorded = recorded

    def __call__(self, layer: LayerAttention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        self.recorded[layer.index] = (self.attend.rotate(layer, key).float(), value.float())
        return self.attend(layer, query, key, value)


@torch.no_grad()
def _keys_and_values(model: nn.Module, ids: Tensor) -> Tensor:
    """The keys and values that the model itself computes for these tokens, (P, layers · 2 · K · H) float32."""
    recorded: dict[int, tuple[Tensor, Tensor]] = {}
    _, host = decoder_of(model)
    was_training = model.training
    hook = host.register_forward_pre_hook(lambda _, args: (args[0], _Recorder(args[1], recorded)))
    try:
        model.eval()
        model.hidden_states(ids[None].to(next(host.parameters()).device))  # type: ignore[operator]
    finally:
        hook.remove()
        model.train(was_training)
    layers = [torch.stack(recorded[layer], dim=1) for layer in sorted(recorded)]  # each (P, 2, K, H)
    return torch.stack(layers, dim=1).flatten(1)
