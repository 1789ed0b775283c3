"""GLoRA: trained terms on weight and bias, each in a form of its own for every layer.

``y = (W + W * A + B) x + b + b * D + E + W C``. ``A`` and ``B`` are a low-rank product, a vector with a value per
output, one constant, or absent; ``C`` a product or a vector over the inputs; ``D`` and ``E`` a vector or a constant.
All start at zero. Only layers with a bias have ``C``, ``D`` and ``E``. ``search`` finds
the forms; see ``glora_search``.
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

    A: MatrixForm = Field("lora", description="The weight's factor: lora, vector, constant or none.")
    B: MatrixForm = Field("lora", description="What is added to the weight: lora, vector, constant or none.")
    C: InputForm = Field("none", description="What, times the weight, is added to the bias: lora, vector or none.")
    D: BiasForm = Field("none", description="The bias's factor: vector, constant or none.")
    E: BiasForm = Field("none", description="What is added to the bias: vector, constant or none.")


class Term(nn.Module):
    """A matrix (rows, columns) as a product of two float32 factors that starts at zero.

    Args:
        form: ``lora``: Xd (rows, R) zero and Xu (R, columns) random; ``vector``: X (rows, 1); ``constant``: X (1,).
        rows: Of the matrix.
        columns: Of the matrix.
        rank: R.
        device: Of the factors.
    """

    def __init__(self, form: str, rows: int, columns: int, rank: int, device: torch.device) -> None:
        super().__init__()
        self.form, self.rows, self.columns = form, rows, columns
        self.widest = form
        if form == "lora":
            self.Xd = nn.Parameter(torch.zeros(rows, rank, device=device))
            self.Xu = nn.Parameter(torch.empty(rank, columns, device=device))
            nn.init.kaiming_uniform_(self.Xu, a=math.sqrt(5))
        else:
            self.X = nn.Parameter(torch.zeros((rows, 1) if form == "vector" else (1,), device=device))

    @property
    def value(self) -> Tensor:
        """The matrix; what is the same in every column has one."""
        return self.Xd @ self.Xu if self.form == "lora" else self._column().expand(self.rows, 1)

    def _column(self) -> Tensor:
        """The numbers of a vector or of a constant: part of the term's where it could be wider."""
        column = self.Xd[:, :1] if self.widest == "lora" else self.X
        return column[:1] if self.form == "constant" else column

    def size(self, form: str) -> int:
        """Numbers that the term has in a form."""
        lora = (self.rows + self.columns) * self.Xd.shape[1] if self.widest == "lora" else 0
        return {"lora": lora, "vector": self.rows, "constant": 1, "none": 0}[form]

    @torch.no_grad()
    def narrowed(self, form: str) -> Term:
        """A term of that form with the numbers of this one."""
        if form == self.widest:
            self.form = form
            return self
        self.form, rank = form, self.Xd.shape[1] if self.widest == "lora" else 1
        term = Term(form, self.rows, self.columns, rank, self._column().device)
        term.X.copy_(self._column().reshape(term.X.shape))
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
        base_layer: The linear layer; it stays as it is.
        forms: The terms' forms; those of the bias hold where there is one.
        rank: Of low-rank terms.
        searching: Forms are drawn anew, the given ones or narrower, for each pass in training.
    """

    def __init__(self, base_layer: nn.Linear, forms: Forms, rank: int, *, searching: bool = False) -> None:
        super().__init__()
        self.base_layer: nn.Linear = base_layer
        self.searching = searching
        out, wide = base_layer.out_features, base_layer.in_features
        shapes = {"A": (out, wide), "B": (out, wide)}
        if base_layer.bias is not None:
            shapes |= {"C": (wide, 1), "D": (out, 1), "E": (out, 1)}
        chosen = forms.model_dump()
        self.terms = nn.ModuleDict(
            {
                name: Term(chosen[name], *shape, rank, device_of(base_layer))
                for name, shape in shapes.items()
                if chosen[name] != "none"
            }
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in) to (..., out)."""
        if self.searching and self.training:  # checkpointed activations draw the same again: torch keeps the state
            self.take(self.choices[int(torch.randint(len(self.choices), ()))])
        weight, bias = self.base_layer.weight, self.base_layer.bias
        A, B = self._term("A"), self._term("B")
        change: Tensor | None = None
        if A is not None and A.form == "lora":  # apart from W, or rounding to its dtype would lose small changes
            change = nn.functional.linear(x, (weight * A.value).to(x.dtype))
        if B is not None and B.form == "lora":
            low = nn.functional.linear(nn.functional.linear(x, B.Xu.to(x.dtype)), B.Xd.to(x.dtype))
            change = low if change is None else change + low
        factor = A.value[:, 0] if A is not None and A.form != "lora" else None
        if change is not None and factor is None:
            # Onto the change: a base output that is rounded before a small one is added loses it.
            y = torch.addmm(change.flatten(0, -2), x.flatten(0, -2), weight.T).view_as(change)
        else:
            y = nn.functional.linear(x, weight)
            y = y if factor is None else y + y * factor
            y = y if change is None else y + change
        if B is not None and B.form != "lora":
            y = y + x.sum(-1, keepdim=True) * B.value[:, 0]
        return (y if bias is None else y + self._bias()).to(x.dtype)

    def _bias(self) -> Tensor:
        """``b + b * D + E + W C``, (out,) float32."""
        bias = self.base_layer.bias.float()
        C, D, E = self._term("C"), self._term("D"), self._term("E")
        total = bias if D is None else bias + bias * D.value[:, 0]
        total = total if E is None else total + E.value[:, 0]
        return total if C is None else total + self.base_layer.weight.to(total.dtype) @ C.value[:, 0].to(total.dtype)

    def _term(self, name: str) -> Term | None:
        term = self._terms.get(name)
        return None if term is None or term.form == "none" else term

    @property
    def _terms(self) -> dict[str, Term]:
        return {name: term for name, term in self.terms.items() if isinstance(term, Term)}

    @property
    def choices(self) -> list[dict[str, str]]:
        """Forms by term: all that the terms' numbers can take, the widest first."""
        options = {name: narrower(term.widest, constant=name != "C") for name, term in self._terms.items()}
        return [dict(zip(options, forms, strict=True)) for forms in itertools.product(*options.values())]

    def take(self, forms: Mapping[str, str]) -> None:
        """Compute in these forms, by term, in place; the numbers stay."""
        for name, form in forms.items():
            self._terms[name].form = form

    def train(self, mode: bool = True) -> GLoRALinear:
        """While it searches, what is measured between steps has the widest forms."""
        if self.searching and self.training and not mode:
            self.take(self.choices[0])
        super().train(mode)
        return self

    def finalize(self, forms: Mapping[str, str]) -> None:
        """Keep these forms and drop all other numbers, in place."""
        self.searching = False
        for name, form in forms.items():
            if form == "none":
                del self.terms[name]
            else:
                self.terms[name] = self._terms[name].narrowed(form)

    def size(self, forms: Mapping[str, str]) -> int:
        """Trained numbers in these forms."""
        return sum(self._terms[name].size(form) for name, form in forms.items())

    def updates(self) -> dict[str, Update]:
        """``W * (1 + A) + B``, and ``b * (1 + D) + E + W C``."""
        A, B, C, D, E = (self._term(name) for name in "ABCDE")
        A_low, B_low, D_low = (term.factors() if term is not None else None for term in (A, B, D))
        updates: dict[str, Update] = {}
        if A is not None or B is not None:
            updates["weight"] = Scaled(A_low, B_low)
        if not C is D is E is None:
            added = torch.zeros(self.base_layer.out_features, 1, device=device_of(self.base_layer))
            if E is not None:
                added = added + E.value.detach()
            if C is not None:
                added = added + self.base_layer.weight.detach().to(added.dtype) @ C.value.detach()
            updates["bias"] = Scaled(D_low, LowRank(added, torch.ones_like(added[:1]), 1.0))
        return updates

    def file_tensors(self) -> dict[str, Tensor]:
        """PEFT's names and shapes."""
        tensors = {f"glora_{name}": value for name, value in self.terms.named_parameters()}
        flat = ("glora_D.X", "glora_E.X")
        return {name: value.flatten() if name in flat else value for name, value in tensors.items()}


