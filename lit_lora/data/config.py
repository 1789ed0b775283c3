"""The ``data`` section of a config."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, TypeAlias, TypeVar

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from lit_lora.config import Settings, did_you_mean, validate
from lit_lora.data.formats import FORMATS
from lit_lora.data.formats.turns import ROLES

__all__ = ["READING", "DataConfig", "LabeledConfig", "MixEntry", "RowsConfig", "ValidationFile"]

READING = frozenset(
    {"format", "columns", "roles", "message_keys", "values", "system", "system_role", "learn", "special_tokens"}
)
"""Keys of the section ``data`` that say how rows are read; the others say which rows are."""


class ValidationFile(Settings):
    """Held-out rows in a file of their own, where it is not read like the training files."""

    path: str = Field(description="File, folder or Hub dataset.")
    columns: dict[str, str] | None = Field(None, description="Its own columns; those of data if omitted.")
    values: dict[str, dict[str, str]] | None = Field(None, description="Its own values; those of data if omitted.")
    limit: int | None = Field(None, ge=1, description="Number of rows to read from its start; all if omitted.")


class ValidationFileOfConversations(ValidationFile):
    """Held-out rows for a decoder."""

    format: str | None = Field(None, description="Its own format; that of data if omitted.")


def _kind(value: object) -> str:
    return "section" if isinstance(value, dict | ValidationFile) else "rows"


Config = TypeVar("Config", bound="RowsConfig")

_Amount: TypeAlias = Annotated[int | float | str, Tag("rows")]

_PERCENTAGE = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?%")


class RowsConfig(Settings):
    """Where rows come from, and what each of their columns is."""

    path: str = Field(
        description=(
            "File (JSON, JSONL, CSV, Parquet or text; also .gz), folder of such files, "
            "hub:OWNER/NAME[:CONFIG][@SPLIT][#REVISION], alpaca, dolly or a bundled sample such as tickets_train."
        )
    )
    columns: dict[str, str] = Field(
        default_factory=dict,
        description=(
            "Map from the format's column to your column, or to a template with your columns in braces: "
            "{prompt: 'Is this review positive? {sentence}', completion: label}."
        ),
    )
    values: dict[str, dict[str, str]] = Field(
        default_factory=dict,
        description="Words that replace the values of your column: {label: {0: negative, 1: positive}}.",
    )
    validation: Annotated[_Amount | Annotated[ValidationFile, Tag("section")], Discriminator(_kind)] | None = Field(
        None,
        description="Held-out rows: a fraction such as 0.1 or 10%, a number of rows such as 200, a file, folder or Hub "
        "split, or a section with the path of a file and its own columns, values and limit.",
    )
    limit: int | None = Field(
        None, ge=1, description="Number of rows to read from the start of the training files; all if omitted."
    )
    bad_rows: Literal["error", "skip"] = Field(
        "error", description="What to do with rows that cannot be read: stop and name them all, or leave them out."
    )

    @field_validator("validation", mode="before")
    @classmethod
    def _validation_is_a_share_rows_or_a_file(cls, value: object) -> object:
        if isinstance(value, bool):
            raise ValueError("expected a fraction such as 0.1, a number of rows or a file, got true or false")
        if isinstance(value, str) and (percentage := _PERCENTAGE.fullmatch(value.strip())):
            value = float(percentage[1]) / 100
        if isinstance(value, float) and not 0 < value < 1:
            raise ValueError(f"expected a fraction between 0 and 1 or a whole number of rows, got {value}")
        if isinstance(value, int) and value < 1:
            raise ValueError(f"expected at least 1 row, got {value}; omit the key for no validation")
        return value

    def for_validation(self: Config) -> Config | None:
        """The settings by which the validation file is read; ``None`` if this section does not name one.

        Raises:
            UsageError: They are not valid together.
        """
        if isinstance(self.validation, str):
            own: dict[str, Any] = {"path": self.validation}
        elif isinstance(self.validation, ValidationFile):
            own = self.validation.model_dump(exclude_none=True)
        else:
            return None
        settings = {**self.model_dump(exclude={"mix"}), "validation": None, "limit": None, **own}
        return validate(settings, type(self), name="data.validation")


class DataSetConfig(RowsConfig):
    """Where the rows of one data set come from, how they are read, and which of their tokens are targets."""

    validation: (
        Annotated[_Amount | Annotated[ValidationFileOfConversations, Tag("section")], Discriminator(_kind)] | None
    ) = Field(
        None,
        description="Held-out rows: a fraction such as 0.1 or 10%, a number of rows such as 200, a file, folder or Hub "
        "split, or a section with the path of a file and its own columns, values, format and limit.",
    )
    format: str = Field(
        "auto",
        description="Format of the rows; auto detects it from the columns of the first row.",
        json_schema_extra={"enum": ["auto", *FORMATS]},
    )
    roles: dict[str, str] = Field(
        default_factory=dict,
        description="Map from your names of roles to user, assistant, system or tool: "
        "{customer: user, agent: assistant}; also as columns: {roles: …}.",
    )
    message_keys: dict[Literal["role", "content"], str] = Field(
        default_factory=dict,
        description="Map from role and content to your keys of messages: {role: speaker, content: utterance}; also as "
        "columns: {role: …, content: …}.",
    )
    system: str | None = Field(
        None, description="System message for conversations that have none; plain text gets none."
    )
    system_role: Literal["keep", "fold"] = Field(
        "keep",
        description="Where system messages go: keep leaves them to the chat template, fold puts each at the beginning "
        "of the first user message, for templates that have no place for one.",
    )
    max_seq_length: int = Field(2048, ge=2, description="Maximum row length in tokens.")
    too_long: Literal["drop", "truncate_prompt", "error"] = Field(
        "drop",
        description=(
            "What to do with longer rows. truncate_prompt cuts from the middle of the prompt and keeps every answer "
            "whole. Plain text is always split into pieces, and no token is lost."
        ),
    )
    learn: Literal["answers", "last", "all"] = Field(
        "answers",
        description="Tokens to train on: the assistant's messages with their end of turn, only the last of them in "
        "each conversation, or all tokens.",
    )

    special_tokens: Literal["text", "parse"] = Field(
        "text",
        description="What strings such as <|im_end|> in plain text rows are: text, or the model's special tokens, as "
        "in text that a chat template rendered before. In conversations they are always text.",
    )

    @model_validator(mode="before")
    @classmethod
    def _roles_and_message_keys_may_stand_among_the_columns(cls, values: Any) -> Any:
        columns = values.get("columns") if isinstance(values, dict) else None
        if not isinstance(columns, dict):
            return values
        others = dict(columns)
        values = {**values, "columns": others}
        if isinstance(columns.get("roles"), dict):
            values["roles"] = {**others.pop("roles"), **values.get("roles", {})}
        keys = {key: others.pop(key) for key in ("role", "content") if key in others}
        if keys:
            values["message_keys"] = {**keys, **values.get("message_keys", {})}
        return values

    @field_validator("roles")
    @classmethod
    def _roles_are_known(cls, value: dict[str, str]) -> dict[str, str]:
        for name, role in value.items():
            if role.lower() not in ROLES:
                raise ValueError(f"{name}: unknown role {role!r}{did_you_mean(role, ROLES)}, known: {', '.join(ROLES)}")
        return value

    @field_validator("format")
    @classmethod
    def _format_is_known(cls, value: str) -> str:
        formats = ["auto", *FORMATS]
        if value not in formats:
            raise ValueError(f"unknown format {value!r}{did_you_mean(value, formats)}, known: {', '.join(formats)}")
        return value


class MixEntry(DataSetConfig):
    """One of several data sets."""

    weight: float | None = Field(
        None,
        gt=0,
        description="Share of the rows that each step draws from this data set, relative to the other weights. "
        "Without weights, every row of every data set is visited once per epoch.",
    )

    @model_validator(mode="before")
    @classmethod
    def _a_text_is_a_path(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value


class DataConfig(DataSetConfig):
    """The rows of one data set or of several, and what is done with all of them together."""

    path: str = Field(
        "",
        description=(
            "File (JSON, JSONL, CSV, Parquet or text; also .gz), folder of such files, "
            "hub:OWNER/NAME[:CONFIG][@SPLIT][#REVISION], alpaca, dolly or a bundled sample such as tickets_train."
        ),
    )
    mix: list[MixEntry] = Field(
        default_factory=list,
        description="Several data sets instead of path, each with a path, perhaps a weight, and any other key of this "
        "section where it differs: [{path: a.jsonl, weight: 2}, {path: b.csv, weight: 1, system: Be brief.}]. "
        "A section that is only a list, data: [{path: a.jsonl}, …], means the same.",
    )
    deduplicate: bool = Field(
        False, description="Keep only the first of identical rows. Duplicates are reported either way."
    )

    @model_validator(mode="before")
    @classmethod
    def _a_list_is_a_mix(cls, value: Any) -> Any:
        return {"mix": value} if isinstance(value, list) else value

    @model_validator(mode="after")
    def _path_or_mix(self) -> DataConfig:
        if "path" not in self.model_fields_set and not self.mix:
            raise ValueError("path is missing: a file, a folder or a data set of the Hub")
        if self.path and self.mix:
            raise ValueError("path and mix are both given; expected one of them")
        unweighted = [number for number, entry in enumerate(self.mix) if entry.weight is None]
        if unweighted and len(unweighted) < len(self.mix):
            raise ValueError(f"mix[{unweighted[0]}] has no weight, but others have; expected all or none")

        # Filled in here, so that the config saved with a run reads the same. Rows to hold out concern all sets.
        shared = self.model_fields_set - {"path", "mix", "deduplicate", "validation"}
        for number, entry in enumerate(self.mix):
            defaults = {key: getattr(self, key) for key in shared - entry.model_fields_set}
            self.mix[number] = entry.model_copy(update=defaults)
        return self

    @property
    def data_sets(self) -> list[DataConfig]:
        """The data sets, each as a section of its own: those of ``mix``, or only this one."""
        if not self.mix:
            return [self]
        sections = []
        for entry in self.mix:
            sections.append(DataConfig.model_validate(entry.model_dump(exclude={"weight"})))
        return sections

    @property
    def weights(self) -> list[float] | None:
        """The weight of each data set; ``None`` if they have none."""
        weights = [entry.weight for entry in self.mix if entry.weight is not None]
        return weights or None


class LabeledConfig(RowsConfig):
    """Where labeled rows come from: a text or a pair of texts, and a label, a number or a target text."""

    columns: dict[str, str] = Field(
        default_factory=dict,
        description="Map from text, pair or label to your column, or to a template with your columns in braces: "
        "{text: 'sst2 sentence: {sentence}', label: mood}. Usual names (sentence, sentence1, …) need no mapping.",
    )
    task: Literal["auto", "classification", "regression", "seq2seq"] = Field(
        "auto",
        description="Kind of label: a class, a number or a text to write. auto: a text for an encoder-decoder, a "
        "number where the model's config.json says so, else a class.",
    )
    max_seq_length: int | None = Field(
        None, ge=4, description="Maximum row length in tokens, both texts together; the model's own limit if omitted."
    )
    max_target_length: int = Field(128, ge=2, description="Maximum length of a seq2seq target, in tokens.")
    too_long: Literal["truncate", "drop", "error"] = Field(
        "truncate", description="What to do with longer rows; their number is reported either way."
    )
