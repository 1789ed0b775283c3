"""Any ``AutoModelForCausalLM`` of transformers as a :class:`lit_lora.model.LanguageModel`."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lit_lora.errors import UsageError
from lit_lora.hf.attention import ATTENTION, ON_PAPER, attending, current, register_attention
from lit_lora.hf.cache import Native, RowCache
from lit_lora.hf.config import HostedConfig, text_config
from lit_lora.hf.experts import EXPERTS, register_experts
from lit_lora.hf.quiet import quiet
from lit_lora.hf.rows import PaddedRows, PositionIds, Rows, Way
from lit_lora.model import KVCache, ModelConfig
from lit_lora.model.attention.attend import Attend
from lit_lora.model.attention.cached import CachedAttention
from lit_lora.model.attention.packed import PackedAttention
from lit_lora.model.interface import Checkpointing
from lit_lora.model.layers import checkpointed

__all__ = ["Caching", "HostedLM", "build", "fill_buffers"]

Caching = Literal["ours"] | Native
"""What generation keeps: our cache of all rows, or see :class:`RowCache`."""


class HostedLM(nn.Module):
    """A model of transformers, with the names that its modules and parameters have there.

    It has the same children as ``net``, transformers' model: what a method puts in the place of one is seen by both.
    The decoder is called as our own is, with embedded tokens (T, D) and how they attend, and returns hidden states
    (T, D). So ``net`` itself must not be called.

    Args:
        config: The sizes.
        net: transformers' model, changed in place.
    """

    def __init__(self, config: HostedConfig, net: Any) -> None:
        super().__init__()
        register_attention()
        register_experts()
        if net._can_set_experts_implementation():
            net.set_experts_implementation(EXPERTS)
        self.config: ModelConfig = config
        self.transposed = _linear_for_conv1d(net)
        """Names of the layers whose weight the checkpoint has as (in, out), the transpose of what the model holds."""
        self.net: Any
        self.__dict__["net"] = net  # not a child, which would put its name before all others
        for shared in ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set"):
            self.__dict__[shared] = getattr(net, shared)

        decoder = _decoder_of(net)
        self._decoder_name = next(name for name, module in net.named_modules() if module is decoder)
        self._list_name = _longest_list(decoder)
        self._base = list(net.modules())
        decoder.forward = partial(_forward, decoder)

        self.way: Way = "padded rows"
        """How packed documents are computed; see :mod:`lit_lora.hf.rows`."""
        self.caching: Caching = "never"
        """What generation keeps of the tokens it has read."""
        self.not_wrappable: frozenset[str] = frozenset()
        """See :class:`lit_lora.model.LanguageModel`."""
        self.eval()

    @property
    def description(self) -> str:
        """How it is computed, for a plan."""
        cache = {"ours": "own cache", "never": "generation without a cache"}.get(self.caching, "transformers' cache")
        return f"{type(self.net).__name__} of transformers, {self.way}, {cache}"

    @property
    def context(self) -> int:
        """The maximum length of a document, in tokens."""
        return self.config.max_position_embeddings - int(getattr(self.get_decoder(), "prefix_length", 0))

    def train(self, mode: bool = True) -> HostedLM:
        """Set the mode of what methods add. The base stays in evaluation mode: its dropout is off."""
        super().train(mode)
        for module in self._base:
            module.training = False
        return self

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding, or what a method put in its place."""
        embedding: nn.Module = self.net.get_input_embeddings()
        return embedding

    def get_output_embeddings(self) -> nn.Module:
        """The head, or what a method put in its place."""
        head: nn.Module = self.net.get_output_embeddings()
        return head

    def get_decoder(self) -> nn.Module:
        """The module from the embedding to the final norm."""
        return self.get_submodule(self._decoder_name)

    def blocks(self) -> dict[str, nn.Module]:
        """The layers by name, first to last."""
        name = f"{self._decoder_name}.{self._list_name}"
        return {f"{name}.{index}": layer for index, layer in self.get_submodule(name).named_children()}

    def tie_weights(self) -> None:
        """Make the head's weight the embedding's parameter."""
        self.get_output_embeddings().weight = self.get_input_embeddings().weight

    def checkpoint_activations(self, what: Checkpointing) -> None:
        """Trade time for memory in training; losses and gradients stay the same bits.

        Raises:
            UsageError: ``selective``, and a layer has no MLP that is known by name.
        """
        mlp = self.config.names.mlp
        for name, layer in self.blocks().items():
            parts = {"full": layer, "selective": dict(layer.named_children()).get(mlp)}
            for part in parts.values():
                if part is not None:
                    part.__dict__.pop("forward", None)  # the class's own again
            if what == "none":
                continue
            chosen = parts[what]
            if chosen is None:
                raise UsageError(
                    f"train.activation_checkpointing: selective recomputes MLPs, and {name} has none that is known for "
                    f"model_type {self.config.model_type!r}",
                    hint="use train.activation_checkpointing: full",
                )
            chosen.forward = partial(_forward_checkpointed, self.get_decoder(), chosen)

    def new_cache(self, batch_size: int, max_length: int, *, padding: Tensor | None = None) -> KVCache | RowCache:
        """An empty cache; see :class:`lit_lora.model.LanguageModel`."""
        if self.caching == "ours":
            return KVCache(batch_size, max_length, device=_device(self), padding=padding)
        return RowCache(batch_size, max_length, native=self.caching, padding=padding)

    def hidden_states(
        self,
        input_ids: Tensor,
        *,
        lengths: Sequence[int] | None = None,
        shared_prefix: int = 0,
        cache: KVCache | RowCache | None = None,
        attend: Attend | None = None,
    ) -> Tensor:
        """Run the decoder up to its final norm; arguments and result are those of our own decoder.

        Raises:
            ValueError: The cache is too short, or ``lengths`` do not cover the row.
        """
        batch_size, tokens = input_ids.shape
        if cache is not None and cache.length + tokens > cache.max_length:
            raise ValueError(f"{cache.length} + {tokens} tokens, the cache has room for {cache.max_length}")
        rows: Attend | Rows
        if attend is not None:
            rows = attend
        elif cache is None:
            lengths = list(lengths) if lengths is not None else [tokens] * batch_size
            rows = self._packed(lengths, shared_prefix, batch_size * tokens, input_ids.device)
        elif isinstance(cache, RowCache):
            rows = cache
        else:
            rows = CachedAttention(self.config, cache, batch_size, tokens)

        ids = input_ids.reshape(-1)
        with _reading(ids):
            hidden: Tensor = self.get_decoder()(self.get_input_embeddings()(ids), rows)
        if cache is not None:
            cache.advance(tokens)
        return hidden.view(batch_size, tokens, -1)

    def _packed(self, lengths: list[int], shared_prefix: int, tokens: int, device: torch.device) -> Attend | Rows:
        packed_length = sum(lengths) - shared_prefix * (len(lengths) - 1)
        if packed_length != tokens or min(lengths) < shared_prefix:
            raise ValueError(f"lengths sum to {packed_length}, the row has {tokens} tokens")
        if self.way == "own attention":
            return PackedAttention(self.config, lengths, device, shared_prefix=shared_prefix)
        return (PositionIds if self.way == "position ids" else PaddedRows)(lengths, shared_prefix)

    def logits(self, hidden: Tensor) -> Tensor:
        """Map hidden states (..., D) to logits (..., V) by the model's own code: its head, bias, scale and soft cap."""
        flat = hidden.reshape(1, -1, hidden.shape[-1])
        ids = torch.zeros(flat.shape[:2], dtype=torch.int64, device=flat.device)
        parent_name, _, name = self._decoder_name.rpartition(".")
        parent = self.get_submodule(parent_name)
        decoder = parent._modules[name]
        assert decoder is not None
        parent._modules[name] = _Computed(decoder, flat)  # type: ignore[assignment]
        try:
            logits: Tensor = self.net.forward(input_ids=ids, use_cache=False, return_dict=True).logits
        finally:
            parent._modules[name] = decoder
        return logits.view(*hidden.shape[:-1], -1)

    def attend_by(self, way: Way) -> None:
        """Compute packed documents in this way from now on, in place."""
        self.way = way
        decoder = self.get_decoder()
        decoder.__dict__.pop("prefix_length", None)
        if way == "own attention":
            decoder.prefix_length = 0  # type: ignore[assignment]  # it accepts a prefix before every document


