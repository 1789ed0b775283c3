"""The tasks: each measures one model on one dataset, and turns a :class:`Subject` into metrics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from lit_lora import log
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

_SHORT_ANSWER = 300  # characters; exact match of longer answers is slow and says little


@dataclass(frozen=True)
class Dataset:
    """Rows of one kind."""

    conversations: list[Conversation] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    options: list[OptionRow] = field(default_factory=list)
    learn: str = "answers"
    """What of a conversation is measured, as the key of the config section ``data`` says."""

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
    """Ask multiple choice as plain text even if the checkpoint has a chat template."""


@dataclass(frozen=True)
class Subject:
    """One model and what it is asked, with or without examples in the prompt."""

    model: LanguageModel
    tokenizer: Tokenizer
    dataset: Dataset
    shots: Dataset = Dataset()
    settings: EvaluateSettings = EvaluateSettings()

    @cached_property
    def answers(self) -> Scores:
        """The answers, generated once for all tasks that use them."""
        conversations = self.dataset.answered
        if not conversations:
            raise UsageError("exact_match and json_fields need rows with a prompt and an answer, but there are none")
        return evaluate_generation(
            self.model,
            self.tokenizer,
            conversations,
            shots=self.shots.conversations,
            max_new_tokens=self.settings.max_new_tokens,
            batch_size=self.settings.batch_size,
        )


def default_tasks(dataset: Dataset) -> list[str]:
    """The tasks that suit these rows."""
    if dataset.options:
        return ["options"]
    references = [reference(conversation) for conversation in dataset.answered]
    if not references:
        return ["loss"]
    median_length = sorted(map(len, references))[len(references) // 2]
    if median_length > _SHORT_ANSWER:
        return ["loss"]
    if all(isinstance(parse_json(text), dict) for text in references):
        return ["loss", "exact_match", "json_fields"]
    return ["loss", "exact_match"]


def loss(subject: Subject) -> list[Metric]:
    """Loss and perplexity over the target tokens: the assistant's turns, or all of a plain text.

    Raises:
        UsageError: There is no token to predict.
    """
    context = subject.model.context
    documents: list[tuple[Sequence[int], Sequence[bool]]] = []  # ids and loss mask
    for conversation in subject.dataset.conversations:
        encoded = encode_after_shots(
            subject.tokenizer, conversation, subject.shots.conversations, subject.dataset.learn
        )
        documents.append((encoded.ids, encoded.loss_mask))
    for text in subject.dataset.texts:
        ids = encode_text(subject.tokenizer, text)
        # Pieces overlap by one token, so that every token but the first is predicted once.
        for start in range(0, max(len(ids) - 1, 1), context - 1):
            piece = ids[start : start + context]
            documents.append((piece, [True] * len(piece)))

    # The first token is never predicted, so a target at its place does not count.
    measured = [(ids, mask) for ids, mask in documents if any(mask[1:])]
    fitting = [(ids, mask) for ids, mask in measured if len(ids) <= context]
    if not fitting:
        raise UsageError("loss needs conversations or texts that fit the model's context, but there are none")
    score = evaluate_loss(
        subject.model, Rows.from_tokens(fitting), micro_batch_tokens=subject.settings.micro_batch_tokens
    )
    noun = "rows" if subject.dataset.conversations else "pieces"
    about = f"nats per token over {score.tokens:,} tokens of {len(fitting):,} {noun}"
    without_target = len(documents) - len(measured)
    if without_target:
        about += f", without {without_target:,} that have no token to predict"
    too_long = len(measured) - len(fitting)
    if too_long:
        about += f", without {too_long:,} that are too long"
        log.warn(
            f"{too_long:,} of {len(measured):,} {noun} are longer than the model's context of {context:,} tokens and "
            "are left out of the loss"
        )
    return [Metric("loss", score.loss, about), Metric("perplexity", score.perplexity)]


def exact_match(subject: Subject) -> list[Metric]:
    """Share of answers that equal the reference, and of those that the model ended itself.

    Raises:
        UsageError: No row has an answer to compare with.
    """
    scores = subject.answers
    return [Metric("exact match", scores.exact_match), Metric("ends by itself", scores.ended)]


def json_fields(subject: Subject) -> list[Metric]:
    """Share of answers that are JSON, and for each field the share with the right value.

    Raises:
        UsageError: The references are not JSON objects.
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
        raise UsageError("options needs rows with a prompt, options and an answer", hint="name them with --columns")
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
