"""The rows of a run in micro-batches, and the few that are answered during training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from lit_lora import log
from lit_lora.checkpoint.load import AnyModel
from lit_lora.data import Prepared, cache_folder, prepare
from lit_lora.data.batches import Batches, MicroBatch, validation_batches
from lit_lora.data.prepare import draw_places
from lit_lora.data.rows import Row
from lit_lora.estimate import RowLengths
from lit_lora.generate import Sampling, answer_all
from lit_lora.peft import Method, with_token_ids
from lit_lora.peft.core.capabilities import GroupsTokens
from lit_lora.recipe.config import FinetuneConfig
from lit_lora.tokenizer import Tokenizer

__all__ = ["RunData", "answer_samples", "lengths_of", "load_data", "load_tokenizer", "row_lengths"]


def load_tokenizer(config: FinetuneConfig) -> Tokenizer:
    """The base's tokenizer, with the tokens that the method adds and the template that the config names.

    Raises:
        InputError: The tokenizer cannot be read, or the template does not fit it.
        UsageError: There is no such template.
    """
    tokenizer = Tokenizer.load(config.model.path)
    with_token_ids(config.peft, tokenizer.add_tokens)
    if config.model.chat_template is not None:
        tokenizer.choose_template(config.model.chat_template)
    return tokenizer


@dataclass
class RunData:
    """The rows of a run: tokenized, and in micro-batches."""

    batches: Batches
    validation: list[MicroBatch]
    prepared: Prepared
    samples: list[tuple[list[int], list[int]]]
    """Validation rows to answer during training: token ids of the prompt, and of the expected answer."""
    template: str | None
    """What chat template the rows are written by, in words; ``None`` for plain text."""

    @property
    def validation_fingerprint(self) -> str | None:
        """Equal for equal validation rows; ``None`` without such rows."""
        rows = self.prepared.validation
        return rows.fingerprint if rows is not None else None

    @property
    def about(self) -> str:
        """One line on the rows, for a model card."""
        return f"{self.prepared.name}, {len(self.prepared.train):,} rows"


def load_data(config: FinetuneConfig, tokenizer: Tokenizer) -> RunData:
    """Tokenize the rows or read them from the cache, print a report, and cut them into micro-batches.

    Raises:
        InputError: The data cannot be read, or no row has target tokens.
    """
    prepared = prepare(config.data, tokenizer, cache=cache_folder(), seed=config.seed)
    for line in prepared.report.lines():
        log.note(line)
    template = None
    if any(file.format != "text" for file in prepared.report.files):
        template = tokenizer.template_name
        if not tokenizer.has_own_template:
            template += " (the checkpoint has none; model.chat_template=NAME chooses another)"
        tokenizer.adopt_template()  # conversations were rendered by it
    batches = Batches(
        prepared.train,
        batch_size=config.train.batch_size,
        micro_batch_tokens=config.train.micro_batch_tokens,
        seed=config.seed,
        shared_prefix=lengths_of(prepared, config.peft).shared_prefix,
        mixture=prepared.mixture,
    )
    if prepared.validation is None:
        return RunData(batches, [], prepared, [], template)

    rows = prepared.validation
    if config.train.eval_rows is not None:
        rows = rows.subset(draw_places(len(rows), config.train.eval_rows, config.seed))
        prepared = replace(prepared, validation=rows)
    validation = list(validation_batches(rows, config.train.micro_batch_tokens))
    samples = [_sample(rows[number]) for number in range(min(config.train.samples, len(rows)))]
    return RunData(batches, validation, prepared, samples, template)


def _sample(row: Row) -> tuple[list[int], list[int]]:
    """Token ids of the prompt and of the first answer in a row."""
    ids = row.input_ids.tolist()
    is_target = row.loss_mask.tolist()
    start = is_target.index(True, 1)
    if start == 1:  # plain text, all of it target: let the model continue its beginning
        start = min(len(ids) // 2, 32)
    end = is_target.index(False, start) if False in is_target[start:] else len(ids)
    return ids[:start], ids[start:end]


def row_lengths(config: FinetuneConfig) -> RowLengths:
    """Lengths of the training rows, tokenized now or read from the cache.

    Raises:
        InputError: The tokenizer or the data cannot be read.
        UsageError: There is no such chat template.
    """
    prepared = prepare(config.data, load_tokenizer(config), cache=cache_folder(), seed=config.seed)
    return lengths_of(prepared, config.peft)


def lengths_of(prepared: Prepared, method: Method) -> RowLengths:
    """Lengths of the training rows, and of the shared prefix that the method lets a micro-batch compute once."""
    rows = prepared.train
    shared_prefix = 0 if isinstance(method, GroupsTokens) else rows.shared_prefix
    return RowLengths(rows.token_counts, rows.target_counts, shared_prefix, prepared.mixture)


def answer_samples(model: AnyModel, tokenizer: Tokenizer, data: RunData) -> Callable[[int], None]:
    """A function of the step that answers the sample rows and prints each answer beside the expected one.

    It draws no random numbers and leaves the model as it was, so samples do not change how a run trains.
    """
    prompts, expected = [], []
    for prompt, answer in data.samples:
        if len(prompt) < model.context:
            prompts.append(prompt)
            expected.append(log.shortened(tokenizer.decode(answer), 100))
    sampling = Sampling(max_new_tokens=60)

    def show(step: int) -> None:
        was_training = model.training
        model.eval()
        answers = answer_all(model, tokenizer, prompts, sampling)
        model.train(was_training)
        for answer, expected_text in zip(answers, expected, strict=True):
            log.note(f"step {step}: answers {log.shortened(answer.text, 100)!r}, expected {expected_text!r}")

    return show
