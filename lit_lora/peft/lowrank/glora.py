"""GLoRA: trained terms on weight and bias, in forms that may differ from layer to layer.

``y = (W + W * A + B) x + b + b * D + E + W C``. ``A`` and ``B`` are a low-rank product, a vector with one value per
output, one constant, or absent; ``C`` is a product or a vector over the inputs; ``D`` and ``E`` are a vector or a
constant. All start at zero. Only layers with a bias have ``C``, ``D`` and ``E``. The forms are given, or found by a
search; see ``glora_search``.
Source: Chavan et al. 2023, "One-for-All: Generalized LoRA for Parameter-Efficient Fine-tuning", equations 10 and 11.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from lit_lora.config import Settings, validate
from lit_lora.errors import UsageError
from lit_lora.peft.core.adapter_method import CONFIG
from lit_lora.peft.core.capabilities import FinalizesAfterTraining
from lit_lora.peft.core.matching import matches, select
from lit_lora.peft.core.modules import OwnModule, device_of, own_modules, replace_module
from lit_lora.peft.core.targeted import TargetedMethod, check_rank
from lit_lora.peft.core.updates import LowRank, Scaled, Update
from lit_lora.peft.lowrank.glora_search import Search, evolve, narrower

__all__ = ["Forms", "GLoRAConfig", "GLoRALinear"]

MatrixForm = Literal["lora", "vector", "constant", "none"]
InputForm = Literal["lora", "vector", "none"]
BiasForm = Literal["vector", "constant", "none"]


class Forms(Settings):
    """The forms of the five terms."""

    A: MatrixForm = Field("lora", description="Form of the weight's factor: lora, vector, constant or none.")
    B: MatrixForm = Field("lora", description="Form of the weight's offset: lora, vector, constant or none.")
    C: InputForm = Field("none", description="Form of the bias's offset through the weight: lora, vector or none.")
    D: BiasForm = Field("none", description="Form of the bias's factor: vector, constant or none.")
    E: BiasForm = Field("none", description="Form of the bias's offset: vector, constant or none.")


class Term(nn.Module):
    """A trained matrix (rows, columns) with float32 parameters, which starts at zero.

    Args:
        form: ``lora``: Xd (rows, R) zero and Xu (R, columns) random; ``vector``: X (rows, 1); ``constant``: X (1,).
        rows: Rows of the matrix.
        columns: Columns of the matrix.
        rank: R.
        device: Device of the parameters.
    """

    def __init__(self, form: str, rows: int, columns: int, rank: int, device: torch.device) -> None:
        super().__init__()
        self.form = form  # the form it is computed in, which a search changes
        self.widest = form  # the form that its parameters have
        self.rows = rows
        self.columns = columns
        if form == "lora":
            self.Xd = nn.Parameter(torch.zeros(rows, rank, device=device))
            self.Xu = nn.Parameter(torch.empty(rank, columns, device=device))
            nn.init.kaiming_uniform_(self.Xu, a=math.sqrt(5))
        else:
            self.X = nn.Parameter(torch.zeros((rows, 1) if form == "vector" else (1,), device=device))

    @property
    def value(self) -> Tensor:
        """The matrix (rows, columns); (rows, 1) if all columns are the same, as in a vector or constant."""
        if self.form == "lora":
            return self.Xd @ self.Xu
        return self._column().expand(self.rows, 1)

    def _column(self) -> Tensor:
        """The parameters of a vector (rows, 1) or constant, which may be a part of those of a wider form."""
        column = self.Xd[:, :1] if self.widest == "lora" else self.X
        return column[:1] if self.form == "constant" else column

    def size(self, form: str) -> int:
        """Trainable parameters that the term has in a form, its widest or a narrower one."""
        if form == "lora":
            return self.Xd.numel() + self.Xu.numel()
        return {"vector": self.rows, "constant": 1, "none": 0}[form]

    @torch.no_grad()
    def narrowed(self, form: str) -> Term:
        """A term in a form that keeps only the parameters it needs; this one itself if it needs all."""
        self.form = form
        if form == self.widest:
            return self
        column = self._column()
        term = Term(form, self.rows, self.columns, rank=1, device=column.device)
        term.X.copy_(column.reshape(term.X.shape))
        return term

    def factors(self) -> LowRank:
        """The matrix as a detached product."""
        if self.form == "lora":
            return LowRank(self.Xd.detach(), self.Xu.detach(), 1.0)
        left = self._column().detach().expand(self.rows, 1)
        return LowRank(left, torch.ones_like(left[:1]).expand(1, self.columns), 1.0)


class GLoRALinear(OwnModule):
    """A frozen linear layer with trained terms on its weight and its bias.

    Args:
        base_layer: The linear layer; it stays unchanged.
        forms: The terms' forms; C, D and E apply only if the layer has a bias.
        rank: Rank of low-rank terms.
        searching: Draw new forms, the given ones or narrower, for each forward pass in training.
    """

    def __init__(self, base_layer: nn.Linear, forms: Forms, rank: int, *, searching: bool = False) -> None:
        super().__init__()
        self.base_layer: nn.Linear = base_layer
        self.searching = searching
        rows, columns = base_layer.out_features, base_layer.in_features
        shapes = {"A": (rows, columns), "B": (rows, columns)}
        if base_layer.bias is not None:
            shapes |= {"C": (columns, 1), "D": (rows, 1), "E": (rows, 1)}
        form_of = forms.model_dump()
        self.terms = nn.ModuleDict()
        for name, shape in shapes.items():
            if form_of[name] != "none":
                self.terms[name] = Term(form_of[name], *shape, rank, device_of(base_layer))

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in) to (..., out)."""
        if self.searching and self.training:
            # Activation checkpointing restores the random state, so a recomputed pass draws the same forms.
            choices = self.choices
            self.take(choices[int(torch.randint(len(choices), ()))])
        weight = self.base_layer.weight
        A = self._term("A")
        B = self._term("B")

        # Low-rank terms are computed apart from W x: added to W, small changes would be lost to rounding in its dtype.
        change: Tensor | None = None
        if A is not None and A.form == "lora":
            change = nn.functional.linear(x, (weight * A.value).to(x.dtype))
        if B is not None and B.form == "lora":
            low = nn.functional.linear(x, B.Xu.to(x.dtype))
            change_B = nn.functional.linear(low, B.Xd.to(x.dtype))
            change = change_B if change is None else change + change_B

        if change is not None and (A is None or A.form == "lora"):
            # W x accumulates onto the change and their sum is rounded once, else small changes would be lost again.
            y = torch.addmm(change.flatten(0, -2), x.flatten(0, -2), weight.T).view_as(change)
        else:
            y = nn.functional.linear(x, weight)
            if A is not None:  # a vector or constant: one factor per output
                y = y + y * A.value[:, 0]
            if change is not None:
                y = y + change
        if B is not None and B.form != "lora":  # the same value in a whole row of the weight
            y = y + x.sum(-1, keepdim=True) * B.value[:, 0]
        if self.base_layer.bias is not None:
            y = y + self._bias()
        return y.to(x.dtype)

    def _bias(self) -> Tensor:
        """``b + b * D + E + W C``, (out,) float32."""
        C = self._term("C")
        D = self._term("D")
        E = self._term("E")
        base = self.base_layer.bias.float()
        bias = base
        if D is not None:
            bias = bias + base * D.value[:, 0]
        if E is not None:
            bias = bias + E.value[:, 0]
        if C is not None:
            bias = bias + self.base_layer.weight.to(bias.dtype) @ C.value[:, 0].to(bias.dtype)
        return bias

    def _term(self, name: str) -> Term | None:
        """A term, unless it is absent or, in a search, has the form none for now."""
        term = self._terms.get(name)
        return None if term is None or term.form == "none" else term

    @property
    def _terms(self) -> dict[str, Term]:
        return {name: term for name, term in self.terms.items() if isinstance(term, Term)}

    @property
    def choices(self) -> list[dict[str, str]]:
        """All combinations of forms that the terms can take with their parameters, by term; the widest first."""
        options = {name: narrower(term.widest, constant=name != "C") for name, term in self._terms.items()}
        return [dict(zip(options, forms, strict=True)) for forms in itertools.product(*options.values())]

    def take(self, forms: Mapping[str, str]) -> None:
        """Compute the terms in these forms from now on; the parameters stay."""
        for name, form in forms.items():
            self._terms[name].form = form

    def train(self, mode: bool = True) -> GLoRALinear:
        """Set the mode; in a search, evaluation uses the widest forms, not those drawn last."""
        if self.searching and self.training and not mode:
            self.take(self.choices[0])
        super().train(mode)
        return self

    def finalize(self, forms: Mapping[str, str]) -> None:
        """Keep only these forms and their parameters, in place."""
        self.searching = False
        for name, form in forms.items():
            if form == "none":
                del self.terms[name]
            else:
                self.terms[name] = self._terms[name].narrowed(form)

    def size(self, forms: Mapping[str, str]) -> int:
        """Trainable parameters in these forms."""
        return sum(self._terms[name].size(form) for name, form in forms.items())

    def updates(self) -> dict[str, Update]:
        """``W * (1 + A) + B``, and ``b * (1 + D) + E + W C``."""
        A, B, C, D, E = (self._term(name) for name in "ABCDE")
        updates: dict[str, Update] = {}
        if A is not None or B is not None:
            updates["weight"] = Scaled(
                factor=None if A is None else A.factors(), offset=None if B is None else B.factors()
            )
        if C is not None or D is not None or E is not None:
            offset = torch.zeros(self.base_layer.out_features, 1, device=device_of(self.base_layer))
            if E is not None:
                offset = offset + E.value.detach()
            if C is not None:
                offset = offset + self.base_layer.weight.detach().to(offset.dtype) @ C.value.detach()
            updates["bias"] = Scaled(
                factor=None if D is None else D.factors(), offset=LowRank(offset, torch.ones_like(offset[:1]), 1.0)
            )
        return updates

    def file_tensors(self) -> dict[str, Tensor]:
        """The parameters under PEFT's names and in its shapes, which are flat for D and E."""
        tensors: dict[str, Tensor] = {}
        for name, value in self.terms.named_parameters():
            tensors[f"glora_{name}"] = value.flatten() if name in ("D.X", "E.X") else value
        return tensors


