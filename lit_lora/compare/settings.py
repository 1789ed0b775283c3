"""What is compared: a config that all runs share, the changes of each, and options that sweep over values."""

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
    """Data on which the chosen runs are evaluated, as by lit-lora evaluate."""

    data: str = Field(description="Held-out rows that no run has seen, in the format of the training data.")
    tasks: list[str] = Field([], description="Tasks such as loss and exact_match; those that suit the rows by default.")
    limit: int | None = Field(None, ge=1, description="Use only the first rows.")
    max_new_tokens: int | None = Field(None, ge=1, description="Maximum length of an answer in tokens.")


class RunSection(Settings):
    """One line of the table, or several with a sweep. Any section of a finetune config may stand beside these keys."""

    model_config = ConfigDict(frozen=True, extra="allow", allow_inf_nan=False)

    name: str = Field(min_length=1, description="Name in the table.")
    lr: list[Positive] = Field([], description="Learning rates to try instead of the grid.")
    sweep: dict[str, list[Any]] = Field(
        {},
        description="Values to try by option, such as {peft.rank: [4, 16]}; every combination becomes a line of its "
        "own.",
    )


class CompareConfig(Settings):
    """A comparison."""

    base: dict[str, Any] = Field(description="Config of lit-lora finetune that all runs share, without seed and out.")
    runs: list[RunSection] = Field(min_length=1, description="Variants to compare.")
    grid: list[Positive] = Field(
        [1.0],
        min_length=1,
        description="Learning rates to try, as multiples of each run's optimizer.lr or its method's default. The one "
        "with the lowest validation loss is chosen.",
    )
    seeds: list[Seed] = Field(
        [0], min_length=1, description="Seeds: the first is used to choose the learning rate, all of them at that rate."
    )
    evaluate: EvaluateSection | None = Field(None, description="Evaluate the chosen runs on held-out data.")
    out: Path = Field(Path("out/compare"), description="Folder of all runs and the report.")


@dataclass(frozen=True)
class Variant:
    """A line of the table: one combination of settings, still without learning rate and seed."""

    name: str
    config: FinetuneConfig
    rates: tuple[float, ...]
    """Learning rates to choose from, ascending."""


