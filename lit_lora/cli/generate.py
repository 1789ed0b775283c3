"""``lit-lora generate``: answer one prompt, or a file of prompts."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lit_lora import log
from lit_lora.cli import options
from lit_lora.cli.answering import choose_template, next_command, reading_as_trained, sampling_from
from lit_lora.cli.prepare import reading_options
from lit_lora.errors import InputError, UsageError
from lit_lora.files import require_new

if TYPE_CHECKING:
    from lit_lora.data.columns import RowReader
    from lit_lora.data.findings import Findings
    from lit_lora.data.sample import Conversation
    from lit_lora.data.trained import TrainedReading
    from lit_lora.generate import Sampling
    from lit_lora.open.decoder import OpenedModel
    from lit_lora.tokenizer import Message

__all__ = ["command"]


def command(
    model: options.Model,
    prompt: Annotated[str | None, typer.Argument(metavar="PROMPT", help="Prompt; read from stdin if omitted.")] = None,
    file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="File of prompts: rows with 'prompt' or 'messages', or lines of text."),
    ] = None,
    column: Annotated[
        str, typer.Option(metavar="NAME", help="Column of the file that contains the prompt.")
    ] = "prompt",
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="File for the answers (JSON Lines); stdout if omitted.")
    ] = None,
    adapter: options.Adapter = None,
    system: options.System = None,
    columns: options.Columns = None,
    values: options.Values = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text without the chat template.")] = False,
    max_new_tokens: options.MaxNewTokens = 256,
    temperature: options.Temperature = 0.0,
    top_k: options.TopK = None,
    top_p: options.TopP = None,
    min_p: options.MinP = None,
    repetition_penalty: options.RepetitionPenalty = 1.0,
    seed: options.Seed = None,
    stop: options.Stop = None,
    template: options.Template = None,
    batch_size: Annotated[int, typer.Option(metavar="N", min=1, help="Number of prompts answered together.")] = 32,
    dtype: options.Dtype = None,
    device: options.Device = "auto",
    quantize: options.Quantize = None,
    drop_layers: options.DropLayers = 0,
) -> None:
    """Answer one prompt, or a file of prompts.

    The answer goes to stdout, notes go to stderr. A prompt is asked as the model was trained: with the system message
    and in the prompt template of its data. The rows of a file are read as by lit-lora prepare, but need no answer, and
    are written in the same order with two more columns: 'answer', and 'ended' (stop: complete; length: cut off). If the
    rows have one of these, ours are called 'model_answer' and 'model_ended'.

    Examples:
        lit-lora generate out/quickstart "Where is my order 48213?"

        lit-lora generate MODEL "Name a colour." --temperature 0.7 --seed 1

        lit-lora generate out/quickstart --file prompts.jsonl --out answers.jsonl

        lit-lora generate out/quickstart --file mails.csv --column body --out answers.jsonl
    """
    if file is not None and prompt is not None:
        raise UsageError("expected either a PROMPT or --file, got both")
    if out is not None and file is None:
        raise UsageError("--out needs --file")
    if out is not None:
        require_new(out)
    if column != "prompt" and file is None:
        raise UsageError("--column needs --file")
    sampling = sampling_from(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
    )
    given = reading_options(None, columns, values, system)
    if file is None:
        prompt = _typed(prompt)
    elif not file.is_file():
        raise InputError(f"{file}: {'is a folder, expected a file' if file.is_dir() else 'no such file'}")
    from lit_lora.open.decoder import open_model

    opened = open_model(model, adapter=adapter, dtype=dtype, device=device, quantize=quantize, drop_layers=drop_layers)
    log.note(opened.description)
    if template is not None:
        choose_template(opened.tokenizer, template)
    reading = None if raw else reading_as_trained(opened, given)
    if file is None:
        conversation = _conversation(str(prompt), reading)
        _answer_one(opened, _encode(opened, conversation, raw, "prompt"), sampling, stop or [])
    else:
        rows = _rows(file, column, reading)
        prompts = [_encode(opened, conversation, raw, place) for place, _, conversation in rows]
        _answer_file(opened, [row for _, row, _ in rows], prompts, sampling, stop or [], batch_size, out)
    log.note(f"next: {next_command('chat', model, adapter)}")


Row = tuple[str, dict[str, Any], "Conversation"]
"""Its ``file:line``, its columns, and the conversation to answer."""


def _typed(prompt: str | None) -> str:
    """The prompt of the command line or of stdin."""
    if prompt is None:
        if sys.stdin.isatty():
            raise UsageError("no PROMPT given", hint='lit-lora generate MODEL "your question", or --file FILE')
        prompt = sys.stdin.read().removesuffix("\n")
    if not prompt.strip():
        raise UsageError("the prompt is empty")
    return prompt


def _conversation(prompt: str, reading: TrainedReading | None) -> Conversation:
    """A prompt as a conversation; without a ``reading``, it is the text to continue."""
    from lit_lora.data.sample import Conversation

    return Conversation([{"role": "user", "content": prompt}] if reading is None else reading.conversation(prompt))


def _rows(file: Path, column: str, reading: TrainedReading | None) -> list[Row]:
    """The rows of a file of prompts.

    Raises:
        InputError: The file cannot be read or has no prompts, or a row has none.
    """
    from lit_lora.data.findings import Findings
    from lit_lora.data.read import read_rows

    findings = Findings()
    ask = _Asker(column, reading, findings)
    rows: list[Row] = []
    for number, row in read_rows(file, findings):
        if set(row) == {"text"} and column == "prompt":  # a text file: each line is a prompt
            for line_number, line in enumerate(row["text"].split("\n"), number):
                if line.strip():
                    rows.append((f"{file}:{line_number}", {"prompt": line}, _conversation(line, reading)))
            continue
        place = f"{file}:{number}"
        conversation = ask(row, place)
        if conversation is not None:
            rows.append((place, row, conversation))
    findings.check()
    findings.log_warnings()
    if not rows:
        raise InputError(f"{file}: no prompts in it")
    return rows


class _Asker:
    """Makes conversations to answer of the rows of a file.

    Args:
        column: The column that holds the prompt, if it is not ``prompt``.
        reading: How the model's training read its rows; ``None`` to continue texts.
        findings: Collects the rows without a prompt.
    """

    def __init__(self, column: str, reading: TrainedReading | None, findings: Findings) -> None:
        from lit_lora.data.columns import RowReader
        from lit_lora.data.config import DataConfig

        self._column = column
        self._reading = reading
        self._findings = findings
        self._readers: list[RowReader] = []
        """As in training; and by the row's own columns, for rows of another form."""
        if reading is not None and column == "prompt":
            other = DataConfig(path=column, system=reading.config.system, system_role=reading.config.system_role)
            self._readers = [RowReader(reading.config, findings), RowReader(other, findings)]

    def __call__(self, row: dict[str, Any], place: str) -> Conversation | None:
        """The conversation of a row; ``None`` if it is bad."""
        prompt = row.get(self._column)
        for number, reader in enumerate(self._readers):
            if number == 1 and isinstance(prompt, str) and prompt.strip():
                break  # a prompt alone is what a user types: the trained template is filled with it
            if reader.can_ask(row):
                return self._asked(reader, row, place)
        if isinstance(prompt, str) and prompt.strip():
            return self._with_system_of(row, _conversation(prompt, self._reading))
        expected = f"{self._column!r} with text"
        if self._reading is not None:
            expected += ", or 'messages'"
        self._findings.bad_row(
            place,
            f"expected {expected}, found columns {', '.join(map(str, row)) or 'none'}",
            "--column NAME says which column contains the prompt",
        )
        return None

    def _asked(self, reader: RowReader, row: dict[str, Any], place: str) -> Conversation | None:
        from lit_lora.data.sample import Conversation

        sample = reader.prompt(row, place)
        if isinstance(sample, Conversation):
            if str(sample.messages[-1].get("content") or "").strip():
                return sample
            self._findings.bad_row(place, "the prompt is empty")
        return None

    def _with_system_of(self, row: dict[str, Any], conversation: Conversation) -> Conversation:
        from lit_lora.tokenizer import fold_system

        system = row.get("system")
        if self._reading is None or not isinstance(system, str) or not system:
            return conversation
        messages: list[Message] = [{"role": "system", "content": system}, conversation.messages[-1]]
        if self._reading.config.system_role == "fold":
            messages = fold_system(messages)
        return replace(conversation, messages=messages)