class GLoRAConfig(TargetedMethod, Forms, FinalizesAfterTraining):
    """GLoRA: trained terms on weight and bias, in forms chosen for all layers or by name."""

    peft_type: ClassVar[str] = "GLORA"
    peft_keys: ClassVar[frozenset[str]] = frozenset(
        ["r", "config_A_B", "config_C", "config_D_E", "init_weights", "bias"]
    )

    name: Literal["glora"] = Field("glora", description="The method.")
    rank: int = Field(4, ge=1, description="Rank of the low-rank terms.")
    forms_pattern: dict[str, Forms] = Field(
        {}, description="Other forms (A to E) by module name; the first match applies."
    )
    search: Search | None = Field(
        None,
        description="Search for each layer's forms, among the given and narrower ones, by evolution on the validation "
        "rows after training; {} uses the defaults. Every training step then draws new forms.",
    )

    @property
    def graph_safe(self) -> bool:
        """Not with a search, which draws new forms in every step."""
        return self.search is None

    @property
    def title(self) -> str:
        """The method's name as written in text."""
        return "GLoRA"

    def forms(self, name: str) -> Forms:
        """The forms of a module."""
        for pattern, forms in self.forms_pattern.items():
            if matches(pattern, name):
                return forms
        return Forms(A=self.A, B=self.B, C=self.C, D=self.D, E=self.E)

    def rank_of(self, name: str) -> int:
        """The rank of every update."""
        return self.rank

    def wrapped(self, targets: Mapping[str, nn.Linear]) -> dict[str, OwnModule]:
        """The wrappers of the targets; one all of whose terms are absent is not wrapped.

        Raises:
            UsageError: Nothing would train, a rank is too large, or C, D or E is given and no target has a bias.
        """
        select(self.forms_pattern, targets, key="peft.forms_pattern")
        forms_of = {name: self.forms(name) for name in targets}
        change_bias = any({forms.C, forms.D, forms.E} != {"none"} for forms in forms_of.values())
        if change_bias and all(base.bias is None for base in targets.values()):
            raise UsageError("peft: C, D and E change biases, but no target has one", hint="leave them at none")

        wrapped: dict[str, OwnModule] = {}
        for name, base in targets.items():
            forms = forms_of[name]
            if "lora" in (forms.A, forms.B):
                check_rank(self.rank, name, (base.out_features, base.in_features))
            module = GLoRALinear(base, forms, self.rank, searching=self.search is not None)
            if len(module.terms):
                wrapped[name] = module
        if not wrapped:
            raise UsageError("peft: all forms are none, so nothing would train")
        return wrapped

    @property
    def finalizes(self) -> bool:
        """Whether forms are chosen after training."""
        return self.search is not None

    def finalize(self, model: nn.Module, score: Callable[[], float]) -> GLoRAConfig:
        """Choose the forms of every layer by the search, in place, and return settings that name them.

        Raises:
            UsageError: The search finds no selection within its budget.
        """
        if self.search is None:
            return self
        layers = {name: module for name, module in own_modules(model).items() if isinstance(module, GLoRALinear)}
        choices = {name: layer.choices for name, layer in layers.items()}
        sizes = [[layer.size(forms) for forms in choices[name]] for name, layer in layers.items()]

        def loss_of(genes: tuple[int, ...]) -> float:
            for (name, layer), gene in zip(layers.items(), genes, strict=True):
                layer.take(choices[name][gene])
            return score()

        genes, _ = evolve(sizes, self.search, loss_of)

        forms_pattern: dict[str, Forms] = {}
        for (name, layer), gene in zip(layers.items(), genes, strict=True):
            forms = choices[name][gene]
            layer.finalize(forms)
            if layer.terms:
                absent = dict.fromkeys(Forms.model_fields, "none")
                forms_pattern[name] = Forms.model_validate({**absent, **forms})
            else:
                replace_module(model, name, layer.base_layer)
        chosen = {
            "target_modules": list(forms_pattern),
            "forms_pattern": forms_pattern,
            "exclude_modules": [],
            "layers": None,
            "search": None,
        }
        return self.model_copy(update=chosen)

    @property
    def _known_to_peft(self) -> bool:
        """Whether PEFT supports these forms: the same in all layers, one for A and B, and one for D and E."""
        return self.A == self.B != "none" and self.D == self.E and not self.forms_pattern

    def file_tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """The terms' parameters; in PEFT's format also zeros for absent terms, which it requires."""
        tensors = super().file_tensors(model)
        if not self._known_to_peft:
            return tensors
        for name, module in own_modules(model).items():
            if not isinstance(module, GLoRALinear):
                continue
            rows, columns = module.base_layer.out_features, module.base_layer.in_features
            for term, shape in {"C": (columns, 1), "D": (rows,), "E": (rows,)}.items():
                if term not in module.terms:
                    tensors[f"{name}.glora_{term}.zeros"] = torch.zeros(shape)
        return tensors

    @classmethod
    def filler(cls, name: str) -> bool:
        """The zeros of absent terms."""
        return name.endswith(".zeros")

    def peft_config(self, model: nn.Module) -> dict[str, Any]:
        """``adapter_config.json`` without the base model's name; with a type of our own for forms that PEFT lacks."""
        return {
            **super().peft_config(model),
            "peft_type": "GLORA" if self._known_to_peft else "LIT_LORA_GLORA",
            "task_type": "CAUSAL_LM",
            "inference_mode": True,
            "r": self.rank,
            "config_A_B": self.A,
            "config_C": self.C,
            "config_D_E": self.D,
            "bias": "none",
        }

    @classmethod
    def from_peft(cls, raw: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> GLoRAConfig:
        """Settings of an adapter that PEFT wrote, with full module names: one form for A and B, one for D and E."""
        weight_form = raw.get("config_A_B", "lora")
        input_form = raw.get("config_C", "lora")
        bias_form = raw.get("config_D_E", "constant")
        # PEFT names forms of C, D and E even if no layer has a bias; the file then has zeros for them.
        if not any(re.search(r"\.glora_[CDE]\.X", name) for name in tensors):
            input_form = bias_form = "none"
        settings = {
            "name": "glora",
            "rank": raw.get("r", 8),
            "target_modules": list(dict.fromkeys(name.partition(".glora_")[0] for name in tensors)),
            "A": weight_form,
            "B": weight_form,
            "C": input_form,
            "D": bias_form,
            "E": bias_form,
        }
        return validate(settings, cls, name=CONFIG)
