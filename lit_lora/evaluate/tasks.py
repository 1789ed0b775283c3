"""What is measured of one model on one dataset. A task turns a :class:`Subject` into metrics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from lit_lora.data import Rows
from lit_lora.data.sample import Conversation
from lit_lora.errors import UsageError
from lit_lora.evaluate.answers import Scores, parse_json
from lit_lora.evaluate.generation import evaluate_generation, reference
from lit_lora.evaluate.likelihood import evaluate_loss
from lit_lora.evaluate.options import OptionRow, evaluate_options
from lit_lora.evaluate.scores import Metric
from lit_lora.evaluate.shots import encode_after_shots
from lit_lora.model import LanguageModel
from lit_lora.tokenizer import Tokenizer, encode_text

__all__ = ["Dataset", "EvaluateSettings", "Subject", "default_tasks", "exact_match", "json_fields", "loss", "options"]

_SHORT_ANSWER = 300  # characters: exact match of longer answers says nothing and takes long


@dataclass(frozen=True)
class Dataset:
    """Rows of one kind."""

    conversations: list[Conversation] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    options: list[OptionRow] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.conversations) + len(self.texts) + len(self.options)

    @property
    def answered(self) -> list[Conversation]:
        """The conversations that end with an answer."""
        return [conversation for conversation in self.conversations if reference(conversation)]


@dataclass(frozen=True)
class EvaluateSettings:
    """How a model is asked."""

    max_new_tokens: int | None = None
    batch_size: int = 50
    micro_batch_tokens: int = 2048
    plain: bool = False
    """Multiple choice as plain text even where the checkpoint has a chat template."""


@dataclass(frozen=True)
class Subject:
    """One model, as it is asked: with or without examples in the prompt."""

    model: LanguageModel
    tokenizer: Tokenizer
    dataset: Dataset
    shots: Dataset = Dataset()
    settings: EvaluateSettings = EvaluateSettings()

    @cached_property
    def answers(self) -> Scores:
        """The answers, generated once for all tasks that look at them."""
        conversations = self.dataset.answered
        if not conversations:
            raise UsageError("exact_match and json_fields need rows with a prompt and an answer; these have none")
        return evaluate_generation(
            self.model,
            self.tokenizer,
            conversations,
            shots=self.shots.conversations,
            max_new_tokens=self.settings.max_new_tokens,
            batch_size=self.settings.batch_size,
        )


def default_tasks(dataset: Dataset) -> list[str]:
    """The tasks that make sense for these rows."""
    if dataset.options:
        return ["options"]
    references = [reference(conversation) for conversation in dataset.answered]
    if not references or sorted(map(len, references))[len(references) // 2] > _SHORT_ANSWER:
        return ["loss"]
    json_answers = all(isinstance(parse_json(text), dict) for text in references)
    return ["loss", "exact_match", "json_fields"] if json_answers else ["loss", "exact_match"]


def loss(subject: Subject) -> list[Metric]:
    """Loss and perplexity over the learned tokens: the assistant's turns, or all of a plain text.

    Raises:
        UsageError: There is no token to predict.
    """
    tokenizer, context = subject.tokenizer, subject.model.context
    encoded = [
        encode_after_shots(tokenizer, each, subject.shots.conversations) for each in subject.dataset.conversations
    ]
    documents: list[tuple[Sequence[int], Sequence[bool]]] = [(each.ids, each.loss_mask) for each in encoded]
    for ids in (encode_text(tokenizer, text) for text in subject.dataset.texts):
        # pieces overlap by one token, so that every token but the first is predicted once
        pieces = [ids[start : start + context] for start in range(0, max(len(ids) - 1, 1), context - 1)]
        documents += [(piece, [True] * len(piece)) for piece in pieces]
    fitting = [document for document in documents if any(document[1][1:]) and len(document[0]) <= context]
    if not fitting:
        raise UsageError("loss needs conversations or texts that fit the model's context; there is none")
    score = evaluate_loss(
        subject.model, Rows.from_tokens(fitting), micro_batch_tokens=subject.settings.micro_batch_tokens
    )
    skipped = f", {len(documents) - len(fitting)} rows too long or empty" if len(fitting) < len(documents) else ""
    about = f"nats per token over {score.tokens:,} tokens{skipped}"
    return [Metric("loss", score.loss, about), Metric("perplexity", score.perplexity)]


def exact_match(subject: Subject) -> list[Metric]:
    """Share of answers that equal the reference, and of those that end by themselves.

    Raises:
        UsageError: No row has an answer to compare with.
    """
    scores = subject.answers
    return [Metric("exact match", scores.exact_match), Metric("ends by itself", scores.ended)]


def json_fields(subject: Subject) -> list[Metric]:
    """Share of answers that are JSON, and per field of those with the right value.

    Raises:
        UsageError: The references are no JSON objects.
    """
    scores = subject.answers
    if not scores.fields:
        raise UsageError("json_fields needs reference answers that are JSON objects")
    valid = [Metric("valid JSON", scores.valid_json)] if scores.valid_json else []
    return valid + [Metric(f"field {name}", share) for name, share in scores.fields.items()]


def options(subject: Subject) -> list[Metric]:
    """Multiple choice by likelihood.

    Raises:
        UsageError: The rows are not multiple choice.
    """
    if not subject.dataset.options:
        raise UsageError("options needs rows with a prompt, options and an answer", hint="--columns names them")
    scores = evaluate_options(
        subject.model,
        subject.tokenizer,
        subject.dataset.options,
        shots=subject.shots.options,
        chat=False if subject.settings.plain else None,
        micro_batch_tokens=subject.settings.micro_batch_tokens,
    )
    return [
        Metric("options", scores.by_sum, f"by summed log-likelihood; chance {scores.chance:.1%}"),
        Metric("options, per byte", scores.by_mean, "by log-likelihood per byte of the option"),
        Metric("loss of the right option", scores.loss, "nats per option"),
    ]
