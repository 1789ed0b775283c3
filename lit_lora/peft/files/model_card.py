"""The short model card that every saved model and adapter gets."""

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
        title: The heading.
        base: Folder or Hub id of the base model; only the last part of a folder is shown.
        method: How it was made.
        data: What it was trained on.
        metrics: Further rows of the table, such as the loss before and after.
        adapter: Whether it is an adapter; else a whole model.
    """
    is_local = Path(base).is_absolute() or Path(base).exists() or base.startswith(".")
    front_matter = [f"library_name: {'peft' if adapter else 'transformers'}", "tags: [lit-lora]"]
    if not is_local and base.count("/") == 1:
        front_matter.append(f"base_model: {base}")

    rows: dict[str, object] = {
        "Base model": Path(base).name if is_local else base,  # a path would tell about the machine
        "Method": method,
        "Data": data,
        **(metrics or {}),
    }
    table = [f"| {key} | {_cell(value)} |" for key, value in rows.items() if value not in ("", None)]

    lines = ["---", *front_matter, "---", "", f"# {title}", "", "| | |", "|---|---|", *table, ""]
    lines += [f"Written by lit-lora {__version__}.", ""]
    return "\n".join(lines)


def card_row(folder: Path, key: str) -> str:
    """The value of one row in the table of the card in ``folder``; empty without such a row or a card of ours."""
    path = folder / "README.md"
    if not path.is_file():
        return ""
    start = f"| {key} | "
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        if line.startswith(start):
            return line.removeprefix(start).removesuffix(" |").replace("\\|", "|")
    return ""


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text.replace("|", "\\|").replace("\n", " ")
