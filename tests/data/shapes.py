"""Small imitations of the files that people finetune on, by the tool or the data set whose shape they have.

Each says what the model learns from it: a row is its turns, ``role: text``, where a star marks what is learned.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

__all__ = ["SHAPES", "Shape"]

Rows = list[list[str]]


@dataclass(frozen=True)
class Shape:
    """A file or folder as people have it."""

    name: str
    write: Callable[[Path], Path]
    """Writes it into a folder, and returns what the user names."""
    rows: Rows
    """What is learned: from the rows as they are, or after the remedy is followed."""
    refused: str | None = None
    """A pattern of the error, if it is refused without options."""
    warned: tuple[str, ...] = ()
    """Patterns of what has to be said on stderr or in the report."""
    validation: Rows | None = None


def _text(name: str, content: str | bytes) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def _jsonl(*rows: Any, name: str = "rows.jsonl") -> Callable[[Path], Path]:
    return _text(name, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _json(value: Any, name: str = "rows.json") -> Callable[[Path], Path]:
    return _text(name, json.dumps(value, ensure_ascii=False, indent=2))


def _parquet(*rows: dict[str, Any], name: str = "rows.parquet") -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        pq.write_table(pa.Table.from_pylist(list(rows)), folder / name)
        return folder / name

    return write


def _folder(**files: Callable[[Path], Path] | str) -> Callable[[Path], Path]:
    """A folder ``set`` with some files; a double underscore in a name is a slash, a single one a dot."""

    def write(folder: Path) -> Path:
        for name, content in files.items():
            path = folder / "set" / name.replace("__", "/").replace("_", ".")
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, str):
                path.write_text(content)
            else:
                written = content(path.parent)
                written.rename(path)
        return folder / "set"

    return write


def _chat(*turns: str) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    return [{"role": roles[number % 2], "content": turn} for number, turn in enumerate(turns)]


CAT = ["user: Which animal purrs?", "assistant*: The cat."]
DOG = ["user: Which animal barks?", "assistant*: The dog."]
PURRS, BARKS = "Which animal purrs?", "Which animal barks?"

SHAPES = [
    # Instructions
    Shape("alpaca, a JSON list", _json([{"instruction": PURRS, "input": "", "output": "The cat."}]), [CAT]),
    Shape(
        "alpaca with an input",
        _jsonl({"instruction": "Translate.", "input": "cat", "output": "Katze"}),
        [["user: Translate.\n\ncat", "assistant*: Katze"]],
    ),
    Shape(
        "alpaca whose instruction is empty",
        _jsonl({"instruction": "", "input": PURRS, "output": "The cat."}),
        [CAT],
    ),
    Shape("alpaca without input", _jsonl({"instruction": PURRS, "response": "The cat."}), [CAT]),
    Shape(
        "LLaMA-Factory, alpaca with history and system",
        _json(
            [
                {
                    "instruction": "And then?",
                    "input": "",
                    "output": "Left.",
                    "system": "S",
                    "history": [["Where?", "Right."]],
                }
            ]
        ),
        [["system: S", "user: Where?", "assistant*: Right.", "user: And then?", "assistant*: Left."]],
    ),
    Shape(
        "dolly",
        _jsonl({"instruction": "Who?", "context": "Emma is by Austen.", "response": "Austen", "category": "closed_qa"}),
        [["user: Who?\n\nEmma is by Austen.", "assistant*: Austen"]],
    ),
    Shape(
        "rows of two shapes in one file",
        _jsonl(
            {"instruction": PURRS, "response": "The cat."}, {"instruction": BARKS, "input": "", "output": "The dog."}
        ),
        [CAT, DOG],
    ),
    Shape(
        "Orca, with a system prompt",
        _jsonl({"system_prompt": "S", "question": PURRS, "response": "The cat."}),
        [["system: S", *CAT]],
    ),
    # Prompt and completion
    Shape("prompt and completion", _jsonl({"prompt": PURRS, "completion": "The cat."}), [CAT]),
    Shape(
        "TRL, prompt and completion as messages",
        _jsonl({"prompt": _chat(PURRS), "completion": [{"role": "assistant", "content": "The cat."}]}),
        [CAT],
    ),
    Shape(
        "TRL, a prompt of several turns",
        _jsonl({"prompt": _chat("Hi", "Hello", PURRS), "completion": [{"role": "assistant", "content": "The cat."}]}),
        [["user: Hi", "assistant: Hello", *CAT]],
    ),
    Shape("question and answer", _jsonl({"question": PURRS, "answer": "The cat."}), [CAT]),
    Shape(
        "text to SQL, with the schema as context",
        _jsonl({"question": "How many?", "context": "CREATE TABLE t (a INT)", "answer": "SELECT count(*) FROM t"}),
        [["user: How many?\n\nCREATE TABLE t (a INT)", "assistant*: SELECT count(*) FROM t"]],
    ),
    Shape("problem and solution", _jsonl({"problem": PURRS, "solution": "The cat."}), [CAT], refused="fit no format"),
    Shape(
        "an answer that is an object",
        _jsonl({"prompt": "Play jazz", "completion": {"intent": "Play", "genre": "jazz"}}),
        [["user: Play jazz", 'assistant*: {"intent": "Play", "genre": "jazz"}']],
    ),
    Shape(
        "an answer with NaN",
        _text(
            "rows.jsonl",
            '{"prompt": "a", "completion": {"x": NaN}}\n{"prompt": "Which animal purrs?", "completion": "The cat."}\n',
        ),
        [CAT],
        refused="NaN",
    ),
    Shape(
        "a prompt that is an object",
        _jsonl({"prompt": {"q": "Which animal purrs?"}, "completion": "The cat."}),
        [CAT],
        refused="expected text, got an object",
    ),
    # Conversations
    Shape("OpenAI, messages", _jsonl({"messages": _chat(PURRS, "The cat.")}), [CAT]),
    Shape(
        "OpenAI, weight 0",
        _jsonl(
            {
                "messages": [
                    *_chat("Hi"),
                    {"role": "assistant", "content": "Hello", "weight": 0},
                    *_chat(PURRS, "The cat."),
                ]
            }
        ),
        [["user: Hi", "assistant: Hello", *CAT]],
    ),
    Shape(
        "OpenAI, content in parts",
        _jsonl(
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": PURRS}]},
                    {"role": "assistant", "content": "The cat."},
                ]
            }
        ),
        [CAT],
    ),
    Shape(
        "LLaMA-Factory v1, parts with a value",
        _jsonl(
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "value": PURRS}]},
                    {"role": "assistant", "content": [{"type": "text", "value": "The cat."}], "loss_weight": 1.0},
                ]
            }
        ),
        [CAT],
    ),
    Shape(
        "OpenAI, a call that the template cannot write",
        _jsonl(
            {
                "messages": [
                    *_chat("Play A0"),
                    {
                        "role": "assistant",
                        "content": None,
                        "tool_calls": [
                            {"type": "function", "function": {"name": "play", "arguments": '{"song": "A0"}'}}
                        ],
                    },
                ]
            }
        ),
        [["user: Play A0", 'assistant*: {"name": "play", "arguments": {"song": "A0"}}']],
        warned=("call",),
    ),
    Shape(
        "a typo in a message",
        _jsonl(
            {"messages": [{"role": "user", "contents": "a"}, {"role": "assistant", "content": "b"}]},
            {"messages": _chat(PURRS, "The cat.")},
        ),
        [CAT],
        refused=r"messages\[0\]: no content, found: contents",
    ),
    Shape(
        "an empty answer between",
        _jsonl({"messages": _chat("Name one.", "", PURRS, "The cat.")}),
        [["user: Name one.", "assistant: ", *CAT]],
        warned=("empty",),
    ),
    Shape(
        "a conversation with nothing in it",
        _jsonl({"messages": []}, {"messages": _chat(PURRS, "The cat.")}),
        [CAT],
        warned=("no target tokens",),
    ),
    Shape(
        "one conversation alone in a .json",
        _json({"messages": _chat(PURRS, "The cat.")}),
        [CAT],
    ),
    Shape(
        "UltraChat, a prompt beside messages",
        _jsonl({"prompt": PURRS, "prompt_id": "a1", "messages": _chat(PURRS, "The cat.")}),
        [CAT],
    ),
    Shape(
        "ShareGPT",
        _json(
            [{"id": "x", "conversations": [{"from": "human", "value": PURRS}, {"from": "gpt", "value": "The cat."}]}]
        ),
        [CAT],
    ),
    Shape(
        "ShareGPT with a call",
        _json(
            [
                {
                    "conversations": [
                        {"from": "human", "value": "Play"},
                        {"from": "function_call", "value": '{"name": "play", "arguments": {}}'},
                        {"from": "observation", "value": "ok"},
                        {"from": "gpt", "value": "Done."},
                    ],
                    "tools": "[]",
                }
            ]
        ),
        [["user: Play", 'assistant*: {"name": "play", "arguments": {}}', "tool: ok", "assistant*: Done."]],
    ),
    Shape(
        "ShareGPT, other spellings of roles",
        _json([{"conversations": [{"from": "User", "value": PURRS}, {"from": "AI", "value": "The cat."}]}]),
        [CAT],
    ),
    Shape(
        "roles of one's own",
        _jsonl({"messages": [{"role": "customer", "content": PURRS}, {"role": "agent", "content": "The cat."}]}),
        [CAT],
        refused="unknown role",
    ),
    Shape(
        "XTuner",
        _json([{"conversation": [{"system": "S", "input": PURRS, "output": "The cat."}]}]),
        [["system: S", *CAT]],
    ),
    Shape("Firefly", _jsonl({"conversation": [{"human": PURRS, "assistant": "The cat."}], "category": "x"}), [CAT]),
    Shape(
        "Gemini, contents of parts",
        _jsonl(
            {
                "contents": [
                    {"role": "user", "parts": [{"text": PURRS}]},
                    {"role": "model", "parts": [{"text": "The cat."}]},
                ]
            }
        ),
        [CAT],
    ),
    Shape(
        "ms-swift, query, response and history",
        _jsonl({"query": "and then?", "response": "Go left.", "history": [["Where?", "Right."]]}),
        [["user: Where?", "assistant*: Right.", "user: and then?", "assistant*: Go left."]],
    ),
    Shape(
        "ms-swift, loss of a message",
        _jsonl(
            {
                "messages": [
                    *_chat("Hi"),
                    {"role": "assistant", "content": "Hello", "loss": False},
                    *_chat(PURRS, "The cat."),
                ]
            }
        ),
        [["user: Hi", "assistant: Hello", *CAT]],
    ),
    Shape(
        "Axolotl, train_on_turn",
        _jsonl(
            {
                "conversations": [
                    {"from": "human", "value": "Hi"},
                    {"from": "gpt", "value": "Hello", "train_on_turn": False},
                    {"from": "human", "value": PURRS},
                    {"from": "gpt", "value": "The cat."},
                ]
            }
        ),
        [["user: Hi", "assistant: Hello", *CAT]],
    ),
    Shape(
        "a conversation with images",
        _jsonl(
            {"messages": _chat("<image>What is it?", "A cat."), "images": ["a.png"]},
            {"messages": _chat(PURRS, "The cat."), "images": []},
        ),
        [CAT],
        refused="image",
    ),
    Shape(
        "Axolotl, segments",
        _jsonl({"segments": [{"label": False, "text": "Q: a A:"}, {"label": True, "text": " b"}]}),
        [],
        refused="label, text",
    ),
    # Preferences
    Shape(
        "TRL, preference as messages",
        _jsonl(
            {
                "prompt": _chat(PURRS),
                "chosen": [{"role": "assistant", "content": "The cat."}],
                "rejected": [{"role": "assistant", "content": "No."}],
            }
        ),
        [CAT],
        refused="preference",
    ),
    Shape(
        "TRL, preference with the prompt within",
        _jsonl({"chosen": _chat(PURRS, "The cat."), "rejected": _chat(PURRS, "No.")}),
        [CAT],
        refused="preference",
    ),
    Shape(
        "preference as text",
        _jsonl({"question": PURRS, "chosen": "The cat.", "rejected": "No."}),
        [CAT],
        refused="preference",
    ),
    Shape(
        "LLaMA-Factory, preference of a conversation",
        _json(
            [
                {
                    "conversations": [{"from": "human", "value": PURRS}],
                    "chosen": {"from": "gpt", "value": "The cat."},
                    "rejected": {"from": "gpt", "value": "No."},
                }
            ]
        ),
        [CAT],
        refused="preference",
    ),
    Shape(
        "StackExchange pairs",
        _jsonl({"question": PURRS, "response_j": "The cat.", "response_k": "No."}),
        [CAT],
        refused="preference",
    ),
    Shape(
        "KTO",
        _jsonl(
            {"prompt": "Which swims?", "completion": "fish", "label": True},
            {"prompt": PURRS, "completion": "No.", "label": False},
        ),
        [["user: Which swims?", "assistant*: fish"]],
        refused="label",
    ),
    Shape(
        "HH-RLHF, chosen text",
        _jsonl(
            {
                "chosen": f"\n\nHuman: {PURRS}\n\nAssistant: The cat.",
                "rejected": f"\n\nHuman: {PURRS}\n\nAssistant: No.",
            }
        ),
        [CAT],
        refused="preference",
    ),
    # Containers
    Shape("a list in .jsonl", _text("rows.jsonl", json.dumps([{"prompt": PURRS, "completion": "The cat."}])), [CAT]),
    Shape(
        "objects one after another",
        _text(
            "rows.json",
            json.dumps({"prompt": PURRS, "completion": "The cat."}, indent=1)
            + "\n"
            + json.dumps({"prompt": BARKS, "completion": "The dog."}, indent=1),
        ),
        [CAT, DOG],
    ),
    Shape(
        "objects joined by commas",
        _text(
            "rows.json",
            json.dumps({"prompt": PURRS, "completion": "The cat."})
            + ",\n"
            + json.dumps({"prompt": BARKS, "completion": "The dog."}),
        ),
        [CAT, DOG],
    ),
    Shape(
        "JSON within JSON",
        _text("rows.json", json.dumps(json.dumps([{"prompt": PURRS, "completion": "The cat."}]))),
        [CAT],
    ),
    Shape("a wrapper", _json({"version": "1.0", "data": [{"prompt": PURRS, "completion": "The cat."}]}), [CAT]),
    Shape(
        "an object that is a row",
        _json({"prompt": PURRS, "completion": "The cat.", "examples": [{"prompt": "no", "completion": "no"}]}),
        [CAT],
    ),
    Shape("columns of lists", _json({"prompt": [PURRS, BARKS], "completion": ["The cat.", "The dog."]}), [CAT, DOG]),
    Shape(
        "pandas, columns of indexed values",
        _json({"prompt": {"0": PURRS, "1": BARKS}, "completion": {"0": "The cat.", "1": "The dog."}}),
        [CAT, DOG],
    ),
    Shape(
        "pandas, split",
        _json({"columns": ["prompt", "completion"], "index": [0], "data": [[PURRS, "The cat."]]}),
        [CAT],
    ),
    Shape(
        "splits in one file",
        _json(
            {
                "train": [{"prompt": PURRS, "completion": "The cat."}],
                "test": [{"prompt": BARKS, "completion": "The dog."}],
            }
        ),
        [CAT],
        warned=("test",),
    ),
    Shape(
        "a Git LFS pointer",
        _text("rows.parquet", "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"),
        [],
        refused="Git LFS pointer",
    ),
    Shape(
        "a web page", _text("rows.jsonl", "<!DOCTYPE html>\n<html><body>Sign in</body></html>\n"), [], refused="HTML"
    ),
    Shape(
        "a Python repr in a cell",
        _text(
            "rows.csv",
            "messages\n\"[{'role': 'user', 'content': 'Which animal purrs?'}, "
            "{'role': 'assistant', 'content': 'The cat.'}]\"\n",
        ),
        [CAT],
    ),
    Shape(
        "broken lines",
        _text(
            "rows.jsonl", '{"prompt": "a"\n{"prompt": "Which animal purrs?", "completion": "The cat."}\n{"prompt": \n'
        ),
        [CAT],
        refused=r"rows.jsonl:1: not valid JSON(.|\n)*rows.jsonl:3: not valid JSON",
    ),
    # Tables
    Shape("CSV", _text("rows.csv", "question,answer\nWhich animal purrs?,The cat.\n"), [CAT]),
    Shape(
        "CSV of Excel", _text("rows.csv", "\ufeffsep=;\r\nprompt;completion\r\nWhich animal purrs?;The cat.\r\n"), [CAT]
    ),
    Shape("CSV with pipes", _text("rows.csv", "prompt|completion\nWhich animal purrs?|The cat.\n"), [CAT]),
    Shape("CSV with an index", _text("rows.csv", ",prompt,completion\n0,Which animal purrs?,The cat.\n"), [CAT]),
    Shape(
        "TSV with commas",
        _text("rows.tsv", "prompt\tcompletion\nWhich animal, of all, purrs?\tThe cat.\n"),
        [["user: Which animal, of all, purrs?", "assistant*: The cat."]],
    ),
    Shape(
        "tweets",
        _text("rows.csv", "tweet,label\nI love it,joy\n"),
        [["user: I love it", "assistant*: joy"]],
        refused="fit no format",
    ),
    Shape(
        "reports",
        _text("rows.csv", "input_text,target_report\nscan,clear\n"),
        [["user: scan", "assistant*: clear"]],
        refused="fit no format",
    ),
    Shape(
        "descriptions",
        _jsonl({"description": "scan", "data": "clear"}),
        [["user: scan", "assistant*: clear"]],
        refused="fit no format",
    ),
    Shape(
        "question titles",
        _text("rows.csv", "questionTitle,questionText,answerText\nPurr,Which animal purrs?,The cat.\n"),
        [CAT],
        refused="fit no format",
    ),
    Shape(
        "class numbers",
        _text("rows.csv", "prompt,label\nI love it,1\nI hate it,0\n"),
        [["user: I love it", "assistant*: 1"], ["user: I hate it", "assistant*: 0"]],
        refused="fit no format",
        warned=("values",),
    ),
    Shape(
        "one badly quoted row",
        _text("rows.csv", 'prompt,completion\n"a" b,c\nWhich animal purrs?,The cat.\n'),
        [CAT],
        refused="rows.csv:2",
    ),
    Shape(
        "SAMSum",
        _jsonl({"id": "1", "dialogue": "A: Hi", "summary": "A greets."}),
        [["user: A: Hi", "assistant*: A greets."]],
        refused="fit no format",
    ),
    Shape(
        "translation pairs",
        _jsonl({"translation": {"en": "cat", "de": "Katze"}}, {"translation": {"en": "dog", "de": "Hund"}}),
        [["user: cat", "assistant*: Katze"], ["user: dog", "assistant*: Hund"]],
        refused="translation",
    ),
    Shape(
        "Parquet with a date",
        _parquet({"prompt": "When?", "completion": __import__("datetime").date(2024, 5, 1)}),
        [["user: When?", "assistant*: 2024-05-01"]],
    ),
    Shape("Parquet of messages", _parquet({"messages": _chat(PURRS, "The cat.")}), [CAT]),
    Shape("pandas index in Parquet", _parquet({"text": "Call me.", "__index_level_0__": 3}), [["text*: Call me."]]),
    # Text
    Shape("plain text", _text("story.txt", "Call me."), [["text*: Call me."]]),
    Shape("a text column", _jsonl({"text": "Call me.", "meta": {"source": "x"}}), [["text*: Call me."]]),
    Shape(
        "Guanaco, a dialog in one text",
        _jsonl({"text": f"### Human: {PURRS}### Assistant: The cat."}),
        [CAT],
        warned=("dialog",),
    ),
    Shape(
        "text of another model's template",
        _jsonl({"text": f"<|im_start|>user\n{PURRS}<|im_end|>\n<|im_start|>assistant\nThe cat.<|im_end|>"}),
        [[f"text*: <|im_start|>user\n{PURRS}<|im_end|>\n<|im_start|>assistant\nThe cat.<|im_end|>"]],
        warned=("special",),
    ),
    # Folders
    Shape(
        "a cloned data set",
        _folder(
            README_md="# Data",
            data__train_parquet=_parquet({"prompt": PURRS, "completion": "The cat."}),
            data__test_parquet=_parquet({"prompt": BARKS, "completion": "The dog."}),
        ),
        [CAT],
        warned=("test",),
    ),
    Shape(
        "training and eval files",
        _folder(
            training_jsonl=_jsonl({"prompt": PURRS, "completion": "The cat."}),
            eval_jsonl=_jsonl({"prompt": BARKS, "completion": "The dog."}),
        ),
        [CAT],
        validation=[DOG],
    ),
    Shape(
        "files of two formats",
        _folder(
            identity_json=_json([{"instruction": PURRS, "input": "", "output": "The cat."}]),
            messages_json=_json([{"messages": _chat(BARKS, "The dog.")}]),
        ),
        [CAT, DOG],
    ),
]


def _saved(folder: Path) -> Path:
    datasets.Dataset.from_list([{"prompt": PURRS, "completion": "The cat."}]).save_to_disk(folder / "saved")
    return folder / "saved"


def _pandas_json(folder: Path) -> Path:
    pd.DataFrame({"prompt": [PURRS], "completion": ["The cat."]}).to_json(folder / "table.json", orient="table")
    return folder / "table.json"


SHAPES += [
    Shape("a folder of save_to_disk", _saved, [CAT]),
    Shape("pandas, table", _pandas_json, [CAT]),
]