class _Computed:
    """Stands in for a decoder whose output is known, while a model's own code computes logits from it."""

    def __init__(self, decoder: nn.Module, hidden: Tensor) -> None:
        self._decoder, self._hidden = decoder, hidden

    def __call__(self, *args: Any, **kwargs: Any) -> _Output:
        return _Output(self._hidden)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._decoder, name)


class _Output:
    """What transformers' decoders return, with nothing but hidden states."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getattr__(self, name: str) -> None:
        return None

    def __getitem__(self, index: int) -> Tensor | None:
        return self.last_hidden_state if index == 0 else None

    def get(self, name: str, default: Any = None) -> Any:
        """``default``, as for any entry that is not there."""
        return default


_INPUT_IDS: ContextVar[Tensor] = ContextVar("_INPUT_IDS")
"""(T,) the token ids of the pass, which some models look up again besides their embedding."""


@contextmanager
def _reading(ids: Tensor) -> Iterator[None]:
    token = _INPUT_IDS.set(ids)
    try:
        yield
    finally:
        _INPUT_IDS.reset(token)


def _forward(decoder: nn.Module, embedded: Tensor, rows: Attend | Rows) -> Tensor:
    """The forward pass of a decoder of transformers when hosted: (T, D) to (T, D)."""
    ids = _INPUT_IDS.get()
    if isinstance(rows, Rows):
        return rows.run(partial(_run, decoder), embedded, ids)
    with attending(rows):
        positions = rows.token_positions()[None]
        output = _run(decoder, embedded[None], ids[None], position_ids=positions, use_cache=False)
    hidden: Tensor = output.last_hidden_state[0]
    return hidden


def _run(decoder: Any, embedded: Tensor, ids: Tensor, **arguments: Any) -> Any:
    """Transformers' own forward pass of a decoder for (B, T, D) and (B, T); what it does not take is left out."""
    kind: Any = type(decoder)
    names = _parameters(kind)
    if "per_layer_inputs" in names and getattr(decoder, "hidden_size_per_layer_input", False):
        arguments["per_layer_inputs"] = _per_layer_inputs(decoder, embedded, ids)
    implementation = _implementation(decoder, embedded)
    if implementation == ON_PAPER:
        arguments["attention_mask"] = torch.ones(embedded.shape[:2], dtype=torch.int64, device="meta")
    accepted = {name: value for name, value in arguments.items() if name in names}
    with _attention_by(decoder, implementation):
        return kind.forward(decoder, inputs_embeds=embedded, **accepted)


