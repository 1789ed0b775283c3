"""The choice of forms for GLoRA's terms in each layer, by an evolutionary search after training all of them together.

In training, every layer draws new forms of its terms at every step; a narrower form uses a part of the wider one's
parameters. Afterwards, selections of forms are scored on the validation rows and bred: the best become parents, and
children are parents with some layers drawn anew, or mixtures of the layers of two parents.
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
"""A selection of forms: for each layer, the index of its choice."""

# From widest to narrowest; each is computed from a part of the parameters of those before it.
_FORMS = ("lora", "vector", "constant", "none")
_TRIES = 1000


class Search(Settings):
    """The evolutionary search over layers' forms."""

    population: int = Field(12, ge=2, description="Selections of forms per generation.")
    parents: int = Field(4, ge=2, description="Number of best selections from which the next generation is bred.")
    generations: int = Field(
        4, ge=1, description="Number of generations; each scores its population on the validation rows."
    )
    mutation: float = Field(0.2, gt=0, le=1, description="Share of a mutated parent's layers to draw anew.")
    most: float = Field(1.0, gt=0, le=1, description="Maximum share of trainable parameters to keep.")

    @model_validator(mode="after")
    def _parents_fit(self) -> Search:
        if self.parents > self.population:
            raise ValueError(
                f"expected at most as many parents as the population of {self.population}, got {self.parents}"
            )
        return self


def narrower(form: str, *, constant: bool = True) -> tuple[str, ...]:
    """The forms that a term can take with the parameters of ``form``, itself first; without ``constant``, not that."""
    forms = _FORMS[_FORMS.index(form) :]
    return tuple(name for name in forms if constant or name != "constant")


def evolve(
    sizes: Sequence[Sequence[int]], search: Search, score: Callable[[Genes], float], *, seed: int = 0
) -> tuple[Genes, float]:
    """The selection with the lowest score, and its score.

    Args:
        sizes: Trainable parameters of each of a layer's choices, by layer; the first choice is the widest.
        search: The settings.
        score: Returns the validation loss of a selection; called once for each that is tried.
        seed: Seed of all random draws.

    Raises:
        UsageError: No selection found is as small as ``search.most`` requires.
    """
    draws = random.Random(seed)
    widest: Genes = (0,) * len(sizes)
    budget = search.most * _size(sizes, widest)
    scores: dict[Genes, float] = {}

    def within_budget(draw: Callable[[], Genes]) -> Genes:
        """A selection that keeps some parameters, within the budget, and is new unless none turns up."""
        latest: Genes | None = None
        for _ in range(_TRIES):
            genes = draw()
            if 0 < _size(sizes, genes) <= budget:
                latest = genes
                if genes not in scores:
                    break
        if latest is None:
            raise UsageError(
                f"peft.search.most: found no selection of forms with at most {search.most:g} of the parameters",
                hint="raise it",
            )
        return latest

    def random_genes() -> Genes:
        return tuple(draws.randrange(len(layer)) for layer in sizes)

    def mutated() -> Genes:
        fresh = random_genes()
        parent = draws.choice(best)
        return tuple(new if draws.random() < search.mutation else old for new, old in zip(fresh, parent, strict=True))

    def crossed() -> Genes:
        parents = (draws.choice(best), draws.choice(best))
        return tuple(draws.choice(pair) for pair in zip(*parents, strict=True))

    generation = [widest] if budget >= _size(sizes, widest) else []
    while len(generation) < search.population:
        generation.append(within_budget(random_genes))
    for number in range(search.generations):
        for genes in generation:
            if genes not in scores:
                scores[genes] = score(genes)
        best = sorted(scores, key=scores.__getitem__)[: search.parents]
        if number + 1 < search.generations:
            generation = [within_budget(mutated if child % 2 else crossed) for child in range(search.population)]
    return best[0], scores[best[0]]


def _size(sizes: Sequence[Sequence[int]], genes: Genes) -> int:
    """Trainable parameters of a selection."""
    return sum(layer_sizes[gene] for layer_sizes, gene in zip(sizes, genes, strict=True))
