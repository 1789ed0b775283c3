"""Options and arguments that several commands share, so that each reads the same in all of them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = [
    "Adapter",
    "BadRows",
    "Base",
    "Columns",
    "Config",
    "Data",
    "Deduplicate",
    "Device",
    "DropLayers",
    "Dtype",
    "Format",
    "Learn",
    "Limit",
    "MaxNewTokens",
    "MaxSeqLength",
    "MinP",
    "Model",
    "Overrides",
    "Quantize",
    "RepetitionPenalty",
    "RowSystem",
    "SystemRole",
    "Seed",
    "Stop",
    "System",
    "Temperature",
    "Template",
    "TooLong",
    "TopK",
    "TopP",
    "Values",
    "Validation",
]

# A run.
Config = Annotated[str, typer.Option("--config", "-c", help="YAML file, or name of a shipped config.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Changes to the config, such as peft.rank=16."),
]

# Rows.
Data = Annotated[str, typer.Argument(metavar="DATA", help="File, folder, hub:OWNER/NAME, alpaca or dolly.")]
Format = Annotated[
    str | None, typer.Option("--format", metavar="NAME", help="Dataset format; detected from the columns if omitted.")
]
Columns = Annotated[
    list[str] | None,
    typer.Option(metavar="A=B", help="Read the format's column A from your column B; may be repeated."),
]
Values = Annotated[
    list[str] | None,
    typer.Option(metavar="C=V:W,…", help="Words for values of your column, label=0:no,1:yes; may be repeated."),
]
BadRows = Annotated[
    str | None,
    typer.Option(metavar="WHAT", help="What to do with rows that cannot be read: error (if omitted) or skip."),
]
RowSystem = Annotated[str | None, typer.Option(metavar="TEXT", help="System message for rows without one.")]
SystemRole = Annotated[
    str | None,
    typer.Option(
        metavar="WHAT", help="What to do with system messages: keep (if omitted), or fold into the first user message."
    ),
]
MaxSeqLength = Annotated[int | None, typer.Option(metavar="N", help="Maximum row length in tokens.")]
TooLong = Annotated[
    str | None,
    typer.Option(metavar="WHAT", help="What to do with longer rows: drop (if omitted), truncate_prompt or error."),
]
Learn = Annotated[
    str | None, typer.Option(metavar="WHAT", help="Tokens to train on: answers (if omitted), last or all.")
]
Validation = Annotated[
    str | None,
    typer.Option(metavar="X", help="Held-out rows: a fraction (0.1), a number of rows (200) or a file."),
]
Deduplicate = Annotated[bool, typer.Option("--deduplicate", help="Keep only the first of identical rows.")]
Limit = Annotated[int | None, typer.Option(metavar="N", min=1, help="Read only the first N rows.")]

# Models.
Model = Annotated[Path, typer.Argument(metavar="MODEL", help="Model, run or adapter folder.")]
Adapter = Annotated[Path | None, typer.Option(metavar="DIR", help="Adapter to apply: an adapter or run folder.")]
Base = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Base model; the one that the adapter names if omitted.")
]
Dtype = Annotated[
    str | None,
    typer.Option(
        metavar="fp32|bf16|fp16",
        help="Dtype of the model; if omitted, the fastest on the device, or the one that keeps a merged update.",
    ),
]
Device = Annotated[str, typer.Option(metavar="NAME", help="Device: auto, cpu, cuda, cuda:1 or mps.")]
Quantize = Annotated[
    str | None,
    typer.Option(
        metavar="TYPE",
        help="Quantize the base to nf4-dq, nf4, fp4-dq, fp4 or int8, or none; as in training if omitted.",
    ),
]
DropLayers = Annotated[
    int, typer.Option(metavar="N", min=0, help="Skip the adapters of the first N layers (AdapterDrop).")
]

# Answers.
System = Annotated[
    str | None, typer.Option(metavar="TEXT", help="System message; as in training if omitted, none if empty.")
]
MaxNewTokens = Annotated[int, typer.Option(metavar="N", help="Maximum length of an answer, in tokens.")]
Temperature = Annotated[
    float, typer.Option(metavar="T", help="Sampling temperature; 0 takes the most likely token each time.")
]
TopK = Annotated[int | None, typer.Option(metavar="K", help="Sample from the K most likely tokens.")]
TopP = Annotated[
    float | None, typer.Option(metavar="P", help="Sample from the most likely tokens whose probabilities sum to P.")
]
MinP = Annotated[
    float | None,
    typer.Option(metavar="P", help="Sample from tokens at least P times as likely as the most likely one."),
]
RepetitionPenalty = Annotated[
    float, typer.Option(metavar="X", help="Penalty on tokens that occurred before; 1 is none.")
]
Seed = Annotated[int | None, typer.Option(metavar="N", help="Seed of the sampling; random if omitted.")]
Stop = Annotated[list[str] | None, typer.Option(metavar="TEXT", help="End an answer at this text; may be repeated.")]
Template = Annotated[
    str | None,
    typer.Option(
        metavar="NAME", help="Chat template to use instead of the model's own: a name such as chatml, or a Jinja file."
    ),
]