def _encode(opened: OpenedModel, conversation: Conversation, raw: bool, place: str) -> list[int]:
    """Ids of one prompt.

    Raises:
        InputError: The chat template rejects it, or it is too long for the model.
    """
    from lit_lora.tokenizer import encode_prompt, encode_text

    try:
        if raw:
            ids = encode_text(opened.tokenizer, str(conversation.messages[-1]["content"]))
        else:
            ids = encode_prompt(opened.tokenizer, conversation.messages, tools=conversation.tools)
    except InputError as error:
        raise InputError(f"{place}: {error}", hint=error.hint) from error
    context = opened.model.context
    if len(ids) >= context:
        raise InputError(
            f"{place}: the prompt has {len(ids)} tokens, expected fewer than the model's context of {context}"
        )
    return ids


def _answer_one(opened: OpenedModel, prompt: list[int], sampling: Sampling, stop: list[str]) -> None:
    """Print the answer as it is generated."""
    import time

    from lit_lora.generate import stream_answer

    start = time.perf_counter()
    stream = stream_answer(opened.model, opened.tokenizer, prompt, sampling, stop=stop)
    for piece in stream:
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")
    seconds = time.perf_counter() - start
    answer = stream.answer
    end = "complete" if answer.ended == "stop" else f"cut off at --max-new-tokens {sampling.max_new_tokens}"
    log.note(f"{len(prompt)} + {len(answer.ids)} tokens in {seconds:.1f} s, {end}")


