"""Where a checkpoint keeps several templates, and which is used: transformers is the oracle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from lit_lora.errors import InputError
from lit_lora.tokenizer import Tokenizer, encode_chat, encode_prompt
from tests.tokenizer.conftest import MakeTokenizer, change_json

QUESTION: list[Any] = [{"role": "user", "content": "hello"}]
TOOLS = [{"type": "function", "function": {"name": "f", "description": "", "parameters": {"type": "object"}}}]


def template(word: str) -> str:
    return f"{word}: {{% for m in messages %}}{{{{ m.content }}}}<|im_end|>{{% endfor %}}"


def check_as_transformers_does(folder: Path, tools: Any = None) -> str:
    """The text that transformers renders, and that our ids decode to."""
    theirs = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    text = theirs.apply_chat_template(QUESTION, tools=tools, tokenize=False)
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.decode(encode_prompt(tokenizer, QUESTION, tools=tools), skip_special=False) == text
    return str(text)


@pytest.fixture
def folder(make: MakeTokenizer) -> Path:
    """A checkpoint without any template."""
    checkpoint = make()
    (checkpoint / "chat_template.jinja").unlink()
    return checkpoint


def test_files_go_before_the_entry_in_the_config(folder: Path) -> None:
    change_json(folder / "chat_template.json", chat_template=template("processor"))
    tokenizer = Tokenizer.load(folder)  # transformers' tokenizers do not read this one, its processors do
    assert tokenizer.template.render(QUESTION).startswith("processor")
    change_json(folder / "tokenizer_config.json", chat_template=template("entry"))
    assert check_as_transformers_does(folder).startswith("entry")
    (folder / "chat_template.jinja").write_text(template("file"))
    assert check_as_transformers_does(folder).startswith("file")


@pytest.mark.parametrize("as_files", [True, False])
def test_a_template_for_tools_is_used_with_tools(folder: Path, as_files: bool) -> None:
    if as_files:
        (folder / "additional_chat_templates").mkdir()
        (folder / "additional_chat_templates" / "tool_use.jinja").write_text(template("tools"))
        (folder / "chat_template.jinja").write_text(template("default"))
    else:
        entries = [{"name": word, "template": template(word)} for word in ("default", "tool_use")]
        change_json(folder / "tokenizer_config.json", chat_template=entries)
    assert check_as_transformers_does(folder).startswith("default")
    assert check_as_transformers_does(folder, TOOLS).startswith("tool")
    tokenizer = Tokenizer.load(folder)
    with_tools = encode_chat(tokenizer, [*QUESTION, {"role": "assistant", "content": "world"}], tools=TOOLS)
    targets = [token for token, target in zip(with_tools.ids, with_tools.loss_mask, strict=True) if target]
    assert tokenizer.decode(targets, skip_special=False) == "world<|im_end|>"


def test_all_templates_are_saved_but_a_chosen_one_alone(folder: Path, tmp_path: Path) -> None:
    entries = [
        {"name": word, "template": template(word)}
        for word in ("default", "tool_use", "rag", "../../evil", "a/../../../evil")
    ]
    change_json(folder / "tokenizer_config.json", chat_template=entries)
    tokenizer = Tokenizer.load(folder)
    saved = tmp_path / "a" / "b" / "saved"
    tokenizer.save(saved)
    assert Tokenizer.load(saved).fingerprint == tokenizer.fingerprint
    assert sorted(path.name for path in (saved / "additional_chat_templates").iterdir()) == [
        "rag.jinja",
        "tool_use.jinja",
    ]
    assert not list(tmp_path.rglob("evil*"))

    tokenizer.choose_template("rag")
    assert tokenizer.template_name == "rag"
    tokenizer.save(saved)
    assert not (saved / "additional_chat_templates").exists()
    assert check_as_transformers_does(saved, TOOLS).startswith("rag")


def test_several_without_a_default_are_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    entries = [{"name": word, "template": template(word)} for word in ("short", "long")]
    change_json(folder / "tokenizer_config.json", chat_template=entries)
    assert Tokenizer.load(folder).template.render(QUESTION).startswith("short")
    assert "has several chat templates (short, long) and no default; using 'short'" in capsys.readouterr().err


@pytest.mark.parametrize("entry", [7, [], [1], [{"name": "default"}], {"default": 3}])
def test_an_entry_that_holds_no_template_is_named(folder: Path, entry: object) -> None:
    change_json(folder / "tokenizer_config.json", chat_template=entry)
    with pytest.raises(InputError, match=r"tokenizer_config\.json: chat_template: expected text or a list"):
        Tokenizer.load(folder)


ODD = {
    "a loop that skips and stops": (
        "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}{{ m.content }}<|im_end|>"
        "{% if loop.index > 5 %}{% break %}{% endif %}{% endfor %}"
    ),
    "a namespace set in a loop": (
        "{% set ns = namespace(first=true, n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
        "{{ ns.n ~ ':' ~ (m.content | trim) }}<|im_end|>{% set ns.first = false %}{% endfor %}"
    ),
    "a macro, a filter and a date": (
        "{% macro turn(m) %}[{{ m.role | upper }}] {{ m.content.strip() | replace('x', 'y') }}<|im_end|>{% endmacro %}"
        "{{ strftime_now('%Y')[:2] }}{% for m in messages %}{{ turn(m) }}{% endfor %}"
    ),
    "JSON with its own characters": (
        "{% for m in messages %}{{ dict(role=m.role, text=m.content) | tojson(indent=2) }}<|im_end|>{% endfor %}"
    ),
    "generation tags": (
        "{% for m in messages %}{{ m.role }}{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    ),
}


@pytest.mark.parametrize("text", ODD.values(), ids=ODD.keys())
def test_what_real_templates_use_renders_as_in_transformers(folder: Path, text: str) -> None:
    (folder / "chat_template.jinja").write_text(text)
    chat: list[Any] = [
        {"role": "user", "content": "  is 'x' < \"é\" & ü?  "},
        {"role": "assistant", "content": "yes"},
    ]
    theirs = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    assert Tokenizer.load(folder).template.render(chat) == theirs.apply_chat_template(chat, tokenize=False)


@pytest.mark.parametrize(
    "text",
    [
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ ''|attr('__class__') }}{{ (''|attr('__class__')).x }}",
        "{{ raise_exception.__globals__ }}{{ raise_exception.__globals__['json'] }}",
        "{{ dict.__base__.__subclasses__() }}",
        "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
        "{{ namespace(__init__=1) }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{% include 'chat_template.jinja' %}",
    ],
)
def test_a_template_cannot_leave_its_sandbox(folder: Path, text: str) -> None:
    (folder / "chat_template.jinja").write_text(text)
    with pytest.raises(InputError, match="the chat template rejects this conversation"):
        Tokenizer.load(folder).template.render(QUESTION)
