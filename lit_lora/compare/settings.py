"""What is compared: a config that all runs share, what each changes in it, and which options sweep over values."""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field

from lit_lora.config import Document, Settings, did_you_mean, read_config, validate
from lit_lora.errors import UsageError
from lit_lora.peft import METHODS
from lit_lora.recipe import RECIPES, FinetuneConfig, load_settings, recipe_for

__all__ = ["CompareConfig", "EvaluateSection", "RunSection", "Variant", "load_comparison", "slug"]

Positive = Annotated[float, Field(gt=0)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]


class EvaluateSection(Settings):
    """What the chosen runs are measured on, as by lit-lora evaluate."""

    data: str = Field(description="Held-out rows that no run has seen, read as the runs' own.")
    tasks: list[str] = Field([], description="loss, exact_match, …; those that suit the rows when omitted.")
    limit: int | None = Field(None, ge=1, description="Only the first rows.")
    max_new_tokens: int | None = Field(None, ge=1, description="Where an answer is cut off.")


class RunSection(Settings):
    """One line of the table, or several by a sweep. Beside these keys, any section of a finetune config."""

    model_config = ConfigDict(frozen=True, extra="allow", allow_inf_nan=False)

    name: str = Field(min_length=1, description="What the table calls it.")
    lr: list[Positive] = Field([], description="Learning rates to try, in the place of the grid.")
    sweep: dict[str, list[Any]] = Field(
        {}, description="Option: its values, such as {peft.rank: [4, 16]}; every combination is a run of its own."
    )


class CompareConfig(Settings):
    """A comparison."""

    base: dict[str, Any] = Field(description="A config of lit-lora finetune without seed and out, for all runs.")
    runs: list[RunSection] = Field(min_length=1, description="What is compared.")
    grid: list[Positive] = Field(
        [1.0],
        min_length=1,
        description="Learning rates to try, as multiples of each run's own: its optimizer.lr, or else its method's. "
        "The best by validation loss is chosen.",
    )
    seeds: list[Seed] = Field(
        [0], min_length=1, description="The first chooses the learning rate; at that one, all of them run."
    )
    evaluate: EvaluateSection | None = Field(None, description="Measure the chosen runs on rows of their own.")
    out: Path = Field(Path("out/compare"), description="The folder of all runs and of the report.")


@dataclass(frozen=True)
class Variant:
    """A line of the table: one combination of settings, still without learning rate and seed."""

    name: str
    config: FinetuneConfig
    rates: tuple[float, ...]
    """To choose from, ascending."""


def load_comparison(source: str | Path, overrides: Sequence[str] = ()) -> tuple[CompareConfig, list[Variant]]:
    """Read a comparison and expand its runs.

    Args:
        source: Path of a YAML file or name of a shipped one.
        overrides: ``key.sub=value``, such as ``base.train.max_steps=20``.

    Raises:
        UsageError: With one line per problem, of the file itself and of every run in it.
    """
    document = read_config(source, overrides)
    problems = list(document.problems)
    config: CompareConfig | None = None
    try:
        config = validate(document.data, CompareConfig, document.places, name=document.name)
    except UsageError as error:
        problems += str(error).splitlines()
    variants: list[Variant] = []
    for number, run in enumerate(_runs(document)):
        grid = tuple(config.grid) if config else (1.0,)
        for chosen in _combinations(run.get("sweep")):
            try:
                variants.append(_variant(document, number, run, chosen, grid))
            except UsageError as error:
                problems += str(error).splitlines()
    for one, other in itertools.combinations(variants, 2):
        if slug(one.name) == slug(other.name):
            problems.append(f"{document.name}: runs: two are called {other.name!r}, expected a name for each")
    if problems or config is None:
        raise UsageError("\n".join(dict.fromkeys(problems)))
    return config, variants


def slug(name: str) -> str:
    """A name as a file name."""
    return re.sub(r"[^\w.=+-]+", "-", name).strip("-.").lower()


def _runs(document: Document) -> list[dict[str, Any]]:
    """The runs as they stand in the file, as far as they are some at all; what is wrong is told elsewhere."""
    base, runs = document.data.get("base"), document.data.get("runs")
    if not isinstance(base, dict) or not isinstance(runs, list):
        return []
    return [run if isinstance(run, dict) else {} for run in runs]