def _answer_file(
    opened: OpenedModel,
    rows: list[dict[str, Any]],
    prompts: list[list[int]],
    sampling: Sampling,
    stop: list[str],
    batch_size: int,
    out: Path | None,
) -> None:
    """Write one JSON line per row, all of them or none."""
    from lit_lora.files import write_text
    from lit_lora.generate import answer_all

    answer_column, ended_column = _free_columns(rows)
    with log.progress(total=len(prompts), what="answers", unit="row") as bar:
        answers = answer_all(
            opened.model, opened.tokenizer, prompts, sampling, stop=stop, batch_size=batch_size, on_answer=bar.update
        )
    text = ""
    for row, answer in zip(rows, answers, strict=True):
        record = {**row, answer_column: answer.text, ended_column: answer.ended}
        text += json.dumps(record, ensure_ascii=False, default=str) + "\n"
    if out is None:
        sys.stdout.write(text)
    else:
        write_text(out, text)
        log.say(f"wrote {out}: {len(answers)} answers")
    cut_off = sum(answer.ended == "length" for answer in answers)
    if cut_off:
        log.note(f"{cut_off} of {len(answers)} answers were cut off at --max-new-tokens {sampling.max_new_tokens}")


def _free_columns(rows: list[dict[str, Any]]) -> tuple[str, str]:
    """Names for the answer and for how it ended that no row has.

    Raises:
        InputError: All are taken.
    """
    taken: set[str] = set()
    for row in rows:
        taken |= row.keys()
    for prefix in ("", "model_"):
        names = (f"{prefix}answer", f"{prefix}ended")
        if not taken & set(names):
            if prefix:
                log.note(f"the rows have an answer or ended column: the answers are in {' and '.join(names)}")
            return names
    raise InputError(
        "the rows have columns named answer or ended, and model_answer or model_ended", hint="rename or remove them"
    )