def _implementation(decoder: Any, embedded: Tensor) -> str:
    """The name of the attention function for a pass: ours, or the model's own outside the passes that are ours.

    When it builds masks, transformers looks at values, which the meta device does not have. For our names it does not.
    """
    if current() is not None:
        return ATTENTION
    if embedded.is_meta:
        return ATTENTION if decoder._can_set_attn_implementation() else ON_PAPER
    native: str = decoder.config._attn_implementation
    return native


@contextmanager
def _attention_by(decoder: Any, implementation: str) -> Iterator[None]:
    """Inside the block, the layers attend by the function of this name."""
    config = decoder.config
    before = config._attn_implementation
    config._attn_implementation_internal = implementation
    try:
        yield
    finally:
        config._attn_implementation_internal = before


def _per_layer_inputs(decoder: Any, embedded: Tensor, ids: Tensor) -> Tensor:
    """The second embedding of Gemma 3n and 4, which is looked up for every layer.

    Raises:
        UsageError: Some rows are no tokens.
    """
    if ids.shape != embedded.shape[:2]:
        raise UsageError(
            "peft: this model looks up every token in every layer; virtual tokens, which it has none for, "
            "cannot be used",
            hint="use lora, or prefix in place of prompt",
        )
    arguments = (ids, embedded)[: len(inspect.signature(decoder.get_per_layer_inputs).parameters)]
    per_layer: Tensor = decoder.get_per_layer_inputs(*arguments)
    return per_layer


