"""LoRA and QLoRA finetuning, speed and memory against PEFT (+ bitsandbytes), TRL and LitGPT, on the same rows.

Each contender runs in its own virtual environment, one process at a time. A survey runs every variant of a contender
once; then the fastest variant of each runs in several alternating rounds (A B C A B C …), and the medians are
reported beside the machine's own limit. The runners are in ``benchmark_peers/``.

    python scripts/benchmark.py --model SmolLM2-135M-Instruct --data gsm8k_train.jsonl.gz --create-venvs peers
    python scripts/benchmark.py --method qlora --model … --data … --create-venvs peers --validation 64
    python scripts/benchmark.py --method qlora --shape llama-3.2-1b --length 512 --batch 1 --only ours ours-qlora …
    python scripts/benchmark.py --device cuda --shape llama-3.2-1b --model … --data … --batch 32 --python python3 …
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import torch
from lit_lora.scripts.benchmark_contenders import CONTENDERS, METHODS, PEERS, REFERENCES, TITLES, Contender
from lit_lora.scripts.benchmark_rows import write_random_model, write_random_rows, write_rows

from lit_lora.config import did_you_mean
from lit_lora.errors import LitLoraError, UsageError
from lit_lora.files import human_bytes, write_text
from lit_lora.log import note, say, table, warn

__all__ = ["main"]

RUNNERS = Path(__file__).parent / "benchmark_peers"
TORCH = "torch==2.13.0"
SAMPLE_SECONDS = 0.02
PLACES = {"cpu": "the CPU", "cuda": "the GPU"}


@dataclass
class Result:
    """What one process did."""

    contender: str
    variant: str
    peak_rss_bytes: int
    peak_anonymous_bytes: int
    losses: list[float]
    seconds: list[float]
    cpu_seconds: list[float]
    tokens: list[int]
    load_before: float
    versions: dict[str, str] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    warmup: int = 0

    @property
    def peaks(self) -> tuple[int, int]:
        """On a GPU its memory, reserved and allocated; else the process's, resident and the anonymous part of that."""
        if "gpu_reserved_bytes" in self.extra:
            return self.extra["gpu_reserved_bytes"], self.extra["gpu_allocated_bytes"]
        return self.peak_rss_bytes, self.peak_anonymous_bytes

    @property
    def tokens_per_second(self) -> float:
        """Over the timed steps."""
        return sum(self.tokens[self.warmup :]) / sum(self.seconds[self.warmup :])

    @property
    def tokens_per_cpu_second(self) -> float:
        """Per second of processor time: what tells contenders apart while other programs take the processor."""
        return sum(self.tokens[self.warmup :]) / sum(self.cpu_seconds[self.warmup :])


@dataclass(frozen=True)
class Job:
    """What all processes share."""

    folder: Path
    models: dict[str, Path]
    pythons: dict[str, Path]
    threads: int
    device: str = "cpu"
    rank: int = 8
    alpha: int = 16
    learning_rate: float = 2e-4


def run_once(job: Job, name: str, variant: str, *, rows: Path, warmup: int) -> Result:
    """Run one contender in one process of its own and read its record.

    Raises:
        LitLoraError: The process failed; its last lines are in the message.
    """
    contender = CONTENDERS[name]
    orders, out, log = (job.folder / f"{name}.{kind}" for kind in ("orders.json", "record.json", "log"))
    out.unlink(missing_ok=True)
    write_text(
        orders,
        json.dumps(
            {
                "variant": contender.variants[variant],
                "model": str(job.models[name]),
                "rows": str(rows),
                "warmup": warmup,
                "threads": job.threads,
                "rank": job.rank,
                "alpha": job.alpha,
                "learning_rate": job.learning_rate,
                "device": job.device,
                "out": str(out),
            }
        ),
    )
    load = os.getloadavg()[0]
    command = [str(job.pythons[name]), str(RUNNERS / contender.runner), str(orders)]
    with open(log, "wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=_environment(job), cwd=job.folder)
        status, peak_rss, peak_anonymous = watch(process.pid)
    process.returncode = status
    if status != 0 or not out.is_file():
        tail = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-12:]
        raise LitLoraError(f"{name} ({variant}) ended with status {status}:\n" + "\n".join(tail))
    record = json.loads(out.read_text(encoding="utf-8"))
    if len(record["steps"]) <= warmup:
        raise LitLoraError(f"{name} ({variant}): no step is left to time after {warmup} of warm-up: give more --steps")
    return Result(
        contender=name,
        variant=variant,
        peak_rss_bytes=peak_rss,
        peak_anonymous_bytes=peak_anonymous,
        losses=[step["loss"] for step in record["steps"]],
        seconds=[step["seconds"] for step in record["steps"]],
        cpu_seconds=[step["cpu_seconds"] for step in record["steps"]],
        tokens=[step["tokens"] for step in record["steps"]],
        load_before=load,
        versions=record["versions"],
        extra={key: value for key, value in record.items() if key not in ("steps", "versions")},
        warmup=warmup,
    )


