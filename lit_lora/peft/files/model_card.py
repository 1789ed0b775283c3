"""The short model card that every written model and adapter carries."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from lit_lora import __version__

__all__ = ["card_row", "model_card"]


def model_card(
    title: str, *, base: str, method: str, data: str = "", metrics: Mapping[str, object] | None = None, adapter: bool
) -> str:
    """A README.md with the front matter that the Hub reads.

    Args:
        title: What this is.
        base: Folder or Hub id of the base model; of a folder only the name is shown.
        method: How it was made.
        data: What it was trained on.
        metrics: Numbers worth knowing, such as the loss before and after.
        adapter: An adapter, or else a whole model.
    """
    local = Path(base).is_absolute() or Path(base).exists() or base.startswith(".")
    shown = Path(base).name if local else base
    front = ["library_name: peft" if adapter else "library_name: transformers", "tags: [lit-lora]"]
    if not local and base.count("/") == 1:
        front.append(f"base_model: {base}")
    rows = {"Base model": shown, "Method": method, "Data": data, **(metrics or {})}
    table = [f"| {key} | {_cell(value)} |" for key, value in rows.items() if value not in ("", None)]
    lines = ["---", *front, "---", "", f"# {title}", "", "| | |", "|---|---|", *table, ""]
    return "\n".join([*lines, f"Written by lit-lora {__version__}.", ""])


def card_row(folder: Path, key: str) -> str:
    """What the card in ``folder`` says in one row of its table; empty where there is none, or no card of ours."""
    path = folder / "README.md"
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    start = f"| {key} | "
    rows = [line.removeprefix(start).removesuffix(" |") for line in text.splitlines() if line.startswith(start)]
    return rows[0].replace("\\|", "|") if rows else ""


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text.replace("|", "\\|").replace("\n", " ")
