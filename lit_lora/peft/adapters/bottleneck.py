"""Bottleneck adapters: a small network with a narrow hidden layer, added to the output of a part of a block.

::

    serial:    x ─► host ─► h ──┬────────────────────────► + ──►      parallel:  x ──┬─► host ──────────────► + ──►
                                └─► down ─► φ ─► up ───────┘                         └─► down ─► φ ─► up ─► s ┘

``a(h) = h + up φ(down h)`` after attention and after the MLP of every block, before the residual addition, for
Houlsby et al. 2019, "Parameter-Efficient Transfer Learning for NLP", section 2.1; ``host(x) + s up φ(down x)`` beside
the MLP for He et al. 2021, "Towards a Unified View of Parameter-Efficient Transfer Learning", table 1 (scaled
parallel adapter); after the whole block behind a new layer norm, with a task embedding, for Lin et al. 2020,
"Exploring Versatile Generative Language Model Via Parameter-Efficient Transfer Learning", section 2.

AdapterDrop (Rückle et al. 2020, "AdapterDrop: On the Efficiency of Adapters in Transformers") leaves the first layers
without adapters: a fixed number, or one drawn anew for every batch. The backward pass ends at the first adapter, so
fewer adapters are faster.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from lit_lora.errors import UsageError
from lit_lora.model import ModelConfig
from lit_lora.peft.core.added import AddedModule, blocks, width_of
from lit_lora.peft.core.matching import matches, select
from lit_lora.peft.core.module_names import default_names, with_names_of
from lit_lora.peft.core.modules import OwnModule, own_modules, replace_module
from lit_lora.peft.core.modules_to_save import TrainedCopy, find_embedding
from lit_lora.peft.core.with_modules_to_save import WithModulesToSave

__all__ = [
    "Bottleneck",
    "BottleneckConfig",
    "HoulsbyConfig",
    "LinConfig",
    "ParallelConfig",
    "drop_layers",
    "norms",
]

Activation = Literal["gelu", "relu", "silu", "none"]
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "relu": F.relu,
    "silu": F.silu,
    "none": lambda x: x,
}


class Drop:
    """The first layer with adapters in a training pass, shared by all adapters; the first of them draws it.

    Args:
        layers: Number of the model's layers.
    """

    def __init__(self, layers: int) -> None:
        self.layers = layers
        self.first = 0

    def draw(self) -> None:
        """Draw it uniformly, from 0 (no adapter is left out) to the last layer."""
        self.first = int(torch.randint(self.layers, ()))


class Bottleneck(AddedModule):
    """``up φ(down x)``, with float32 weights, computed in the dtype of ``x``; subclasses add it to something.

    Args:
        width: D.
        bottleneck: Hidden size, m.
        activation: φ.
        std: Standard deviation of the initial weights, which are normal, truncated at two of it.
        zero: Start ``up`` at zero, so that the adapter changes nothing at first.
    """

    layer: int
    """The layer it is in."""
    drop: Drop | None
    """Which layers random AdapterDrop leaves out; ``None`` for none."""
    draws: bool
    """Whether it is the first adapter of the model, which draws."""

    def __init__(self, width: int, bottleneck: int, activation: Activation, std: float, *, zero: bool) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.empty(bottleneck, width))
        self.down_bias = nn.Parameter(torch.zeros(bottleneck))
        self.up = nn.Parameter(torch.zeros(width, bottleneck))
        self.up_bias = nn.Parameter(torch.zeros(width))
        self.activation: Activation = activation
        nn.init.trunc_normal_(self.down, std=std, a=-2 * std, b=2 * std)
        if not zero:
            nn.init.trunc_normal_(self.up, std=std, a=-2 * std, b=2 * std)
        self.layer = 0
        self.drop = None
        self.draws = False

    def skipped(self) -> bool:
        """Whether this forward pass leaves the adapter out; to be called once per pass, for the first one draws."""
        if self.drop is None or not self.training:
            return False
        if self.draws:
            self.drop.draw()
        return self.layer < self.drop.first

    def branch(self, x: Tensor) -> Tensor:
        """(..., D) to (..., D).

        Raises:
            UsageError: Its host has another width.
        """
        self.check_width(x)
        dtype = x.dtype
        activation = _ACTIVATIONS[self.activation]
        hidden = activation(F.linear(x, self.down.to(dtype), self.down_bias.to(dtype)))
        return F.linear(hidden, self.up.to(dtype), self.up_bias.to(dtype))

    def check_width(self, x: Tensor) -> None:
        """Check that ``x`` is as wide as the adapter, which is made before anything is computed.

        Raises:
            UsageError: It is not, as in models whose layers pass on several residual streams.
        """
        width = self.down.shape[1]
        if x.shape[-1] != width:
            raise UsageError(
                f"peft.name: adapters {width} wide do not fit this model, which has {x.shape[-1]} values "
                "per token where one stands",
                hint="use lora, or name other modules in peft.target_modules",
            )

    def extra_repr(self) -> str:
        """Sizes."""
        return f"{self.down.shape[1]}, bottleneck {self.down.shape[0]}"


class SerialAdapter(Bottleneck):
    """``h + up φ(down h)`` of its host's output ``h``."""

    def after(self, host: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """The host's output with the adapter's: (..., D), or a tuple that begins with it."""
        return output if self.skipped() else _added(output, self.branch(_hidden(output)))


class ParallelAdapter(Bottleneck):
    """``host(x) + s up φ(down x)``."""

    child = "parallel_adapter"
    scale: float = 1.0

    def after(self, host: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """The host's output with the adapter's: (..., D), or a tuple that begins with it."""
        return output if self.skipped() else _added(output, self.scale * self.branch(args[0]))


def _hidden(output: Any) -> Tensor:
    """What a module computes of the tokens, without scores of experts or attention."""
    hidden: Tensor = output if isinstance(output, Tensor) else output[0]
    return hidden


def _added(output: Any, change: Tensor) -> Any:
    """An output with ``change`` added to what the module computes of the tokens."""
    hidden = _hidden(output)
    hidden = hidden + change.reshape(hidden.shape)  # some mixtures of experts put out the tokens of all rows in one
    return hidden if isinstance(output, Tensor) else (hidden, *output[1:])


class BlockAdapter(Bottleneck):
    """``h + up φ(down LN(h))`` of a whole block's output."""

    def __init__(self, width: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(width, *args, **kwargs)
        self.norm = nn.Parameter(torch.ones(width))
        self.norm_bias = nn.Parameter(torch.zeros(width))

    def after(self, host: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """A block's output with the adapter's: a tensor, or a tuple that begins with one."""
        if self.skipped():
            return output
        if isinstance(output, Tensor):
            return output + self.branch(self._normed(output))

        stream, *rest = output
        second = rest[0] if rest else None
        # GLM's sparse attention passes on the indices of tokens, which may have the same shape.
        if isinstance(second, Tensor) and second.shape == stream.shape and second.is_floating_point():
            # A block of lit-lora's decoder returns the residual stream and its own output, which the next block adds.
            # The adapter reads their sum, and its output takes the place of the block's.
            stream = stream + second
            return (stream, self.branch(self._normed(stream)), *rest[1:])
        return (stream + self.branch(self._normed(stream)), *rest)

    def _normed(self, x: Tensor) -> Tensor:
        self.check_width(x)
        return F.layer_norm(x.float(), x.shape[-1:], self.norm, self.norm_bias).to(x.dtype)


class TaskEmbedding(AddedModule):
    """A trained vector for the task, added to the embedding of every token."""

    child = "task"

    def __init__(self, width: int) -> None:
        super().__init__()
        self.vector = nn.Parameter(torch.zeros(width))

    def after(self, host: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """(..., D) to (..., D)."""
        return output + self.vector.to(output.dtype)


class BottleneckConfig(WithModulesToSave):
    """The base of the bottleneck adapters' settings."""

    default_lr: ClassVar[float | None] = 1e-3
    bottleneck: int = Field(64, ge=1, description="Hidden size of the adapters; a larger one has more capacity.")
    activation: Activation = Field("gelu", description="Activation between down and up; none for a linear adapter.")
    init_std: float = Field(1e-3, gt=0, description="Standard deviation of the initial weights.")
    init_zero: bool = Field(False, description="Start up at zero, so that adapters change nothing at first.")
    drop_layers: int | Literal["random"] = Field(
        0,
        description="Number of first layers without adapters (AdapterDrop); random draws it for every batch, so that "
        "the trained adapter works with any number of them left out.",
    )

    @property
    def graph_safe(self) -> bool:
        """Not with random drop_layers, which changes the operations of every step."""
        return self.drop_layers != "random"

    @property
    def about(self) -> str:
        """The method and its hidden size."""
        return f"{self.model_dump()['name']} adapter, bottleneck {self.bottleneck}"

    def _first_layer(self, layers: int) -> int:
        """The first layer that gets an adapter.

        Raises:
            UsageError: The model has no such layer.
        """
        first = 0 if self.drop_layers == "random" else self.drop_layers
        if not 0 <= first < layers:
            raise UsageError(f"peft.drop_layers: expected 0 to {layers - 1}, fewer than all layers, got {first}")
        return first

    def _join(self, model: nn.Module, hosts: list[str], kind: type[Bottleneck]) -> None:
        """Put an adapter of a kind into each host, except in dropped layers, in place."""
        names = list(blocks(model))
        config: Any = getattr(model, "config", None)
        residual = [] if not isinstance(config, ModelConfig) else [config.names.attention, config.names.mlp]
        first = self._first_layer(len(names))
        drop = Drop(len(names)) if self.drop_layers == "random" else None
        for host in hosts:
            layer = _layer_of(host, names)
            if layer < first:
                continue
            module = model.get_submodule(host)
            # What is added to the residual stream has its width, whatever that of the last linear layer within.
            adds = isinstance(config, ModelConfig) and (host in names or any(matches(part, host) for part in residual))
            width = config.hidden_size if adds else width_of(module)
            adapter = kind(width, self.bottleneck, self.activation, self.init_std, zero=self.init_zero)
            adapter.layer = layer
            adapter.drop = drop
            adapter.draws = host == hosts[0]
            adapter.join(module)

    def _hosts(self, model: nn.Module, patterns: list[str]) -> list[str]:
        """The modules that patterns match, those of other methods left out.

        Raises:
            UsageError: A pattern matches nothing.
        """
        names = [name for name, module in model.named_modules() if name and not isinstance(module, OwnModule)]
        return select(patterns, names, key="peft.target_modules")


class HoulsbyConfig(BottleneckConfig):
    """Houlsby adapters: two in every block, after attention and after the MLP."""

    name: Literal["houlsby"] = Field("houlsby", description="The method.")
    target_modules: list[str] = Field(
        default_names("attention", "mlp"),
        min_length=1,
        description="Modules whose output goes through an adapter; [mlp] for Pfeiffer's adapters.",
    )
    train_norms: bool = Field(True, description="Also train the norms of the layers with adapters.")

    @model_validator(mode="after")
    def _norms_or_random(self) -> HoulsbyConfig:
        if self.train_norms and self.drop_layers == "random":
            raise ValueError("drop_layers: random leaves out adapters but not norms, expected train_norms: false")
        return self

    def add(self, model: nn.Module) -> None:
        """Add the adapters, and let the norms train.

        Raises:
            UsageError: A target matches nothing, or no layer is left for adapters.
        """
        hosts = self._hosts(model, with_names_of(self, model).target_modules)
        self._join(model, hosts, SerialAdapter)
        if self.train_norms:
            for name in norms(model, self._first_layer(len(blocks(model)))):
                replace_module(model, name, TrainedCopy(model.get_submodule(name)))
        self.train_modules_to_save(model)


class ParallelConfig(BottleneckConfig):
    """Parallel adapters: in parallel to the MLP of every block, with the same input."""

    name: Literal["parallel"] = Field("parallel", description="The method.")
    target_modules: list[str] = Field(
        default_names("mlp"), min_length=1, description="Modules that get a parallel adapter."
    )
    activation: Activation = Field("relu", description="Activation between down and up; none for a linear adapter.")
    init_std: float = Field(0.02, gt=0, description="Standard deviation of the initial weights.")
    init_zero: bool = Field(True, description="Start up at zero, so that adapters change nothing at first.")
    scale: float = Field(4.0, gt=0, description="Factor of the adapters' output.")

    def add(self, model: nn.Module) -> None:
        """Add the adapters.

        Raises:
            UsageError: A target matches nothing, or no layer is left for adapters.
        """
        hosts = self._hosts(model, with_names_of(self, model).target_modules)
        self._join(model, hosts, ParallelAdapter)
        for module in own_modules(model).values():
            if isinstance(module, ParallelAdapter):
                module.scale = self.scale
        self.train_modules_to_save(model)


class LinConfig(BottleneckConfig):
    """Lin's adapters: one after every block, with a norm of its own, and a task embedding."""

    name: Literal["lin"] = Field("lin", description="The method.")
    bottleneck: int = Field(100, ge=1, description="Hidden size of the adapters; a larger one has more capacity.")
    activation: Activation = Field("relu", description="Activation between down and up; none for a linear adapter.")
    init_std: float = Field(0.02, gt=0, description="Standard deviation of the initial weights.")
    task_embedding: bool = Field(True, description="Add a trained vector to the embedding of every token.")

    def add(self, model: nn.Module) -> None:
        """Add the adapters and the task embedding.

        Raises:
            UsageError: The model has no blocks or no embedding, or no layer is left for adapters.
        """
        self._join(model, list(blocks(model)), BlockAdapter)
        if self.task_embedding:
            name = find_embedding(model)
            if name is None:
                raise UsageError("peft.task_embedding: the model has no plain token embedding")
            embedding = model.get_submodule(name)
            assert isinstance(embedding, nn.Embedding)
            TaskEmbedding(embedding.embedding_dim).join(embedding)
        self.train_modules_to_save(model)


def drop_layers(model: nn.Module, first: int) -> None:
    """Remove the adapters of the first layers from a model, in place: AdapterDrop at inference.

    Norms that trained with these adapters are restored too, so these layers compute what the base does.

    Args:
        model: With bottleneck adapters.
        first: The first layer that keeps its adapters.

    Raises:
        UsageError: The model has no bottleneck adapters, or fewer layers.
    """
    own = own_modules(model)
    block_names = list(blocks(model))
    owners = {module.owner for module in own.values() if isinstance(module, Bottleneck)}
    if not owners:
        raise UsageError("drop_layers: the model has no houlsby, lin or parallel adapters")
    if not 0 <= first <= len(block_names):
        raise UsageError(f"drop_layers: expected 0 to {len(block_names)}, the number of layers, got {first}")
    for name, module in own.items():
        if module.owner not in owners or not 0 <= _layer_of(name, block_names) < first:
            continue
        if module.wraps:
            replace_module(model, name, module.base_layer)
        else:
            module.leave(model.get_submodule(name.rpartition(".")[0]))


def norms(model: nn.Module, first_layer: int = 0) -> list[str]:
    """Names of a model's norms, except those in layers before ``first_layer`` and those that already train."""
    block_names = list(blocks(model))
    chosen = []
    for name, module in model.named_modules():
        # By the class's name: models have norm classes of their own.
        is_norm = type(module).__name__.endswith(("Norm", "BatchNorm2d"))
        if not is_norm or not isinstance(getattr(module, "weight", None), Tensor):
            continue
        is_methods_own = isinstance(module, OwnModule) or matches("base_layer", name)
        if not is_methods_own and not 0 <= _layer_of(name, block_names) < first_layer:
            chosen.append(name)
    return chosen


def _layer_of(name: str, block_names: list[str]) -> int:
    """Index of the block that a module is in; -1 if it is outside all blocks, such as the last norm."""
    for index, block in enumerate(block_names):
        if f"{name}.".startswith(f"{block}."):
            return index
    return -1
