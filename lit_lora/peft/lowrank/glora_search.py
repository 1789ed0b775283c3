"""Which forms GLoRA's terms take in each layer, by an evolutionary search after training all of them together.

While training, every layer draws the forms of its terms anew at every step; a narrower form is a part of the wider
one's numbers. Afterwards, selections of forms are scored on the validation rows and bred: the best become parents, and
children are parents with some layers drawn anew, or layers of two parents mixed.
Source: Chavan et al. 2023, "One-for-All: Generalized LoRA for Parameter-Efficient Fine-tuning", section 3.4.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from pydantic import Field, model_validator

from lit_lora.config import Settings
from lit_lora.errors import UsageError

__all__ = ["Search", "evolve", "narrower"]

Genes = tuple[int, ...]
"""Of each layer, which of its choices."""

_NARROWER = {"lora": ("lora", "vector", "constant", "none"), "vector": ("vector", "constant", "none")}
_TRIES = 1000


class Search(Settings):
    """The evolutionary search over layers' forms."""

    population: int = Field(12, ge=2, description="Selections of forms in a generation.")
    parents: int = Field(4, ge=2, description="The best so far, from which the next generation is bred.")
    generations: int = Field(4, ge=1, description="How many; each scores its population on the validation rows.")
    mutation: float = Field(0.2, gt=0, le=1, description="Share of a mutated parent's layers that are drawn anew.")
    most: float = Field(1.0, gt=0, le=1, description="Trained numbers kept, at most this share of all.")

    @model_validator(mode="after")
    def _parents_fit(self) -> Search:
        if self.parents > self.population:
            raise ValueError(f"parents {self.parents} of a population of {self.population}, expected at most as many")
        return self


def narrower(form: str, *, constant: bool = True) -> tuple[str, ...]:
    """The forms that a part of a form's numbers can take, itself first."""
    forms = _NARROWER.get(form, (form, "none") if form != "none" else ("none",))
    return forms if constant else tuple(name for name in forms if name != "constant")


def evolve(
    sizes: Sequence[Sequence[int]], search: Search, score: Callable[[Genes], float], *, seed: int = 0
) -> tuple[Genes, float]:
    """The selection of least score that was found, and its score.

    Args:
        sizes: Trained numbers of every choice, by layer; the first choice is the widest.
        search: Its settings.
        score: Called once for each selection that is tried.
        seed: Of all draws.

    Raises:
        UsageError: ``search.most`` leaves no selection.
    """
    draws = random.Random(seed)
    widest: Genes = (0,) * len(sizes)
    budget = search.most * _size(sizes, widest)
    scores: dict[Genes, float] = {}

    def fitting(draw: Callable[[], Genes]) -> Genes:
        """A selection within the budget that was not tried, if one turns up."""
        found: Genes | None = None
        for _ in range(_TRIES):
            genes = draw()
            if 0 < _size(sizes, genes) <= budget:
                found = genes
                if genes not in scores:
                    break
        if found is None:
            raise UsageError(f"peft.search: most {search.most:g} leaves no selection of forms", hint="raise it")
        return found

    def anew() -> Genes:
        return tuple(draws.randrange(len(layer)) for layer in sizes)

    def mutated() -> Genes:
        fresh, parent = anew(), draws.choice(best)
        return tuple(new if draws.random() < search.mutation else old for new, old in zip(fresh, parent, strict=True))

    def crossed() -> Genes:
        one, other = draws.choice(best), draws.choice(best)
        return tuple(draws.choice(pair) for pair in zip(one, other, strict=True))

    generation = [widest] if budget >= _size(sizes, widest) else []
    generation += [fitting(anew) for _ in range(search.population - len(generation))]
    for number in range(search.generations):
        scores |= {genes: score(genes) for genes in dict.fromkeys(generation) if genes not in scores}
        best = sorted(scores, key=scores.__getitem__)[: search.parents]
        if number + 1 < search.generations:
            generation = [fitting(mutated if child % 2 else crossed) for child in range(search.population)]
    return best[0], scores[best[0]]


def _size(sizes: Sequence[Sequence[int]], genes: Genes) -> int:
    return sum(layer[gene] for layer, gene in zip(sizes, genes, strict=True))