def _environment(job: Job) -> dict[str, str]:
    offline = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_TELEMETRY": "1"}
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if job.device == "cpu" else {}
    return {**os.environ, **offline, "OMP_NUM_THREADS": str(job.threads), **hidden}


def watch(pid: int) -> tuple[int, int, int]:
    """Wait for a process: its exit status, its peak resident bytes, and the peak of its anonymous ones (sampled)."""
    peak = 0
    while True:
        done, status, usage = os.wait4(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status), usage.ru_maxrss * 1024, peak
        try:
            lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
        except OSError:
            lines = []
        for line in lines:
            if line.startswith("RssAnon:"):
                peak = max(peak, int(line.split()[1]) * 1024)
        time.sleep(SAMPLE_SECONDS)


def survey(job: Job, variants: Mapping[str, Sequence[str]], rows: Path, warmup: int) -> list[Result]:
    """These variants of the contenders once; one that fails is noted and left out."""
    results = []
    for name, chosen in variants.items():
        for variant in chosen:
            try:
                results.append(run_once(job, name, variant, rows=rows, warmup=warmup))
            except LitLoraError as error:
                note(f"left out: {error}")
                continue
            note(describe(results[-1]))
    return results


def alternate(job: Job, chosen: dict[str, str], rows: Path, *, warmup: int, rounds: int) -> list[Result]:
    """The chosen variant of each contender, ``rounds`` times: A B C A B C …, each in a fresh process."""
    results = []
    for _ in range(rounds):
        for name, variant in chosen.items():
            results.append(run_once(job, name, variant, rows=rows, warmup=warmup))
            note(describe(results[-1]))
    return results


def describe(result: Result) -> str:
    """One line on one process."""
    return (
        f"{result.contender} {result.variant}: {result.tokens_per_second:.0f} tokens/s "
        f"({result.tokens_per_cpu_second:.0f} per processor second), peak {human_bytes(result.peaks[0])}, "
        f"load before {result.load_before:.1f}"
    )


def summarise(results: Sequence[Result]) -> list[list[str]]:
    """The final table: one row per contender, the fastest peer first, then ours, then the limit."""
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(result.contender, []).append(result)
    speed = {name: statistics.median(run.tokens_per_second for run in runs) for name, runs in groups.items()}
    fastest_peer = max((speed[name] for name in groups if name in PEERS), default=0.0)
    rows = []
    for name, runs in sorted(groups.items(), key=lambda item: (item[0] not in PEERS, speed[item[0]])):
        low, high = (pick(run.tokens_per_second for run in runs) for pick in (min, max))
        is_limit = name == "limit"
        rows.append(
            [
                CONTENDERS[name].title,
                runs[0].variant,
                f"{speed[name]:.0f}",
                f"{low:.0f}–{high:.0f}",
                f"{speed[name] / fastest_peer:.2f}" if fastest_peer and not is_limit else "",
                f"{speed[name] / speed['limit']:.0%}" if "limit" in speed else "",
                *("" if is_limit else human_bytes(statistics.median(run.peaks[i] for run in runs)) for i in (0, 1)),
            ]
        )
    return rows


_PEAKS = {"cpu": ("peak RSS", "peak RssAnon"), "cuda": ("peak reserved", "peak allocated")}


def columns(device: str) -> tuple[str, ...]:
    """Of the final table."""
    return ("contender", "variant", "tokens/s", "range", "× fastest peer", "of the limit", *_PEAKS[device])


