"""``lit-lora convert``: any supported checkpoint to a Hugging Face folder, or to another dtype."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["command"]


def command(
    source: Annotated[
        Path, typer.Argument(help="A .gguf, .bin or .pth file, or a folder of such, safetensors or LitGPT.")
    ],
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The folder to write. Default: checkpoints/NAME.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(metavar="bf16|fp16|fp32", help="Of the weights. Default: as stored; GGUF: bf16.")
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Take the tokenizer from this folder instead of the source.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Take this config.json instead of the source's.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and report, write nothing.")] = False,
) -> None:
    """Turn GGUF, .bin/.pth or LitGPT files into a checkpoint, or change the dtype of one.

    The result is a Hugging Face folder: safetensors, config.json and the tokenizer. It is written tensor by tensor,
    so a model larger than the memory converts too, and appears under its name only when it is complete.

    Examples:
        lit-lora convert SmolLM2-135M-Instruct.Q4_1.gguf

        lit-lora convert pytorch_model.bin --out checkpoints/mine --dtype bf16

        lit-lora convert checkpoints/mine --out checkpoints/mine-fp32 --dtype fp32 --dry-run
    """
    from lit_lora.scripts.convert import main

    main(source, out=out, dtype=dtype, tokenizer=tokenizer, config=config, dry_run=dry_run)
