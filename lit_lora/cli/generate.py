"""``lit-lora generate``: answer one prompt, or a file of prompts."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lit_lora import log
from lit_lora.cli import options
from lit_lora.cli.answering import choose_template, next_command, sampling_from
from lit_lora.errors import InputError, UsageError
from lit_lora.files import require_new

if TYPE_CHECKING:
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

    The answer goes to stdout, notes go to stderr. The rows of a file are written in the same order with two more
    columns: 'answer', and 'ended' (stop: complete; length: cut off).

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
    rows = _rows(file, column, system, raw) if file is not None else _one(prompt, system)
    from lit_lora.open.decoder import open_model

    opened = open_model(model, adapter=adapter, dtype=dtype, device=device, quantize=quantize, drop_layers=drop_layers)
    log.note(opened.description)
    if template is not None:
        choose_template(opened.tokenizer, template)
    prompts = [_encode(opened, messages, raw, place) for place, _, messages in rows]
    if file is None:
        _answer_one(opened, prompts[0], sampling, stop or [])
    else:
        _answer_file(opened, rows, prompts, sampling, stop or [], batch_size, out)
    log.note(f"next: {next_command('chat', model, adapter)}")


Row = tuple[str, dict[str, Any], "list[Message]"]
"""Its ``file:line``, its columns, and the conversation to answer."""


def _one(prompt: str | None, system: str | None) -> list[Row]:
    if prompt is None:
        if sys.stdin.isatty():
            raise UsageError("no PROMPT given", hint='lit-lora generate MODEL "your question", or --file FILE')
        prompt = sys.stdin.read().removesuffix("\n")
    if not prompt.strip():
        raise UsageError("the prompt is empty")
    return [("prompt", {}, _conversation(prompt, system))]


def _rows(file: Path, column: str, system: str | None, raw: bool) -> list[Row]:
    """The rows of a file of prompts.

    Raises:
        InputError: The file cannot be read or has no prompts, or a row has none.
    """
    from lit_lora.data.findings import Findings
    from lit_lora.data.read import read_rows

    if not file.is_file():
        raise InputError(f"{file}: {'is a folder, expected a file' if file.is_dir() else 'no such file'}")
    findings = Findings()
    rows: list[Row] = []
    for number, row in read_rows(file, findings):
        if set(row) == {"text"} and column == "prompt":  # a text file: each line is a prompt
            for line_number, line in enumerate(row["text"].split("\n"), number):
                if line.strip():
                    rows.append((f"{file}:{line_number}", {"prompt": line}, _conversation(line, system)))
        else:
            place = f"{file}:{number}"
            rows.append((place, row, _messages(row, column, system, raw, place)))
    findings.check()
    if not rows:
        raise InputError(f"{file}: no prompts in it")
    return rows


def _messages(row: dict[str, Any], column: str, system: str | None, raw: bool, place: str) -> list[Message]:
    """The conversation of one row, from its prompt or its messages.

    Raises:
        InputError: The row has neither, or its messages end with an answer.
    """
    prompt = row.get(column)
    if isinstance(prompt, str) and prompt.strip():
        row_system = row.get("system")
        if isinstance(row_system, str) and row_system:
            system = row_system
        return _conversation(prompt, system)

    messages = row.get("messages")
    if isinstance(messages, list) and messages and not raw:
        if _role(messages[-1]) == "assistant":
            raise InputError(f"{place}: the conversation ends with an answer, expected a user message at the end")
        if system and _role(messages[0]) != "system":
            return [{"role": "system", "content": system}, *messages]
        return messages

    expected = f"{column!r} with text" if raw else f"{column!r} with text, or 'messages'"
    raise InputError(
        f"{place}: expected {expected}, found columns {', '.join(map(str, row)) or 'none'}",
        hint="--column NAME says which column contains the prompt",
    )


def _role(message: Any) -> Any:
    return message.get("role") if isinstance(message, dict) else None


def _conversation(prompt: str, system: str | None) -> list[Message]:
    messages: list[Message] = []
    if system:
        messages.append({"role": "system", "content": system})
    messages.append({"role": "user", "content": prompt})
    return messages


def _encode(opened: OpenedModel, messages: list[Message], raw: bool, place: str) -> list[int]:
    """Ids of one prompt.

    Raises:
        InputError: The chat template rejects it, or it is too long for the model.
    """
    from lit_lora.tokenizer import encode_prompt, encode_text

    try:
        if raw:
            ids = encode_text(opened.tokenizer, str(messages[-1]["content"]))
        else:
            ids = encode_prompt(opened.tokenizer, messages)
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
    rows: list[Row],
    prompts: list[list[int]],
    sampling: Sampling,
    stop: list[str],
    batch_size: int,
    out: Path | None,
) -> None:
    """Write one JSON line per row, all of them or none."""
    from lit_lora.files import write_text
    from lit_lora.generate import answer_all

    with log.progress(total=len(prompts), what="answers", unit="row") as bar:
        answers = answer_all(
            opened.model, opened.tokenizer, prompts, sampling, stop=stop, batch_size=batch_size, on_answer=bar.update
        )
    text = ""
    for (_, row, _), answer in zip(rows, answers, strict=True):
        record = {**row, "answer": answer.text, "ended": answer.ended}
        text += json.dumps(record, ensure_ascii=False, default=str) + "\n"
    if out is None:
        sys.stdout.write(text)
    else:
        write_text(out, text)
        log.say(f"wrote {out}: {len(answers)} answers")
    cut_off = sum(answer.ended == "length" for answer in answers)
    if cut_off:
        log.note(f"{cut_off} of {len(answers)} answers were cut off at --max-new-tokens {sampling.max_new_tokens}")
