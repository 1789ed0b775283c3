"""LoRA of parameters that belong to no linear layer: the stacked matrices of experts, or a router's weight.

Every matrix of a stack gets an update of its own, ``W_e + s B_e A_e``. Modules are wrapped as a whole, as in PEFT's
``target_parameters``, whose file format this is: all ``A`` are one matrix (E · R, in) and all ``B`` one (out, R · E).

Mixtures of experts, our own and those of transformers' experts interface, compute an update beside the weight, for the
chosen experts only. For any other module, the updated weight is formed in each forward pass, which costs memory for
another copy of it and for its gradient.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lit_lora.hf.experts import expert_layers
from lit_lora.model.moe import ExpertLayer, run_experts
from lit_lora.peft.core.modules import OwnModule, own_modules
from lit_lora.peft.core.updates import LowRank, Update
from lit_lora.peft.lora.linear import Init
from lit_lora.quantize import QuantizedStack, quantized_stacks

__all__ = ["LoRAParameters", "MatrixSize", "adaptable_parameters", "matrix_size"]


class MatrixSize(NamedTuple):
    """What a parameter consists of."""

    matrices: int
    """Number of matrices E; 1 for a parameter of two dimensions."""
    outputs: int
    inputs: int
    transposed: bool
    """Whether each matrix is stored as (in, out)."""


def matrix_size(module: nn.Module, shape: tuple[int, ...]) -> MatrixSize:
    """How a parameter of ``module`` with 2 or 3 dimensions is made of matrices.

    Whether they are transposed is what transformers and PEFT say of it, an attribute of the module.
    """
    if len(shape) == 2:
        return MatrixSize(1, shape[0], shape[1], transposed=False)
    if getattr(module, "is_transposed", False):
        return MatrixSize(shape[0], shape[2], shape[1], transposed=True)
    return MatrixSize(shape[0], shape[1], shape[2], transposed=False)


def adaptable_parameters(model: nn.Module) -> list[str]:
    """Names of the parameters of two or three dimensions outside of linear layers, embeddings and convolutions.

    Quantized stacks of experts are among them.
    """
    others = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    own = own_modules(model)
    inside = tuple(f"{name}." for name in own)
    return [
        f"{name}.{parameter_name}"
        for name, module in model.named_modules()
        if name and name not in own and not name.startswith(inside) and not isinstance(module, others)
        for parameter_name, weight in [*module.named_parameters(recurse=False), *quantized_stacks(module).items()]
        if len(weight.shape) in (2, 3)
    ]


class LoRAParameters(OwnModule):
    """A frozen module, some of whose parameters have a trained low-rank update of each of their matrices.

    Args:
        base_layer: The module; it stays unchanged.
        settings: Rank and scaling of each parameter to adapt, by its name in ``base_layer``, in the order there.
        init: Initialization of ``A``; ``B`` starts at zero.
        train_A: Train ``A`` too.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        settings: Mapping[str, tuple[int, float]],
        init: Init = "kaiming",
        *,
        train_A: bool = True,
    ) -> None:
        super().__init__()
        self.base_layer: nn.Module = base_layer
        self.scalings = {name: scaling for name, (_, scaling) in settings.items()}
        self.sizes: dict[str, MatrixSize] = {}
        for name, (rank, _) in settings.items():
            weight: Tensor | QuantizedStack = getattr(base_layer, name)
            size = matrix_size(base_layer, tuple(weight.shape))
            self.sizes[name] = size
            # In the shapes of files, float32: (E * R, in), and (out, R * E) with the matrices' index running fastest.
            A = torch.empty(size.matrices * rank, size.inputs, dtype=torch.float32, device=weight.device)
            B = torch.zeros(size.outputs, rank * size.matrices, dtype=torch.float32, device=weight.device)
            if init == "kaiming":
                nn.init.kaiming_uniform_(A, a=math.sqrt(5))
            else:
                nn.init.normal_(A, std=1 / rank)
            self.register_parameter(f"lora_A_{name}", nn.Parameter(A, requires_grad=train_A))
            self.register_parameter(f"lora_B_{name}", nn.Parameter(B))

    @property
    def rank(self) -> str:
        """The rank, or several, for tables."""
        ranks = {self.factors(name)[0].shape[1] for name in self.sizes}
        return " and ".join(map(str, sorted(ranks)))

    def __getattr__(self, name: str) -> Any:
        """An attribute of the wrapped module; an adapted parameter with its update.

        Models read sizes from their experts, and weights and corrections from their routers.
        """
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in self.__dict__.get("sizes", ()):
                return self._sum(name)
            return getattr(super().__getattr__("base_layer"), name)

    @property
    def weight(self) -> Tensor:
        """The weight of a router, with its update if it has one."""
        weight: Tensor = self.__getattr__("weight")
        return weight

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """``A`` (E, R, in) and ``B`` (E, out, R) of a parameter, as views."""
        size = self.sizes[name]
        A = self.get_parameter(f"lora_A_{name}").view(size.matrices, -1, size.inputs)
        B = self.get_parameter(f"lora_B_{name}").view(size.outputs, -1, size.matrices).permute(2, 0, 1)
        return A, B

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the base layer computes with updated parameters."""
        experts = None if kwargs else expert_layers(self.base_layer)
        if experts is not None and len(args) == 3 and args[0].dim() == 2:
            first, second = (self._updated(name, layer) for name, layer in experts.layers.items())
            return run_experts(*args, first, second, experts.activate)
        values = {name: self._sum(name) for name in self.sizes}
        return functional_call(self.base_layer, values, args, kwargs)

    def _updated(self, name: str, layer: ExpertLayer) -> ExpertLayer:
        """The same layer with the update of its parameter, if it has one."""
        if name not in self.sizes:
            return layer
        A, B = self.factors(name)
        return ExpertLayer(layer.weight, layer.bias, layer.transposed, A, B, self.scalings[name])

    def _sum(self, name: str) -> Tensor:
        """A parameter with its update, in its shape and dtype."""
        stored: Tensor | QuantizedStack = getattr(self.base_layer, name)
        weight = stored if isinstance(stored, Tensor) else stored.dequantize()
        left, right = self._product(name)
        update = (left.to(weight.dtype) @ right.to(weight.dtype)).view_as(weight)
        return weight + self.scalings[name] * update

    def _product(self, name: str) -> tuple[Tensor, Tensor]:
        """The factors whose product has the shape of the parameter, with a dimension for its matrices."""
        A, B = self.factors(name)
        return (A.mT, B.mT) if self.sizes[name].transposed else (B, A)

    def updates(self) -> dict[str, Update]:
        """``W_e + s B_e A_e`` of every adapted parameter."""
        updates: dict[str, Update] = {}
        for name in self.sizes:
            left, right = (factor.detach() for factor in self._product(name))
            if len(getattr(self.base_layer, name).shape) == 2:
                left, right = left[0], right[0]
            updates[name] = LowRank(left, right, self.scalings[name])
        return updates

    def file_tensors(self) -> dict[str, Tensor]:
        """The factors under PEFT's names, by which the last parameter's wrapper holds that of the one before it."""
        tensors: dict[str, Tensor] = {}
        for depth, name in enumerate(reversed(self.sizes)):
            prefix = "base_layer." * depth
            tensors[f"{prefix}lora_A.weight"] = self.get_parameter(f"lora_A_{name}")
            tensors[f"{prefix}lora_B.weight"] = self.get_parameter(f"lora_B_{name}")
        return tensors

    def extra_repr(self) -> str:
        """Names, shapes and scalings."""
        return ", ".join(f"{name}: rank={self.rank}, scaling={self.scalings[name]:g}" for name in self.sizes)
