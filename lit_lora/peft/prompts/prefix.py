"""Prefix tuning: trained keys and values before those of every document, in every layer.

::

    layer l:   keys   = [P_K(l) ; k_1 … k_T]      attention as ever; token i has position P + i
               values = [P_V(l) ; v_1 … v_T]

Source: Li and Liang 2021, "Prefix-Tuning: Optimizing Continuous Prompts for Generation", section 4. With
``prefix_projection`` the keys and values are a network's output in training (section 4.3), and its last output is what
is saved. The keys are in their final form, after rotation, as they would lie in a cache.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from lit_lora.peft.core.added import AddedModule, Attend, decoder_of
from lit_lora.peft.core.modules import own_modules
from lit_lora.peft.prompts.virtual_tokens import EMBEDDINGS, VirtualTokens, only_rows, refuse

__all__ = ["Prefix", "PrefixConfig"]


class Prefix(AddedModule):
    """The keys and values of the virtual tokens for all layers.

    Args:
        length: Virtual tokens, P.
        shape: Layers, 2, K, H.
        width: D, of the tokens that the network reads.
        hidden: Width of the network's middle; ``None`` for no network: keys and values are parameters themselves.
    """

    child = "prefix"

    def __init__(self, length: int, shape: tuple[int, int, int, int], width: int, hidden: int | None) -> None:
        super().__init__()
        self.prefix_length, self.shape = length, shape
        numbers = torch.Size(shape).numel()
        self.embedding = nn.Parameter(torch.randn(length, width if hidden else numbers))
        self.transform: nn.Sequential | None = None
        if hidden:
            self.transform = nn.Sequential(nn.Linear(width, hidden), nn.Tanh(), nn.Linear(hidden, numbers))

    def rows(self) -> Tensor:
        """(P, layers · 2 · K · H) float32."""
        if self.transform is None:
            return self.embedding
        rows: Tensor = self.transform(self.embedding)
        return rows

    @torch.no_grad()
    def start(self, rows: Tensor) -> None:
        """Let :meth:`rows` begin as these, (P, layers · 2 · K · H).

        With a network, its last layer is fitted: as many equations as virtual tokens, solved for the smallest weights.
        """
        if self.transform is None:
            self.embedding.copy_(rows)
            return
        last = self.transform[-1]
        assert isinstance(last, nn.Linear)
        hidden: Tensor = self.transform[:-1](self.embedding)  # (P, hidden)
        known = torch.cat([hidden, hidden.new_ones(len(hidden), 1)], dim=1).double()
        solution = torch.linalg.pinv(known) @ rows.to(known)
        last.weight.copy_(solution[:-1].T)
        last.bias.copy_(solution[-1])

    def before(self, host: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The decoder's attention, behind the prefix."""
        x, attend = args
        return x, _Prefixed(attend, self, x.dtype)

    def extra_repr(self) -> str:
        """Sizes."""
        return f"{self.prefix_length} tokens × {self.shape[0]} layers"


class _Prefixed:
    """Attention behind given keys and values."""

    prefix_length = 0

    def __init__(self, attend: Attend, prefix: Prefix, dtype: torch.dtype) -> None:
        self.attend = attend.with_prefix(prefix.prefix_length, rotated=True)
        rows = prefix.rows().to(dtype).view(prefix.prefix_length, *prefix.shape) if self.attend.prefix_length else None
        self.keys_values = rows  # (P, layers, 2, K, H); None when a cache has them

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """(T, N, H), (T, K, H), (T, K, H) -> (T, N, H)."""
        if self.keys_values is None:
            return self.attend(layer, query, key, value)
        keys, values = self.keys_values[:, layer].unbind(1)
        rows = self._blank(query), torch.cat([keys, key]), torch.cat([values, value])
        return self.attend(layer, *rows)[self.attend.prefix_length :]

    def rotate(self, x: Tensor) -> Tensor:
        """(T, heads, H) turned by the positions of its rows."""
        return self.attend.rotate(self._blank(x))[self.attend.prefix_length :]

    def with_prefix(self, prefix_length: int, *, rotated: bool = False) -> Attend:
        """Refused: the prefix stands there."""
        return self.attend.with_prefix(prefix_length, rotated=rotated)

    def _blank(self, x: Tensor) -> Tensor:
        return torch.cat([x.new_zeros(self.attend.prefix_length, *x.shape[1:]), x])