def _combinations(sweep: Any) -> Iterator[dict[str, Any]]:
    """Every combination of the values of a sweep, as option: value."""
    if not isinstance(sweep, dict) or not all(isinstance(values, list) for values in sweep.values()):
        sweep = {}
    for values in itertools.product(*sweep.values()):
        yield dict(zip(sweep, values, strict=True))


def _variant(
    document: Document, number: int, run: Mapping[str, Any], chosen: Mapping[str, Any], grid: tuple[float, ...]
) -> Variant:
    """One combination of settings, validated as the recipe's config.

    Raises:
        UsageError: With one line per problem.
    """
    sections = {key: value for key, value in run.items() if key not in RunSection.model_fields}
    taken = [key for key in ("seed", "out") if key in sections or key in document.data["base"]]
    merged = _merged(document.data["base"], sections)
    places = _places(document, number)
    for key, value in chosen.items():
        _set(merged, key, value)
        places[tuple(key.split("."))] = document.places.get(("runs", number, "sweep", key), document.name)
    where = document.places.get(("runs", number), document.name)
    peft = merged.get("peft")
    method = peft.get("name", "lora") if isinstance(peft, dict) else "lora"
    nearest = difflib.get_close_matches(str(method), METHODS, n=1)  # a misspelt one is told by its own recipe
    recipe = merged.setdefault("recipe", recipe_for(nearest[0]) if nearest else "lora")
    if recipe not in RECIPES:
        raise UsageError(f"{where}: recipe {recipe!r} is not known{did_you_mean(str(recipe), RECIPES)}")
    settings = load_settings(recipe)
    known = [*RunSection.model_fields, *(key for key in settings.model_fields if key not in ("seed", "out"))]
    strays = [key for key in sections if key not in settings.model_fields]
    problems = [
        f"{places.get((key,), where)}: unknown key {key!r}{did_you_mean(key, known)}, known: {', '.join(known)}"
        for key in strays
    ]
    kept = {key: value for key, value in merged.items() if key not in strays}
    config = validate(kept, settings, places, name=where, problems=problems)
    if not isinstance(config, FinetuneConfig):
        raise UsageError(f"{where}: recipe {recipe} is not compared: expected runs of a decoder")
    if taken:
        raise UsageError(f"{where}: {taken[0]}: the comparison itself has {'seeds' if 'seed' in taken else 'out'}")
    if config.data.validation is None:
        raise UsageError(
            f"{where}: data.validation: is missing; the learning rate is chosen by the validation loss, such as of 0.1"
        )
    values = " ".join(f"{key.rpartition('.')[2]}={_word(value)}" for key, value in chosen.items())
    own = config.optimizer.lr
    given = run.get("lr")
    wanted = given if isinstance(given, list) and given else [float(f"{own * factor:.3g}") for factor in grid]
    rates = sorted({float(rate) for rate in wanted if isinstance(rate, int | float)})
    return Variant(f"{run.get('name', number)} {values}".strip(), config, tuple(rates))


def _merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """``base`` with the sections of ``changes`` in it; a ``peft`` that names a method takes the place of the base's."""
    merged = {key: dict(value) if isinstance(value, dict) else value for key, value in base.items()}
    for key, value in changes.items():
        replaces = key == "peft" and isinstance(value, dict) and "name" in value
        if isinstance(value, dict) and isinstance(merged.get(key), dict) and not replaces:
            merged[key] = _merged(merged[key], value)
        else:
            merged[key] = dict(value) if isinstance(value, dict) else value
    return merged


def _set(config: dict[str, Any], key: str, value: Any) -> None:
    """Put a value where ``section.key`` says."""
    *parents, last = key.split(".")
    for parent in parents:
        inner = config.get(parent)
        config[parent] = dict(inner) if isinstance(inner, dict) else {}
        config = config[parent]
    config[last] = value


def _places(document: Document, number: int) -> dict[tuple[str | int, ...], str]:
    """Where the values of one run's config stand in the file: in the run, or else in the base."""
    places: dict[tuple[str | int, ...], str] = {}
    for start in (("base",), ("runs", number)):
        places |= {path[len(start) :]: at for path, at in document.places.items() if path[: len(start)] == start}
    return places


def _word(value: Any) -> str:
    return "+".join(map(str, value)) if isinstance(value, list) else str(value)
