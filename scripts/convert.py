"""Convert a checkpoint and say what was done: the work of ``lit-lora convert``."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from lit_lora import log
from lit_lora.checkpoint.convert import DTYPES, Plan, convert, open_source, plan_conversion, write_side_files
from lit_lora.errors import DiskError, UsageError
from lit_lora.files import free_bytes, human_bytes

__all__ = ["main"]


def main(
    source: Path,
    *,
    out: Path | None = None,
    dtype: str | None = None,
    tokenizer: Path | None = None,
    config: Path | None = None,
    dry_run: bool = False,
) -> Path:
    """Convert ``source`` to a Hugging Face folder and report.

    Args:
        source: File or folder, see :func:`lit_lora.checkpoint.convert.open_source`.
        out: The folder to write; ``checkpoints/NAME`` when omitted.
        dtype: bf16, fp16 or fp32.
        tokenizer: A folder whose tokenizer to take.
        config: A config.json to take.
        dry_run: Check and report only.

    Returns:
        The folder.

    Raises:
        UsageError: Unknown dtype.
        InputError: The source is not supported, damaged or incomplete.
        DiskError: ``out`` exists, or there is not enough space.
    """
    if dtype is not None and dtype not in DTYPES:
        raise UsageError(f"--dtype {dtype}: expected one of {', '.join(DTYPES)}")
    started = time.perf_counter()
    opened = open_source(source)
    out = out or Path("checkpoints") / opened.name
    plan = plan_conversion(opened, dtype=DTYPES[dtype] if dtype else None, config=config, tokenizer=tokenizer)
    if dry_run:
        with tempfile.TemporaryDirectory() as folder:
            write_side_files(plan, Path(folder))
        _report(plan, out)
        return out
    if out.exists():
        raise DiskError(f"{out}: already exists", hint="choose another --out, or remove it first")
    convert(plan, out)
    log.say(f"wrote {out}: {_weights(plan)}, {time.perf_counter() - started:.1f} s")
    log.say(f'next: lit-lora generate {out} "What is the capital of France?"')
    return out


def _weights(plan: Plan) -> str:
    return f"{plan.parameters:,} weights in {plan.config['torch_dtype']}, {human_bytes(plan.bytes)}"


def _report(plan: Plan, out: Path) -> None:
    stored = sum(file.stat().st_size for file in plan.source.files)
    rows = [
        ("source", f"{plan.source.format}, {human_bytes(stored)}"),
        ("architecture", plan.config["model_type"]),
        ("tensors", len(plan.dtypes)),
        ("result", _weights(plan)),
        ("out", f"{out}{' (exists already)' if out.exists() else ''}, {human_bytes(free_bytes(out))} free"),
    ]
    log.table("Nothing written: dry run", ["what", "value"], rows)
