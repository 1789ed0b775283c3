"""The tokenizer and chat template of a checkpoint."""

from __future__ import annotations

from pathlib import Path

from lit_lora.inspection.report import Inspection, TokenizerFacts
from lit_lora.tokenizer import Tokenizer

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
    template = None
    if tokenizer.has_own_template:
        own_file = (folder / "chat_template.jinja").is_file()
        template = "chat_template.jinja" if own_file else "tokenizer_config.json"
    return TokenizerFacts(
        vocabulary=tokenizer.vocab_size,
        special_tokens={
            purpose: (tokenizer.token(token_id) or "", token_id)
            for purpose, token_id in ids.items()
            if token_id is not None
        },
        starts_with_bos=tokenizer.starts_with_bos,
        template=template,
    )
