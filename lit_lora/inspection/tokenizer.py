"""The tokenizer and chat template of a checkpoint."""

from __future__ import annotations

from pathlib import Path

from lit_lora.errors import InputError
from lit_lora.inspection.report import Inspection, TokenizerFacts
from lit_lora.tokenizer import ChatTemplate, Message, Tokenizer
from lit_lora.tokenizer.templates import NAMED, named_template

__all__ = ["inspect_tokenizer"]


def inspect_tokenizer(report: Inspection, folder: Path, rows: int | None) -> None:
    """Describe the tokenizer in ``folder``, and what is wrong with it.

    Args:
        report: Where to put it.
        folder: With ``tokenizer.json``.
        rows: Rows of the model's embedding, if known.
    """
    with report.noting_errors():
        tokenizer = Tokenizer.load(folder)
        report.tokenizer = _facts(tokenizer, folder)
        if not tokenizer.has_own_template:
            report.warn(
                "no chat template: a plain one with headings is used",
                hint="usual for a base model; train on any format",
            )
        if rows is not None:
            tokenizer.require_fit(rows)
            if tokenizer.vocab_size < rows // 2:
                report.warn(
                    f"the embedding has {rows:,} rows, more than twice the tokenizer's {tokenizer.vocab_size:,} tokens",
                    hint="check that tokenizer.json is this model's",
                )


def _facts(tokenizer: Tokenizer, folder: Path) -> TokenizerFacts:
    ids = {
        "bos": tokenizer.bos_id,
        "eos": tokenizer.eos_id,
        "pad": tokenizer.pad_id,
        "end of turn": tokenizer.end_of_turn_id,
    }
    return TokenizerFacts(
        vocabulary=tokenizer.vocab_size,
        special_tokens={
            purpose: (tokenizer.token(token_id) or "", token_id)
            for purpose, token_id in ids.items()
            if token_id is not None
        },
        starts_with_bos=tokenizer.starts_with_bos,
        template=_template(tokenizer, folder) if tokenizer.has_own_template else None,
    )


def _template(tokenizer: Tokenizer, folder: Path) -> str:
    """Where the chat template comes from, and which of those with a name it is."""
    files = [name for name in ("chat_template.jinja", "chat_template.json") if (folder / name).is_file()]
    source = files[0] if files else "tokenizer_config.json"
    return f"{source} ({name})" if (name := _known_name(tokenizer)) else source


def _known_name(tokenizer: Tokenizer) -> str | None:
    """The name of the template that writes the same text for the same conversation, if there is one."""
    written = _written(tokenizer.template)
    for name in NAMED:
        text = named_template(name, starts_with_bos=tokenizer.starts_with_bos)
        if written and _written(ChatTemplate(text, tokenizer.template.special_tokens, name)) == written:
            return name
    return None


def _written(template: ChatTemplate) -> str:
    """A conversation with every role; nothing if the template rejects it."""
    chat: list[Message] = [
        {"role": "system", "content": "one"},
        {"role": "user", "content": "two"},
        {"role": "assistant", "content": "three"},
        {"role": "user", "content": "four"},
    ]
    try:
        return template.render(chat, generation_prompt=True)
    except InputError:
        return ""
