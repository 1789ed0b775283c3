"""``lit-lora convert``: convert a supported checkpoint to a Hugging Face folder, or to another dtype."""

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
        Path, typer.Argument(help="File (.gguf, .bin or .pth), or folder of such files, of safetensors or of LitGPT.")
    ],
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder to write; checkpoints/NAME if omitted.")
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(metavar="fp32|bf16|fp16", help="Dtype of the weights; as stored if omitted, bf16 for GGUF."),
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder to take the tokenizer from, instead of the source.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="config.json to use instead of the source's.")
    ] = None,
    quantize: Annotated[
        str | None,
        typer.Option(
            metavar="TYPE", help="Quantize the linear layers to nf4-dq, nf4, fp4, nf3, nf2, int4, int2 or int8."
        ),
    ] = None,
    block_size: Annotated[
        int | None, typer.Option(metavar="N", help="Number of weights per quantization scale; 64 if omitted.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and report; write nothing.")] = False,
) -> None:
    """Convert GGUF, .bin/.pth or LitGPT files to a checkpoint, change the dtype of a checkpoint, or quantize it.

    The result is a Hugging Face folder: safetensors, config.json and the tokenizer. It is written tensor by tensor, so
    models larger than memory can be converted, and gets its name only once it is complete.

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
        raise UsageError("--block-size needs --quantize")
    chosen = None if quantize is None else parse(quantize, option="--quantize", block_size=block_size)
    started = time.perf_counter()
    opened = open_source(source)
    if out is None:
        out = Path("checkpoints") / (f"{opened.name}-{quantize}" if quantize else opened.name)
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
    source_bytes = sum(file.stat().st_size for file in plan.source.files)
    exists = " (already exists)" if out.exists() else ""
    rows = [
        ("source", f"{plan.source.format}, {human_bytes(source_bytes)}"),
        ("architecture", plan.config["model_type"]),
        ("tensors", len(plan.dtypes)),
        ("result", plan.weights()),
        ("out", f"{out}{exists}, {human_bytes(free_bytes(out))} free"),
    ]
    log.table("Dry run: nothing was written", ["item", "value"], rows)
