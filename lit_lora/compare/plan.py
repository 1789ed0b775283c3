"""What a comparison will do, before it starts: does every run fit its model, is there room, how long will it take."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lit_lora.compare.jobs import Job, Outcome, Runner
from lit_lora.compare.settings import CompareConfig, Variant
from lit_lora.data import cache_folder, prepare
from lit_lora.errors import UsageError
from lit_lora.estimate import estimate
from lit_lora.model import ModelConfig
from lit_lora.recipe import lengths_of, setup_for
from lit_lora.tokenizer import Tokenizer
from lit_lora.train.device import choose_device, choose_dtype

__all__ = ["check_folders", "count_runs", "run_all", "seconds_per_run"]

_START_SECONDS = 6.0
"""Of a process: imports, opening the model, writing its result."""


def count_runs(config: CompareConfig, variant: Variant) -> int:
    """Runs of one variant: every learning rate, then the other seeds at the chosen one."""
    return len(variant.rates) + len(config.seeds) - 1


def check_folders(config: CompareConfig, variants: Sequence[Variant]) -> None:
    """Make sure that runs which are there already are those of this comparison.

    Raises:
        UsageError: Naming all that are not.
    """
    problems = [
        problem
        for variant in variants
        for rate in variant.rates
        for seed in config.seeds
        if (problem := Job.of(variant, rate, seed, config.out).check())
    ]
    if problems:
        raise UsageError("\n".join(problems), hint="choose another out, or remove these folders")


def seconds_per_run(config: CompareConfig, variants: Sequence[Variant]) -> list[float]:
    """About how long a run of each variant takes; each is rehearsed on paper, which finds settings that cannot be.

    The rows are tokenised for it, so that no run has to. A variant whose runs are all there takes no time.

    Raises:
        UsageError: Naming every variant whose method does not fit the model.
        InputError: Model or rows cannot be read.
    """
    seconds, problems = [], []
    for variant in variants:
        try:
            seconds.append(0.0 if _all_there(config, variant) else _seconds(variant, config.seeds[0]))
        except UsageError as error:
            problems += [f"{variant.name}: {line}" for line in str(error).splitlines()]
    if problems:
        raise UsageError("\n".join(problems))
    return seconds


def _all_there(config: CompareConfig, variant: Variant) -> bool:
    """Whether every rate has run, and with every further seed one of them."""
    first, *others = ([Job.of(variant, rate, seed, config.out).done for rate in variant.rates] for seed in config.seeds)
    return all(first) and all(any(done) for done in others)


def _seconds(variant: Variant, seed: int) -> float:
    config = variant.config
    prepared = prepare(config.data, Tokenizer.load(config.model.path), cache=cache_folder(), seed=seed)
    lengths = lengths_of(prepared.train, config.peft)
    device = choose_device(config.model.device)
    dtype = choose_dtype(config.model.dtype, device)
    shape = ModelConfig.from_folder(config.model.path)
    step = estimate(setup_for(config, shape=shape, rows=lengths, dtype=dtype, device=device)).seconds_per_step or 0.0
    size = min(config.train.batch_size, len(lengths))
    steps = config.train.total_steps(-(-len(lengths) // size))
    held_out = prepared.validation.token_counts.sum() if prepared.validation is not None else 0
    validations = 1 + steps / config.train.eval_interval(steps)
    share = float(held_out) / (float(lengths.token_counts.mean()) * size)
    return _START_SECONDS + step * (steps + validations * share / 3)  # a forward is a third of a step


def run_all(runner: Runner, config: CompareConfig, variants: Sequence[Variant]) -> Iterator[Outcome]:
    """Train and measure everything, and give each run as soon as it is trained; scores come into it later.

    Raises:
        Interrupted: A signal came.
        DiskError: The disk is full or read-only.
    """
    with_base = True
    for variant in variants:
        tried = []
        for rate in variant.rates:
            tried.append(runner.train(Job.of(variant, rate, config.seeds[0], config.out)))
            yield tried[-1]
        best = min(tried, key=lambda outcome: outcome.loss)
        chosen = [best] if best.result else []
        for seed in config.seeds[1:] if chosen else []:
            chosen.append(runner.train(Job.of(variant, best.job.rate, seed, config.out)))
            yield chosen[-1]
        for outcome in chosen:
            if outcome.result and config.evaluate is not None:
                runner.measure(outcome, config.evaluate, with_base=with_base)
                with_base = with_base and not outcome.base_scores