def loss_rows(results: Sequence[Result], warmup: int) -> tuple[list[str], list[list[str]]]:
    """Loss per target token at each step, of the first run of each contender and variant on the very same steps."""
    firsts = {(run.contender, run.variant): run for run in reversed(results) if not math.isnan(run.losses[0])}
    same = [run for run in firsts.values() if run.tokens == _ordered_tokens(results)]
    header = ["step", *(f"{CONTENDERS[run.contender].title} {run.variant}" for run in same)]
    steps = [f"{step + 1}{' (warm-up)' if step < warmup else ''}" for step in range(len(same[0].losses) if same else 0)]
    rows = [[name, *(f"{run.losses[step]:.4f}" for run in same)] for step, name in enumerate(steps)]
    rows.append(["mean", *(f"{statistics.mean(run.losses):.4f}" for run in same)])
    if any("validation_loss" in run.extra for run in same):
        rows.append(["validation", *(f"{run.extra.get('validation_loss', math.nan):.4f}" for run in same)])
    return header, rows


def _ordered_tokens(results: Sequence[Result]) -> list[int]:
    """Tokens of each step as ordered: the limit's process and the plain loops take the steps as they are."""
    plain = (run for run in results if run.contender != "trl" and not run.variant.endswith("/length"))
    return next((run.tokens for run in plain), [])


