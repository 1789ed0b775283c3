"""The ``data`` section of a config."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from lit_lora.config import Settings, did_you_mean
from lit_lora.data.formats import FORMATS

__all__ = ["DataConfig", "LabelledConfig", "RowsConfig"]


class RowsConfig(Settings):
    """Where rows come from, and which of their columns are what."""

    path: str = Field(
        description=(
            "A file (JSON, JSONL, CSV, Parquet, text; also .gz), a folder of them, hub:OWNER/NAME, alpaca, dolly, or a "
            "bundled sample such as tickets_train."
        )
    )
    columns: dict[str, str] = Field(
        default_factory=dict,
        description=(
            "The format's column -> your column, or a text with your columns in braces: "
            "{prompt: 'Is this review positive? {sentence}', completion: label}."
        ),
    )
    values: dict[str, dict[str, str]] = Field(
        default_factory=dict,
        description="Your column -> its values replaced by words: {label: {0: negative, 1: positive}}.",
    )
    validation: int | float | str | None = Field(
        None, description="Rows held out: a fraction such as 0.1, a number of rows such as 200, or a file."
    )
    limit: int | None = Field(None, ge=1, description="Read only so many rows from the start of the training files.")

    @field_validator("validation", mode="before")
    @classmethod
    def _validation_is_a_share_rows_or_a_file(cls, value: object) -> object:
        if isinstance(value, bool):
            raise ValueError("expected a fraction such as 0.1, a number of rows or a file, got true or false")
        if isinstance(value, float) and not 0 < value < 1:
            raise ValueError(f"a fraction lies between 0 and 1, a number of rows is whole, got {value}")
        if isinstance(value, int) and value < 1:
            raise ValueError(f"expected at least 1 row, got {value}; leave the key out for no validation")
        return value


class DataConfig(RowsConfig):
    """Where the rows come from, how they are read, and which of their tokens are learned."""

    format: str = Field(
        "auto",
        description="How a row is read; auto looks at the columns of the first row.",
        json_schema_extra={"enum": ["auto", *FORMATS]},
    )
    system: str | None = Field(
        None, description="A system message for the conversations that have none; nothing for plain text."
    )
    max_seq_length: int = Field(2048, ge=2, description="The most tokens a row may have.")
    too_long: Literal["drop", "truncate_prompt", "error"] = Field(
        "drop",
        description=(
            "What to do with longer rows. truncate_prompt cuts the middle out of what is not learned and keeps every "
            "answer whole. Plain text is always cut into pieces, of which every token is learned."
        ),
    )
    learn: Literal["answers", "all"] = Field(
        "answers", description="Learn the assistant's messages with their end of turn, or every token."
    )
    deduplicate: bool = Field(False, description="Keep only the first of exactly equal rows; they are counted anyway.")

    @field_validator("format")
    @classmethod
    def _format_is_known(cls, value: str) -> str:
        known = ["auto", *FORMATS]
        if value not in known:
            raise ValueError(f"unknown format {value!r}{did_you_mean(value, known)}, known: {', '.join(known)}")
        return value


class LabelledConfig(RowsConfig):
    """Where rows with labels come from: a text or a pair of texts, and a label, a number or another text."""

    columns: dict[str, str] = Field(
        default_factory=dict,
        description="text, pair or label -> your column, or a text with your columns in braces: {text: 'sst2 "
        "sentence: {sentence}', label: mood}. The usual names (sentence, sentence1 and sentence2, …) are found anyway.",
    )
    task: Literal["auto", "classification", "regression", "seq2seq"] = Field(
        "auto",
        description="What the label is: one of some names, a number, or a text to write. auto: a text for an "
        "encoder-decoder, a number where the model's config.json says so, else one of the names found in the rows.",
    )
    max_seq_length: int | None = Field(
        None, ge=4, description="The most tokens of a row, both texts together; what the model was made for if omitted."
    )
    max_target_length: int = Field(128, ge=2, description="seq2seq: the most tokens of a text to write.")
    too_long: Literal["truncate", "drop", "error"] = Field(
        "truncate", description="What to do with longer rows; how many there are is said in either case."
    )