class PrefixConfig(VirtualTokens):
    """Prefix tuning: trained keys and values before every document, in every layer."""

    peft_type: ClassVar[str | None] = "PREFIX_TUNING"
    name: Literal["prefix"] = Field("prefix", description="The method.")
    init: Literal["tokens", "random", "zeros"] = Field(
        "tokens",
        description="tokens: keys and values that the model gives init_text, or random tokens; random and zeros learn "
        "much slower.",
    )
    prefix_projection: bool = Field(
        False, description="Train a network that gives keys and values; only its output is saved."
    )
    encoder_hidden_size: int = Field(512, ge=1, description="Width of that network's middle.")

    @property
    def lr(self) -> float | None:
        """The network's weights move all keys and values at once, so it learns at a lower rate."""
        return 3e-4 if self.prefix_projection else self.default_lr

    @model_validator(mode="after")
    def _text_is_used(self) -> PrefixConfig:
        if self.init_text is not None and self.init != "tokens":
            raise ValueError(f"init_text has no effect with init: {self.init}, expected init: tokens")
        return self

    def add(self, model: nn.Module) -> None:
        """Put the prefix into the decoder.

        Raises:
            UsageError: It leaves no room in the context, or the model is not one of this package's decoders.
        """
        host = self._host(model)
        config: Any = model.config
        shape = (config.num_hidden_layers, 2, config.num_key_value_heads, config.head_dim)
        hidden = self.encoder_hidden_size if self.prefix_projection else None
        weight: Tensor = next(host.parameters())
        given = None
        if self.init == "tokens" and weight.device.type != "meta":
            given = _keys_and_values(model, self._start_ids(model))
        elif self.init == "zeros":
            given = torch.zeros(self.length, torch.Size(shape).numel())
        with torch.device(weight.device):
            prefix = Prefix(self.length, shape, config.hidden_size, hidden)
        if given is not None:
            prefix.start(given)
        prefix.join(host)

    def peft_config(self, model: nn.Module) -> dict[str, Any]:
        """``adapter_config.json``, but for the base model's name."""
        layers, _, heads, size = _prefix_of(model).shape
        return self._peft_config(
            token_dim=heads * size, num_attention_heads=heads, num_layers=layers, prefix_projection=False
        )

    def file_tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """Keys and values; a network is computed once and left out."""
        return {EMBEDDINGS: _prefix_of(model).rows().detach()}

    @classmethod
    def from_peft(cls, raw: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> PrefixConfig:
        """Plain keys and values, whatever network they came from."""
        refuse(
            raw,
            {"num_virtual_tokens", "token_dim", "num_transformer_submodules", "num_attention_heads", "num_layers"}
            | {"encoder_hidden_size", "prefix_projection", "init_weights"},
        )
        return cls(num_virtual_tokens=len(only_rows(tensors)), init="zeros")


def _prefix_of(model: nn.Module) -> Prefix:
    return next(module for module in own_modules(model).values() if isinstance(module, Prefix))


@torch.no_grad()
def _keys_and_values(model: nn.Module, ids: Tensor) -> Tensor:
    """(P, layers · 2 · K · H) float32: what every layer's attention is given for these tokens, keys rotated."""
    seen: dict[int, tuple[Tensor, Tensor]] = {}

    class Watch:
        prefix_length = 0

        def __init__(self, attend: Attend) -> None:
            self.attend, self.rotate, self.with_prefix = attend, attend.rotate, attend.with_prefix

        def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            seen[layer] = self.attend.rotate(key).float(), value.float()
            return self.attend(layer, query, key, value)

    host = decoder_of(model)[1]
    training = model.training
    hook = host.register_forward_pre_hook(lambda _, args: (args[0], Watch(args[1])))
    try:
        model.eval()
        model.hidden_states(ids[None].to(next(host.parameters()).device))  # type: ignore[operator]
    finally:
        hook.remove()
        model.train(training)
    layers = [torch.stack(seen[layer], dim=1) for layer in sorted(seen)]  # each (P, 2, K, H)
    return torch.stack(layers, dim=1).flatten(1)
