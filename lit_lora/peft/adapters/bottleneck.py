"""Bottleneck adapters: a small network with a narrow middle, added to what a part of a block gives.

::

    serial:    x ─► host ─► h ──┬────────────────────────► + ──►      parallel:  x ──┬─► host ──────────────► + ──►
                                └─► down ─► φ ─► up ───────┘                         └─► down ─► φ ─► up ─► s ┘

``a(h) = h + up φ(down h)`` after attention and after the MLP of every block, before the residual addition, for
Houlsby et al. 2019, "Parameter-Efficient Transfer Learning for NLP", section 2.1; ``host(x) + s up φ(down x)`` beside
the MLP for He et al. 2021, "Towards a Unified View of Parameter-Efficient Transfer Learning", table 1 (scaled
parallel adapter); after the whole block behind a new layer norm, with a task embedding, for Lin et al. 2020,
"Exploring Versatile Generative Language Model Via Parameter-Efficient Transfer Learning", section 2.

AdapterDrop (Rückle et al. 2020, "AdapterDrop: On the Efficiency of Adapters in Transformers") leaves the first layers
without adapters: always the same ones, or so many as are drawn anew for every batch. Nothing below the first adapter
is differentiated, so fewer adapters are faster.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from lit_lora.errors import UsageError
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
    """From which layer on there are adapters in this forward pass: drawn by the first one, in training."""

    def __init__(self, layers: int) -> None:
        self.layers, self.first = layers, 0

    def draw(self) -> None:
        """Uniform from 0 (all adapters) to all layers but the last."""
        self.first = int(torch.randint(self.layers, ()))


class Bottleneck(AddedModule):
    """``up φ(down x)``, float32 weights computed in the dtype of ``x``; subclasses say where it is added.

    Args:
        width: D.
        bottleneck: Width of the middle, m.
        activation: φ.
        std: Of the normal that the weights start with, cut off at two of them.
        zero: ``up`` starts at zero: then nothing changes at first.
    """

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
        self.layer, self.drop, self.draws = 0, None, False

    layer: int
    drop: Drop | None
    draws: bool

    @property
    def skipped(self) -> bool:
        """Whether this forward pass leaves it out."""
        if self.drop is None or not self.training:
            return False
        if self.draws:
            self.drop.draw()
        return self.layer < self.drop.first

    def branch(self, x: Tensor) -> Tensor:
        """(..., D) to (..., D)."""
        dtype = x.dtype
        middle = _ACTIVATIONS[self.activation](F.linear(x, self.down.to(dtype), self.down_bias.to(dtype)))
        return F.linear(middle, self.up.to(dtype), self.up_bias.to(dtype))

    def extra_repr(self) -> str:
        """Sizes."""
        return f"{self.down.shape[1]}, bottleneck {self.down.shape[0]}"


class SerialAdapter(Bottleneck):
    """``h + up φ(down h)`` of its host's output ``h``."""

    def after(self, host: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """(..., D) to (..., D)."""
        return output if self.skipped else output + self.branch(output)


class ParallelAdapter(Bottleneck):
    """``host(x) + s up φ(down x)``."""

    child = "parallel_adapter"
    scale: float = 1.0

    def after(self, host: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """(..., D) to (..., D)."""
        return output if self.skipped else output + self.scale * self.branch(args[0])


class BlockAdapter(Bottleneck):
    """``h + up φ(down LN(h))`` of a whole block's output."""

    def __init__(self, width: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(width, *args, **kwargs)
        self.norm, self.norm_bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def after(self, host: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """A block's output: a tensor, or the residual stream with what is to be added to it, or more beside it."""
        if self.skipped:
            return output
        if isinstance(output, Tensor):
            return output + self.branch(self._normed(output))
        first, second, *rest = (*output, None)[: max(len(output), 2)]
        if isinstance(second, Tensor) and second.shape == first.shape:
            stream = first + second
            return (stream, self.branch(self._normed(stream)), *rest)
        return (first + self.branch(self._normed(first)), *output[1:])

    def _normed(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.float(), x.shape[-1:], self.norm, self.norm_bias).to(x.dtype)


class TaskEmbedding(AddedModule):
    """A vector that says which task it is, added to every embedded token."""

    child = "task"

    def __init__(self, width: int) -> None:
        super().__init__()
        self.vector = nn.Parameter(torch.zeros(width))

    def after(self, host: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """(..., D) to (..., D)."""
        return output + self.vector.to(output.dtype)


class BottleneckConfig(WithModulesToSave):
    """What the bottleneck adapters share."""

    default_lr: ClassVar[float | None] = 1e-3
    bottleneck: int = Field(64, ge=1, description="Width of the middle: more, more capacity.")
    activation: Activation = Field("gelu", description="Between down and up; none makes the adapter linear.")
    init_std: float = Field(1e-3, gt=0, description="Standard deviation of the weights at first.")
    init_zero: bool = Field(False, description="Start with up at zero, which changes nothing at first.")
    drop_layers: int | Literal["random"] = Field(
        0,
        description="AdapterDrop: so many first layers get no adapter; random draws how many anew for every batch, "
        "so that the trained adapter works with any of them left out.",
    )

    @property
    def graph_safe(self) -> bool:
        """Unless it is drawn for every batch which layers have an adapter."""
        return self.drop_layers != "random"

    @property
    def about(self) -> str:
        """Name and bottleneck."""
        return f"{self.model_dump()['name']} adapter, bottleneck {self.bottleneck}"

    def _first_layer(self, layers: int) -> int:
        first = 0 if self.drop_layers == "random" else self.drop_layers
        if not 0 <= first < layers:
            raise UsageError(f"peft.drop_layers: {first}, expected less than the {layers} layers there are, from 0 on")
        return first

    def _join(self, model: nn.Module, hosts: list[str], kind: type[Bottleneck]) -> None:
        """An adapter of a kind into every host that is not in a dropped layer."""
        names = list(blocks(model))
        layer = {host: _layer_of(host, names) for host in hosts}
        first = self._first_layer(len(names))
        drop = Drop(len(names)) if self.drop_layers == "random" else None
        for host in [host for host in hosts if layer[host] >= first]:
            module = model.get_submodule(host)
            width = width_of(module)
            adapter = kind(width, self.bottleneck, self.activation, self.init_std, zero=self.init_zero)
            adapter.layer, adapter.drop, adapter.draws = layer[host], drop, host == hosts[0]
            adapter.join(module)


class HoulsbyConfig(BottleneckConfig):
    """Houlsby adapters: two in every block, after attention and after the MLP."""

    name: Literal["houlsby"] = Field("houlsby", description="The method.")
    target_modules: list[str] = Field(
        default_names("attention", "mlp"),
        min_length=1,
        description="Modules whose output gets an adapter; [mlp] is Pfeiffer's.",
    )
    train_norms: bool = Field(True, description="Train the norms of the layers with adapters too.")

    @model_validator(mode="after")
    def _norms_or_random(self) -> HoulsbyConfig:
        if self.train_norms and self.drop_layers == "random":
            raise ValueError("drop_layers: random leaves out adapters and not norms, expected train_norms: false")
        return self

    def add(self, model: nn.Module) -> None:
        """Add the adapters, and let the norms train.

        Raises:
            UsageError: A target matches nothing, or more layers are dropped than there are.
        """
        names = [name for name, module in model.named_modules() if name and not isinstance(module, OwnModule)]
        hosts = select(with_names_of(self, model).target_modules, names, key="peft.target_modules")
        self._join(model, hosts, SerialAdapter)
        if self.train_norms:
            for name in norms(model, self._first_layer(len(blocks(model)))):
                replace_module(model, name, TrainedCopy(model.get_submodule(name)))
        self.train_modules_to_save(model)


class ParallelConfig(BottleneckConfig):
    """Parallel adapters: beside the MLP of every block, reading its input."""

    name: Literal["parallel"] = Field("parallel", description="The method.")
    target_modules: list[str] = Field(
        default_names("mlp"), min_length=1, description="Modules that get an adapter beside them."
    )
    activation: Activation = Field("relu", description="Between down and up; none makes the adapter linear.")
    init_std: float = Field(0.02, gt=0, description="Standard deviation of down at first.")
    init_zero: bool = Field(True, description="Start with up at zero, which changes nothing at first.")
    scale: float = Field(4.0, gt=0, description="Factor of the adapter's output.")

    def add(self, model: nn.Module) -> None:
        """Add the adapters.

        Raises:
            UsageError: A target matches nothing, or more layers are dropped than there are.
        """
        names = [name for name, module in model.named_modules() if name and not isinstance(module, OwnModule)]
        hosts = select(with_names_of(self, model).target_modules, names, key="peft.target_modules")
        self._join(model, hosts, ParallelAdapter)
        for module in own_modules(model).values():
            if isinstance(module, ParallelAdapter):
                module.scale = self.scale
        self.train_modules_to_save(model)


class LinConfig(BottleneckConfig):
    """Lin's adapters: one after every block, behind a norm of its own, and a task embedding."""

    name: Literal["lin"] = Field("lin", description="The method.")
    bottleneck: int = Field(100, ge=1, description="Width of the middle: more, more capacity.")
    activation: Activation = Field("relu", description="Between down and up; none makes the adapter linear.")
    init_std: float = Field(0.02, gt=0, description="Standard deviation of the weights at first.")
    task_embedding: bool = Field(True, description="Add a trained vector to every embedded token.")

    def add(self, model: nn.Module) -> None:
        """Add the adapters and the task embedding.

        Raises:
            UsageError: The model has no blocks or no embedding, or more layers are dropped than there are.
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
    """Take the adapters of the first layers out of a model, in place: AdapterDrop at inference.

    Norms that train with the adapters go back to the base's there, so these layers compute what the base does.

    Args:
        model: With bottleneck adapters.
        first: The first layer that keeps its adapters.

    Raises:
        UsageError: There are no bottleneck adapters, or fewer layers.
    """
    own, names = own_modules(model), list(blocks(model))
    owners = {module.owner for module in own.values() if isinstance(module, Bottleneck)}
    if not owners:
        raise UsageError("drop_layers: the model has no adapters of the kinds houlsby, lin or parallel")
    if not 0 <= first <= len(names):
        raise UsageError(f"drop_layers: {first}, expected 0 to {len(names)}, the layers that there are")
    for name, module in own.items():
        if module.owner in owners and 0 <= _layer_of(name, names) < first:
            if module.wraps:
                replace_module(model, name, module.base_layer)
            else:
                module.leave(model.get_submodule(name.rpartition(".")[0]))


def norms(model: nn.Module, first_layer: int = 0) -> list[str]:
    """Names of the norms in a model, those in layers before ``first_layer`` left out."""
    names = list(blocks(model))
    return [
        name
        for name, module in model.named_modules()
        if type(module).__name__.endswith(("Norm", "BatchNorm2d"))
        and not isinstance(module, OwnModule)
        and isinstance(getattr(module, "weight", None), Tensor)
        and not 0 <= _layer_of(name, names) < first_layer
        and not matches("base_layer", name)
    ]


def _layer_of(name: str, names: list[str]) -> int:
    """The block that a module lies in; -1 for none of them."""
    return next((index for index, block in enumerate(names) if f"{name}.".startswith(f"{block}.")), -1)