def load_comparison(source: str | Path, overrides: Sequence[str] = ()) -> tuple[CompareConfig, list[Variant]]:
    """Read a comparison and expand its runs.

    Args:
        source: Path of a YAML file, or name of a shipped one.
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
    grid = tuple(config.grid) if config else (1.0,)  # go on with a broken file, to report the problems of its runs too
    for number, run in enumerate(_runs(document)):
        for swept in _combinations(run.get("sweep")):
            try:
                variants.append(_variant(document, number, run, swept, grid))
            except UsageError as error:
                problems += str(error).splitlines()
    for one, other in itertools.combinations(variants, 2):
        if slug(one.name) == slug(other.name):
            problems.append(f"{document.name}: runs: two are called {other.name!r}, expected a different name for each")
    if problems or config is None:
        raise UsageError("\n".join(dict.fromkeys(problems)))
    return config, variants


def slug(name: str) -> str:
    """A name as a file name."""
    return re.sub(r"[^\w.=+-]+", "-", name).strip("-.").lower()


def _runs(document: Document) -> list[dict[str, Any]]:
    """The runs of the file, with ``{}`` for one that is not a mapping; validation of the file reports those."""
    base = document.data.get("base")
    runs = document.data.get("runs")
    if not isinstance(base, dict) or not isinstance(runs, list):
        return []
    return [run if isinstance(run, dict) else {} for run in runs]


def _combinations(sweep: Any) -> Iterator[dict[str, Any]]:
    """Every combination of the values of a sweep, as option to value; a single empty one without a sweep."""
    if not isinstance(sweep, dict) or not all(isinstance(values, list) for values in sweep.values()):
        sweep = {}
    for values in itertools.product(*sweep.values()):
        yield dict(zip(sweep, values, strict=True))


def _variant(
    document: Document, number: int, run: Mapping[str, Any], swept: Mapping[str, Any], grid: tuple[float, ...]
) -> Variant:
    """One combination of settings, validated as the recipe's config.

    Args:
        document: The file.
        number: Which of its runs.
        run: That run as it stands in the file.
        swept: Options of its sweep with one value each.
        grid: Factors of the learning rate.

    Raises:
        UsageError: With one line per problem.
    """
    base = document.data["base"]
    sections = {key: value for key, value in run.items() if key not in RunSection.model_fields}
    merged = _merged(base, sections)
    places = _places(document, number)
    for key, value in swept.items():
        _set(merged, key, value)
        places[tuple(key.split("."))] = document.places.get(("runs", number, "sweep", key), document.name)

    where = document.places.get(("runs", number), document.name)
    recipe = merged.setdefault("recipe", _recipe_of(merged))
    config = _validated(recipe, merged, sections, places, where)
    reserved = [key for key in ("seed", "out") if key in sections or key in base]
    if reserved:
        option = "seeds" if "seed" in reserved else "out"
        raise UsageError(f"{where}: {reserved[0]}: set {option} of the comparison instead")
    if config.data.validation is None:
        raise UsageError(
            f"{where}: data.validation: is missing, but the learning rate is chosen by the validation loss; "
            "set it, for example to 0.1"
        )

    values = " ".join(f"{key.rpartition('.')[2]}={_word(value)}" for key, value in swept.items())
    name = f"{run.get('name', number)} {values}".strip()
    return Variant(name, config, _rates(run.get("lr"), config.optimizer.lr, grid))


def _recipe_of(config: Mapping[str, Any]) -> str:
    """The recipe of a config that names none: that of its method."""
    peft = config.get("peft")
    method = peft.get("name", "lora") if isinstance(peft, dict) else "lora"
    nearest = difflib.get_close_matches(str(method), METHODS, n=1)  # so that the right recipe reports a misspelt one
    return recipe_for(nearest[0]) if nearest else "lora"


def _validated(
    recipe: str,
    merged: Mapping[str, Any],
    sections: Mapping[str, Any],
    places: Mapping[tuple[str | int, ...], str],
    where: str,
) -> FinetuneConfig:
    """The config of a run.

    Raises:
        UsageError: With one line per problem.
    """
    if recipe not in RECIPES:
        raise UsageError(f"{where}: recipe {recipe!r} is not known{did_you_mean(str(recipe), RECIPES)}")
    settings = load_settings(recipe)
    # An unknown key of a run may be a misspelt one of the comparison, so it is reported with the keys of both.
    allowed = [*RunSection.model_fields, *(key for key in settings.model_fields if key not in ("seed", "out"))]
    unknown = [key for key in sections if key not in settings.model_fields]
    problems = [
        f"{places.get((key,), where)}: unknown key {key!r}{did_you_mean(key, allowed)}, known: {', '.join(allowed)}"
        for key in unknown
    ]
    remaining = {key: value for key, value in merged.items() if key not in unknown}
    config = validate(remaining, settings, places, name=where, problems=problems)
    if not isinstance(config, FinetuneConfig):
        raise UsageError(f"{where}: recipe {recipe} cannot be compared, expected one that finetunes a decoder")
    return config


def _rates(lr: Any, default: float, grid: Sequence[float]) -> tuple[float, ...]:
    """The learning rates of a run, ascending: its ``lr``, or else multiples of its default, to 3 digits."""
    rates = lr if isinstance(lr, list) and lr else [float(f"{default * factor:.3g}") for factor in grid]
    return tuple(sorted({float(rate) for rate in rates if isinstance(rate, int | float)}))


def _merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """``base`` with the sections of ``changes`` merged in; a ``peft`` that names a method replaces the base's."""
    merged = {key: dict(value) if isinstance(value, dict) else value for key, value in base.items()}
    for key, value in changes.items():
        names_a_method = key == "peft" and isinstance(value, dict) and "name" in value
        if isinstance(value, dict) and isinstance(merged.get(key), dict) and not names_a_method:
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
    """Where in the file each value of one run's config stands: in the run, or else in the base."""
    places: dict[tuple[str | int, ...], str] = {}
    for start in (("base",), ("runs", number)):
        places |= {path[len(start) :]: place for path, place in document.places.items() if path[: len(start)] == start}
    return places


def _word(value: Any) -> str:
    return "+".join(map(str, value)) if isinstance(value, list) else str(value)