@cache
def _parameters(kind: Any) -> frozenset[str]:
    """The names of the arguments of a decoder's forward pass."""
    return frozenset(inspect.signature(kind.forward).parameters)


def _forward_checkpointed(decoder: Any, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The forward pass of a layer or an MLP, computed again in the backward pass."""
    attend, implementation = current(), decoder.config._attn_implementation

    def run(*args: Any) -> Any:
        # Again in the backward pass, which runs after the forward pass and, on a GPU, in another thread.
        with attending(attend), _attention_by(decoder, implementation):
            return type(module).forward(module, *args, **kwargs)

    return checkpointed(run, *args)


def build(config: HostedConfig, *, dtype: torch.dtype | None = None) -> HostedLM:
    """A model on the meta device: shapes and dtypes without memory.

    To fill it, replace its parameters and persistent buffers, then call :func:`fill_buffers` for the others and
    :func:`lit_lora.hf.choose`.

    Args:
        config: Its sizes.
        dtype: Dtype of its parameters; as in the checkpoint when omitted.
    """
    from transformers import AutoModelForCausalLM
    from transformers.initialization import meta_device_safe_creation_ops

    text = text_config(config.source)
    text.vocab_size, text.tie_word_embeddings = config.vocab_size, config.tie_word_embeddings
    with quiet(), torch.device("meta"), meta_device_safe_creation_ops():
        net = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            text, dtype=dtype or getattr(torch, config.dtype), trust_remote_code=False
        )
    return HostedLM(config, net)


def fill_buffers(model: HostedLM, device: torch.device | str) -> None:
    """Compute, in place, the buffers that checkpoints do not contain, such as rotation frequencies.

    Call it while parameters are on the meta device, as transformers initializes them along with the buffers.
    """
    for module in model.net.modules():
        for name in module._non_persistent_buffers_set:
            buffer = module._buffers.get(name)
            if buffer is not None:
                module._buffers[name] = torch.empty_like(buffer, device=device)
    model.net.initialize_weights()


def _linear_for_conv1d(net: nn.Module) -> frozenset[str]:
    """Put ``nn.Linear`` in the place of every ``Conv1D``, GPT-2's linear layer with an (in, out) weight; their names.

    So methods, quantization and kernels meet one kind of linear layer.
    """
    from transformers.pytorch_utils import Conv1D

    layers = {name: module for name, module in net.named_modules() if isinstance(module, Conv1D)}
    for name, conv in layers.items():
        inputs, outputs = conv.weight.shape
        linear = nn.Linear(inputs, outputs, device="meta")
        linear.weight = nn.Parameter(conv.weight.detach().T.contiguous(), requires_grad=conv.weight.requires_grad)
        linear.bias = conv.bias
        parent, _, last = name.rpartition(".")
        setattr(net.get_submodule(parent), last, linear)
    return frozenset(layers)


def _decoder_of(net: Any) -> nn.Module:
    """The module from the embedding to the final norm."""
    from transformers import PreTrainedModel

    decoder: nn.Module = net.get_decoder()
    # Llama4ForCausalLM names no attribute in `base_model_prefix`, and ModernBERT's head is called "decoder".
    if decoder is net or not isinstance(decoder, PreTrainedModel):
        decoder = next(child for child in net.children() if isinstance(child, PreTrainedModel))
    return decoder


def _longest_list(decoder: nn.Module) -> str:
    """The name of the list of layers in a decoder; lists within layers, such as of experts, do not count."""
    sizes = {name: len(child) for name, child in decoder.named_modules() if isinstance(child, nn.ModuleList)}
    inside = tuple(f"{name}." for name in sizes)
    outermost = {name: size for name, size in sizes.items() if not name.startswith(inside)}
    name: str = max(outermost, key=outermost.__getitem__)
    return name


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
