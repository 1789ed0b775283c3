"""What a comparison will do, before it starts: does every method fit the model, and how long will it take."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from lit_lora.compare.jobs import Job, Outcome, Runner
from lit_lora.compare.settings import CompareConfig, Variant
from lit_lora.data import cache_folder, prepare
from lit_lora.errors import UsageError
from lit_lora.estimate import estimate
from lit_lora.hf import read_config
from lit_lora.recipe import lengths_of, load_tokenizer, setup_for
from lit_lora.train.device import choose_device, choose_dtype

__all__ = ["check_folders", "count_runs", "run_all", "seconds_per_run"]

_START_SECONDS = 6.0
"""What a process takes beside its steps: imports, opening the model, writing the result."""


def count_runs(config: CompareConfig, variant: Variant) -> int:
    """Number of runs of one variant: every learning rate, then the other seeds at the chosen one."""
    return len(variant.rates) + len(config.seeds) - 1


def check_folders(config: CompareConfig, variants: Sequence[Variant]) -> None:
    """Make sure that existing runs belong to this comparison.

    Raises:
        UsageError: With one line per run that does not.
    """
    problems = []
    for variant in variants:
        for rate, seed in itertools.product(variant.rates, config.seeds):
            problem = Job.of(variant, rate, seed, config.out).check()
            if problem:
                problems.append(problem)
    if problems:
        raise UsageError("\n".join(problems), hint="choose another out, or remove these folders")


def seconds_per_run(config: CompareConfig, variants: Sequence[Variant]) -> list[float]:
    """Estimated duration of a run of each variant; 0 for a variant whose runs are all complete.

    A step of each is rehearsed on tensors without values, which finds settings that do not fit the model. The rows are
    tokenized for that, so that no run has to do it again.

    Raises:
        UsageError: With a line per problem of every variant that does not fit the model.
        InputError: Model or rows cannot be read.
    """
    seconds = []
    problems = []
    for variant in variants:
        try:
            seconds.append(0.0 if _complete(config, variant) else _seconds(variant, config.seeds[0]))
        except UsageError as error:
            problems += [f"{variant.name}: {line}" for line in str(error).splitlines()]
    if problems:
        raise UsageError("\n".join(problems))
    return seconds


def _complete(config: CompareConfig, variant: Variant) -> bool:
    """Whether all learning rates are done with the first seed, and one of them with every other seed."""
    first, *others = ([Job.of(variant, rate, seed, config.out).done for rate in variant.rates] for seed in config.seeds)
    return all(first) and all(any(done) for done in others)


def _seconds(variant: Variant, seed: int) -> float:
    """Estimated duration of one run."""
    config = variant.config
    prepared = prepare(config.data, load_tokenizer(config), cache=cache_folder(), seed=seed)
    lengths = lengths_of(prepared, config.peft)
    device = choose_device(config.model.device)
    dtype = choose_dtype(config.model.dtype, device)
    shape = read_config(config.model.path)
    step = estimate(setup_for(config, shape=shape, rows=lengths, dtype=dtype, device=device)).seconds_per_step or 0.0

    batch_size = min(config.train.batch_size, len(lengths))
    steps_per_epoch = -(-len(lengths) // batch_size)
    steps = config.train.total_steps(steps_per_epoch)
    validation_tokens = prepared.validation.token_counts.sum() if prepared.validation is not None else 0
    validations = 1 + steps / config.train.eval_interval(steps, steps_per_epoch)
    # A validation in units of a training step, of which the forward pass is about a third.
    validation = float(validation_tokens) / (float(lengths.token_counts.mean()) * batch_size) / 3
    return _START_SECONDS + step * (steps + validations * validation)


def run_all(runner: Runner, config: CompareConfig, variants: Sequence[Variant]) -> Iterator[Outcome]:
    """Train and evaluate everything. Each run is yielded as soon as it is trained; its scores are added later.

    Raises:
        Interrupted: A signal arrived.
        DiskError: The disk is full or read-only.
    """
    with_base = True  # the base model is measured once, with the first run that succeeds
    for variant in variants:
        tried = []
        for rate in variant.rates:
            outcome = runner.train(Job.of(variant, rate, config.seeds[0], config.out))
            tried.append(outcome)
            yield outcome
        best = min(tried, key=lambda outcome: outcome.loss)
        if not best.result:
            continue

        chosen = [best]
        for seed in config.seeds[1:]:
            outcome = runner.train(Job.of(variant, best.job.rate, seed, config.out))
            chosen.append(outcome)
            yield outcome
        if config.evaluate is None:
            continue
        for outcome in chosen:
            if outcome.result:
                runner.measure(outcome, config.evaluate, with_base=with_base)
                with_base = with_base and not outcome.base_scores
