"""The rows of a run, portioned, and the few that are answered while it trains."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lit_lora import log
from lit_lora.data import Prepared, cache_folder, prepare
from lit_lora.data.batches import Batches, MicroBatch, validation_batches
from lit_lora.data.rows import Row, Rows
from lit_lora.estimate import RowLengths
from lit_lora.generate import Sampling, answer_all
from lit_lora.model import CausalLM
from lit_lora.peft import Method
from lit_lora.peft.core.capabilities import GroupsTokens
from lit_lora.recipe.config import FinetuneConfig
from lit_lora.tokenizer import Tokenizer

__all__ = ["RunData", "answer_samples", "lengths_of", "load_data", "row_lengths"]


@dataclass
class RunData:
    """The rows, portioned."""

    batches: Batches
    validation: list[MicroBatch]
    prepared: Prepared
    samples: list[tuple[list[int], list[int]]]
    """Validation rows that are answered while training: token ids of the prompt, and of the answer in the data."""

    @property
    def about(self) -> str:
        """One line on what it is, for a model card."""
        return f"{self.prepared.train_files[0].name}, {len(self.prepared.train):,} rows"


def load_data(config: FinetuneConfig, tokenizer: Tokenizer) -> RunData:
    """Tokenise (or take from the cache), report, and portion the rows.

    Raises:
        InputError: The data cannot be read, or no row can be learned from.
    """
    prepared = prepare(config.data, tokenizer, cache=cache_folder(), seed=config.seed)
    for line in prepared.report.lines():
        log.note(line)
    batches = Batches(
        prepared.train,
        batch_size=config.train.batch_size,
        micro_batch_tokens=config.train.micro_batch_tokens,
        seed=config.seed,
        shared_prefix=lengths_of(prepared.train, config.peft).shared_prefix,
    )
    validation = prepared.validation
    if validation is None:
        return RunData(batches, [], prepared, [])
    held_out = list(validation_batches(validation, config.train.micro_batch_tokens))
    samples = [_sample(validation[number]) for number in range(min(config.train.samples, len(validation)))]
    return RunData(batches, held_out, prepared, samples)


def _sample(row: Row) -> tuple[list[int], list[int]]:
    """The first answer of a row and what stands before it; plain text is to be continued after a few words."""
    ids, learned = row.input_ids.tolist(), row.loss_mask.tolist()
    start = learned.index(True, 1)
    if start == 1:
        start = min(len(ids) // 2, 32)
    end = learned.index(False, start) if False in learned[start:] else len(ids)
    return ids[:start], ids[start:end]


def row_lengths(config: FinetuneConfig) -> RowLengths:
    """Of the training rows, tokenised or from the cache.

    Raises:
        InputError: Tokenizer or data are not there, or not readable.
    """
    prepared = prepare(config.data, Tokenizer.load(config.model.path), cache=cache_folder(), seed=config.seed)
    return lengths_of(prepared.train, config.peft)


def lengths_of(rows: Rows, method: Method) -> RowLengths:
    """Of training rows; their common beginning is that which a micro-batch computes once under the method."""
    shared_prefix = 0 if isinstance(method, GroupsTokens) else rows.shared_prefix
    return RowLengths(rows.token_counts, rows.target_counts, shared_prefix)


def answer_samples(model: CausalLM, tokenizer: Tokenizer, data: RunData) -> Callable[[int], None]:
    """A function of the step that answers the sample rows and prints the answers beside those of the data.

    It draws no random numbers and leaves the model as it was, so a run with samples trains like one without.
    """
    context = model.context
    samples = [(prompt, expected) for prompt, expected in data.samples if len(prompt) < context]
    sampling = Sampling(max_new_tokens=60)

    def answer(step: int) -> None:
        training = model.training
        model.eval()
        answers = answer_all(model, tokenizer, [prompt for prompt, _ in samples], sampling)
        model.train(training)
        for given, (_, expected) in zip(answers, samples, strict=True):
            shown, wanted = log.shortened(given.text, 100), log.shortened(tokenizer.decode(expected), 100)
            log.note(f"step {step}: answers {shown!r}, expected {wanted!r}")

    return answer