def report(
    args: argparse.Namespace,
    surveyed: list[Result],
    final: list[Result],
    reference: list[Result],
    about: dict[str, Any],
) -> str:
    """The record as Markdown; ``reference`` is shown for its losses only."""
    leanest = min(
        (run for run in surveyed + final if run.contender in PEERS), key=lambda run: run.peaks[0], default=None
    )
    lines = [
        f"# {TITLES[args.method]} on {PLACES[args.device]} against peers, {date.today():%Y-%m}",
        "",
        __doc__.strip().splitlines()[0] if __doc__ else "",
        "",
        *(f"- **{key}**: {value}" for key, value in about.items()),
        "",
        "Tokens per second count prompt and answer tokens, no padding, over the timed steps of one process; the table",
        f"holds the median of {args.rounds} alternating processes of each. Peak memory is the whole process's.",
        "The limit is the time of the unavoidable matrix products alone (see `scripts/benchmark_peers/gemm_limit.py`).",
        "",
        *markdown_table(columns(args.device), summarise(final)),
    ]
    if leanest is not None:
        lines += ["", f"Leanest run of any peer: {describe(leanest)}."]
    limits = [run.extra["gflops"] for run in final if run.contender == "limit"]
    if limits:
        rates = ", ".join(f"{part} {rate:.0f}" for part, rate in limits[0].items())
        lines += ["", f"Rates of the limit's products, GFLOP/s: {rates}."]
    lines += ["", "## Loss at each step, same rows", "", *markdown_table(*loss_rows([*final, *reference], args.warmup))]
    if surveyed:
        rows = [
            [
                CONTENDERS[run.contender].title,
                run.variant,
                f"{run.tokens_per_second:.0f}",
                *map(human_bytes, run.peaks),
                f"{run.losses[-1]:.4f}",
            ]
            for run in surveyed
        ]
        header = ("contender", "variant", "tokens/s", *_PEAKS[args.device], "last loss")
        lines += ["", "## Survey: each variant once", "", *markdown_table(header, rows)]
    return "\n".join(lines) + "\n"


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table."""
    return [f"| {' | '.join(line)} |" for line in (header, ["---"] * len(header), *rows)]


def machine() -> dict[str, str]:
    """The processor, its cores and memory, and what runs on it."""
    about = {"machine": f"{platform.machine()}, {os.cpu_count()} cores", "system": platform.platform()}
    info = Path("/proc/cpuinfo")
    if info.is_file():
        fields = dict(line.split(":", 1) for line in info.read_text(encoding="utf-8").splitlines() if ":" in line)
        fields = {key.strip(): value.strip() for key, value in fields.items()}
        wanted = ("avx512_bf16", "amx_bf16")
        features = [flag for flag in wanted if flag in fields.get("flags", "").split()]
        about["machine"] = f"{fields.get('model name', '')}, family {fields.get('cpu family')} model "
        about["machine"] += f"{fields.get('model')}, {os.cpu_count()} cores, {', '.join(features) or 'no bf16 units'}"
    return about


def create_venv(folder: Path, contender: Contender, torch_index: str | None) -> Path:
    """A virtual environment with PyTorch first, then the contender; returns its Python.

    Raises:
        UsageError: pip failed.
    """
    python = folder / "bin" / "python"
    if python.exists():
        return python
    note(f"creating {folder}")
    index = ["--index-url", torch_index] if torch_index else []
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    for command in (
        [sys.executable, "-m", "venv", str(folder)],
        [*pip, *index, TORCH],
        [*pip, *contender.requirements],
    ):
        if subprocess.run(command, check=False).returncode != 0:
            raise UsageError(f"{shlex.join(command)}: failed", hint=f"remove {folder} before trying again")
    return python


def choose_pythons(args: argparse.Namespace, names: Sequence[str]) -> dict[str, Path]:
    """The Python of each contender.

    Raises:
        UsageError: A peer has none.
    """
    given = {name: Path(path) for name, _, path in (text.partition("=") for text in args.venv)}
    pythons = {}
    for name in names:
        contender = CONTENDERS[name]
        if name in given:
            pythons[name] = given[name]
        elif args.python:
            pythons[name] = args.python
        elif not contender.requirements:
            pythons[name] = Path(sys.executable)
        elif args.create_venvs:
            pythons[name] = create_venv(args.create_venvs.resolve() / name, contender, args.torch_index)
        else:
            raise UsageError(
                f"{name}: no Python given", hint=f"--venv {name}=PATH/bin/python, or --create-venvs FOLDER"
            )
        if not pythons[name].exists():
            raise UsageError(f"{pythons[name]}: not found")
    return pythons


def choose_models(model: Path, pythons: dict[str, Path], folder: Path) -> dict[str, Path]:
    """The model folder of each contender, converted where it needs its own format.

    Raises:
        LitLoraError: A conversion failed.
    """
    models = dict.fromkeys(pythons, model)
    for name, python in pythons.items():
        script = CONTENDERS[name].convert
        if script:
            models[name] = folder / f"model-{name}"
            command = [str(python), str(RUNNERS / script), str(model), str(models[name])]
            done = subprocess.run(command, check=False, capture_output=True, text=True)
            if done.returncode != 0:
                raise LitLoraError(f"{shlex.join(command)}: failed\n{done.stderr[-2000:]}")
    return models


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line.

    Raises:
        UsageError: A contender or a variant is not known.
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, help="Hugging Face folder, weights in bf16")
    parser.add_argument("--data", type=Path, help="gsm8k_train.jsonl.gz: question and answer a line")
    about = "random weights of this size, such as llama-3.2-1b, and random rows, or those of --model and --data"
    parser.add_argument("--shape", metavar="NAME", help=about)
    parser.add_argument("--length", type=int, default=512, help="with --shape alone: tokens of a random row (512)")
    parser.add_argument("--device", choices=list(PLACES), default="cpu", help="where everybody trains (cpu)")
    parser.add_argument("--python", type=Path, metavar="PATH", help="the Python of all contenders that have no other")
    parser.add_argument("--venv", action="append", default=[], metavar="NAME=PYTHON", help="a contender's Python")
    parser.add_argument(
        "--create-venvs", type=Path, metavar="FOLDER", help="make the missing ones there, and keep them"
    )
    parser.add_argument("--torch-index", metavar="URL", help="package index for PyTorch, such as its CPU builds'")
    parser.add_argument("--method", choices=list(METHODS), default="lora", help="what is compared (lora)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help=", ".join(CONTENDERS))
    parser.add_argument(
        "--variant", action="append", default=[], metavar="NAME=VARIANT", help="this, or the fastest of several"
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--batch", type=int, default=8, help="rows a step (8)")
    parser.add_argument("--warmup", type=int, default=2, help="steps before the clock starts (2)")
    parser.add_argument("--steps", type=int, default=8, help="timed steps of a process (8)")
    parser.add_argument("--survey-steps", type=int, default=2, help="timed steps of a survey's process (2)")
    parser.add_argument("--validation", type=int, default=0, help="rows for a loss after the last step (0)")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each contender at the end (3)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks"), help="folder of the record (benchmarks)")
    parser.add_argument("--no-reference", action="store_true", help="leave out the run in float32")
    args = parser.parse_args(arguments)
    if (args.model is None) != (args.data is None) or not (args.shape or args.model):
        raise UsageError("expected --model and --data, or --shape, or all three")
    if args.validation and not args.data:
        raise UsageError("--validation: there are no other rows than random ones")
    args.only = args.only or list(METHODS[args.method])
    given: dict[str, list[str]] = {}
    for text in args.variant:
        given.setdefault(text.partition("=")[0], []).append(text.partition("=")[2])
    args.variant = given
    for name in [*args.only, *args.variant]:
        if name not in CONTENDERS:
            raise UsageError(f"{name}: no such contender{did_you_mean(name, CONTENDERS)}")
    for name, variants in args.variant.items():
        known = CONTENDERS[name].variants
        for variant in variants:
            if variant not in known:
                raise UsageError(f"{name}: no variant {variant!r}, known: {', '.join(known)}")
    return args


def measure(args: argparse.Namespace, folder: Path) -> str:
    """Do all runs in ``folder`` and write the record.

    Raises:
        LitLoraError: A contender failed in the final rounds.
    """
    pythons = choose_pythons(args, args.only)
    rows, few = folder / "rows.json", folder / "few-rows.json"
    model = folder / Path(args.shape).name if args.shape else args.model.resolve()
    portions: dict[str, Any] = {"batch": args.batch, "steps": args.warmup + args.steps, "target": rows}
    if args.shape:
        write_random_model(args.shape, model, device=args.device, tokenizer=args.model)
    if args.data:
        sizes = write_rows(args.data, args.model, seed=0, validation=args.validation, **portions)
    else:
        sizes = write_random_rows(model, length=args.length, **portions)
    job = Job(folder, choose_models(model, pythons, folder), pythons, args.threads, args.device)
    steps = json.loads(rows.read_text(encoding="utf-8"))["steps"]
    write_text(few, json.dumps({"steps": steps[: 1 + args.survey_steps], "validation": []}))
    variants = {name: args.variant.get(name) or list(CONTENDERS[name].variants) for name in args.only}
    several = {name: known for name, known in variants.items() if len(known) > 1}
    surveyed = survey(job, several, few, warmup=1)
    chosen = {}
    for name, known in variants.items():
        tried = [run for run in surveyed if run.contender == name]
        best = max(tried, key=lambda run: run.tokens_per_second, default=None)
        chosen[name] = best.variant if best else known[0]
    final = alternate(job, chosen, rows, warmup=args.warmup, rounds=args.rounds)
    reference = []
    if REFERENCES[args.method][0] in args.only and not args.no_reference:
        reference = [run_once(job, *REFERENCES[args.method], rows=rows, warmup=args.warmup)]
    versions = {name: version for run in final for name, version in run.versions.items()}
    about = {
        **machine(),
        **({"GPU": torch.cuda.get_device_name()} if args.device == "cuda" else {}),
        "threads": args.threads,
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "commit": commit(),
        "command": f"`{shlex.join(['python', 'scripts/benchmark.py', *sys.argv[1:]])}`",
        "model": model.name,
        "training": f"{TITLES[args.method]} r={job.rank} alpha={job.alpha} on all linear layers, "
        f"AdamW lr {job.learning_rate}, {args.batch} rows a step, {args.warmup} steps of warm-up, {args.steps} timed",
        "rows": ", ".join(f"{name} {value:.0f}" for name, value in sizes.items()),
    }
    if args.validation:
        about["validation"] = f"{args.validation} further rows, after the last step"
    size = f"_{model.name}" if args.shape else ""
    place = {"cpu": "cpu", "cuda": "gpu"}[args.device]
    stem = args.out / f"{place}_{args.method}{size}_{date.today():%Y%m}"
    text = report(args, surveyed, final, reference, about)
    write_text(Path(f"{stem}.md"), text)
    groups = {"survey": surveyed, "final": final, "reference": reference}
    runs = {"about": about, **{name: [asdict(run) for run in group] for name, group in groups.items()}}
    write_text(Path(f"{stem}.json"), json.dumps(runs, indent=1) + "\n")
    header = columns(args.device)
    table(f"{TITLES[args.method]} on {PLACES[args.device]}", header, summarise(final), right=range(2, len(header)))
    say(f"record: {stem}.md")
    return text


def commit() -> str:
    """The commit of the checkout that this file lies in, and whether it was changed since."""
    command = ["git", "-C", str(RUNNERS), "describe", "--always", "--dirty", "--exclude", "*"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    return done.stdout.strip() or "not a checkout"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table, write the record; returns the exit code."""
    try:
        args = parse(arguments)
        with tempfile.TemporaryDirectory(prefix="lit-lora-benchmark-") as folder:
            measure(args, Path(folder))
    except LitLoraError as error:
        warn(str(error))
        if error.hint:
            note(error.hint)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