class GLoRAConfig(TargetedMethod, Forms, FinalizesAfterTraining):
    """GLoRA: trained terms on weight and bias in chosen forms, the same for all layers or by name."""

    peft_type: ClassVar[str] = "GLORA"
    peft_keys: ClassVar[frozenset[str]] = frozenset(
        ["r", "config_A_B", "config_C", "config_D_E", "init_weights", "bias"]
    )

    name: Literal["glora"] = Field("glora", description="The method.")
    rank: int = Field(4, ge=1, description="Rank of the low-rank terms.")
    forms_pattern: dict[str, Forms] = Field(
        {}, description="Name: forms (A to E), where they differ; the first that matches holds."
    )
    search: Search | None = Field(
        None,
        description="Choose every layer's forms, the given ones or narrower, by an evolutionary search on the "
        "validation rows after training; {} takes the defaults. Every step then trains forms drawn anew.",
    )

    @property
    def graph_safe(self) -> bool:
        """Without a search, which draws forms for every step."""
        return self.search is None

    @property
    def title(self) -> str:
        """The method's name as one writes it."""
        return "GLoRA"

    def forms(self, name: str) -> Forms:
        """The forms of a module."""
        found = next((forms for pattern, forms in self.forms_pattern.items() if matches(pattern, name)), None)
        return found or Forms(**{key: getattr(self, key) for key in Forms.model_fields})

    def wrapped(self, targets: Mapping[str, nn.Linear]) -> dict[str, OwnModule]:
        """Terms on each target.

        Raises:
            UsageError: Nothing would train, a rank is too large, or terms of the bias are asked for and none has one.
        """
        select(self.forms_pattern, targets, key="peft.forms_pattern")
        chosen = {name: self.forms(name) for name in targets}
        if any({f.C, f.D, f.E} != {"none"} for f in chosen.values()) and all(t.bias is None for t in targets.values()):
            raise UsageError("peft: C, D and E change biases, and the targets have none", hint="leave them at none")
        wrapped: dict[str, OwnModule] = {}
        for name, base in targets.items():
            if "lora" in (chosen[name].A, chosen[name].B):
                check_rank(self.rank, name, (base.out_features, base.in_features))
            module = GLoRALinear(base, chosen[name], self.rank, searching=self.search is not None)
            if len(module.terms):
                wrapped[name] = module
        if not wrapped:
            raise UsageError("peft: every form is none, so nothing would train")
        return wrapped

    @property
    def finalizes(self) -> bool:
        """Whether forms are chosen after training."""
        return self.search is not None

    def finalize(self, model: nn.Module, score: Callable[[], float]) -> GLoRAConfig:
        """Choose the forms of every layer, in place, and return the settings that name them.

        Raises:
            UsageError: The search's budget leaves nothing.
        """
        if self.search is None:
            return self
        layers = {name: module for name, module in own_modules(model).items() if isinstance(module, GLoRALinear)}
        choices = {name: layer.choices for name, layer in layers.items()}
        sizes = [[layer.size(forms) for forms in choices[name]] for name, layer in layers.items()]

        def scored(genes: tuple[int, ...]) -> float:
            for (name, layer), gene in zip(layers.items(), genes, strict=True):
                layer.take(choices[name][gene])
            return score()

        genes, _ = evolve(sizes, self.search, scored)
        pattern = {}
        for (name, layer), gene in zip(layers.items(), genes, strict=True):
            forms = choices[name][gene]
            layer.finalize(forms)
            pattern[name] = Forms.model_validate({**dict.fromkeys(Forms.model_fields, "none"), **forms})
            if not layer.terms:
                replace_module(model, name, layer.base_layer)
        kept = [name for name in layers if layers[name].terms]
        places = {"target_modules": kept, "exclude_modules": [], "layers": None, "search": None}
        return self.model_copy(update={**places, "forms_pattern": {name: pattern[name] for name in kept}})

    @property
    def _known_to_peft(self) -> bool:
        """Whether PEFT has these forms: one for A and B, one for D and E, the same everywhere."""
        return self.A == self.B != "none" and self.D == self.E and not self.forms_pattern

    def file_tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """The terms; PEFT wants zeros for those that are absent."""
        tensors = super().file_tensors(model)
        for name, module in own_modules(model).items():
            if self._known_to_peft and isinstance(module, GLoRALinear):
                out, wide = module.base_layer.out_features, module.base_layer.in_features
                shapes = {"C": (wide, 1), "D": (out,), "E": (out,)}
                absent = {key: shape for key, shape in shapes.items() if key not in module.terms}
                tensors |= {f"{name}.glora_{key}.zeros": torch.zeros(shape) for key, shape in absent.items()}
        return tensors

    @classmethod
    def filler(cls, name: str) -> bool:
        """The zeros of absent terms."""
        return name.endswith(".zeros")

    def peft_config(self, model: nn.Module) -> dict[str, Any]:
        """``adapter_config.json``, but for the base model's name; a type of our own where PEFT has no such forms."""
        known = self._known_to_peft
        return {
            **super().peft_config(model),
            "peft_type": "GLORA" if known else "LIT_LORA_GLORA",
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
        """Settings of an adapter that PEFT wrote, with full names: one form for A and B, one for D and E."""
        biased = any(re.search(r"\.glora_[CDE]\.X", name) for name in tensors)
        both, bias = raw.get("config_A_B", "lora"), raw.get("config_D_E", "constant") if biased else "none"
        settings = {
            "name": "glora",
            "rank": raw.get("r", 8),
            "target_modules": list(dict.fromkeys(name.partition(".glora_")[0] for name in tensors)),
            **{"A": both, "B": both, "C": raw.get("config_C", "lora") if biased else "none", "D": bias, "E": bias},
        }
        return validate(settings, cls, name=CONFIG)
