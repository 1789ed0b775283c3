"""``lit-lora convert``: any supported checkpoint to a Hugging Face folder, or to another dtype."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lit_lora import log
from lit_lora.errors import UsageError
from lit_lora.files import free_bytes, human_bytes, require_new

if TYPE_CHECKING:
    from lit_lora.checkpoint.convert import Plan

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
    quantize: Annotated[
        str | None,
        typer.Option(
            metavar="TYPE", help="Linear layers of the decoder in nf4-dq, nf4, fp4, nf3, nf2, int4, int2 or int8."
        ),
    ] = None,
    block_size: Annotated[
        int | None, typer.Option(metavar="N", help="Weights that share a scale when quantising. Default: 64.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and report, write nothing.")] = False,
) -> None:
    """Turn GGUF, .bin/.pth or LitGPT files into a checkpoint, change the dtype of one, or quantise it.

    The result is a Hugging Face folder: safetensors, config.json and the tokenizer. It is written tensor by tensor,
    so a model larger than the memory converts too, and appears under its name only when it is complete.

    Examples:
        lit-lora convert SmolLM2-135M-Instruct.Q4_1.gguf

        lit-lora convert pytorch_model.bin --out checkpoints/mine --dtype bf16

        lit-lora convert checkpoints/mine --out checkpoints/mine-fp32 --dtype fp32 --dry-run

        lit-lora convert checkpoints/mine --quantize nf4-dq
    """
    from lit_lora.checkpoint.convert import convert, open_source, plan_conversion, write_side_files
    from lit_lora.model import DTYPES
    from lit_lora.quantize.config import parse

    if dtype is not None and dtype not in DTYPES:
        raise UsageError(f"--dtype {dtype}: expected one of {', '.join(DTYPES)}")
    if quantize is None and block_size is not None:
        raise UsageError("--block-size: has no effect without --quantize")
    chosen = None if quantize is None else parse(quantize, option="--quantize", block_size=block_size)
    started = time.perf_counter()
    opened = open_source(source)
    out = out or Path("checkpoints") / (opened.name + (f"-{quantize}" if quantize else ""))
    plan = plan_conversion(
        opened, dtype=DTYPES[dtype] if dtype else None, config=config, tokenizer=tokenizer, quantize=chosen
    )
    if dry_run:
        with tempfile.TemporaryDirectory() as folder:
            write_side_files(plan, Path(folder))
        _report(plan, out)
        return
    require_new(out)
    convert(plan, out)
    log.say(f"wrote {out}: {plan.weights()}, {time.perf_counter() - started:.1f} s")
    log.say(f'next: lit-lora generate {out} "What is the capital of France?"')


def _report(plan: Plan, out: Path) -> None:
    stored = sum(file.stat().st_size for file in plan.source.files)
    rows = [
        ("source", f"{plan.source.format}, {human_bytes(stored)}"),
        ("architecture", plan.config["model_type"]),
        ("tensors", len(plan.dtypes)),
        ("result", plan.weights()),
        ("out", f"{out}{' (exists already)' if out.exists() else ''}, {human_bytes(free_bytes(out))} free"),
    ]
    log.table("Nothing written: dry run", ["what", "value"], rows)
