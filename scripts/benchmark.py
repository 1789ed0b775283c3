"""Speed and memory of LoRA and QLoRA finetuning against PEFT (+ bitsandbytes), TRL and LitGPT, on the same rows.

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
    """The measurements of one process."""

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
        """Peak memory in bytes: on a GPU reserved and allocated, else resident and its anonymous part."""
        if "gpu_reserved_bytes" in self.extra:
            return self.extra["gpu_reserved_bytes"], self.extra["gpu_allocated_bytes"]
        return self.peak_rss_bytes, self.peak_anonymous_bytes

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second, over the timed steps."""
        return sum(self.tokens[self.warmup :]) / sum(self.seconds[self.warmup :])

    @property
    def tokens_per_cpu_second(self) -> float:
        """Tokens per second of processor time, which other programs on the machine affect less."""
        return sum(self.tokens[self.warmup :]) / sum(self.cpu_seconds[self.warmup :])


@dataclass(frozen=True)
class Job:
    """What all processes have in common."""

    folder: Path
    models: dict[str, Path]
    pythons: dict[str, Path]
    threads: int
    device: str = "cpu"
    rank: int = 8
    alpha: int = 16
    learning_rate: float = 2e-4


def run_once(job: Job, name: str, variant: str, *, rows: Path, warmup: int) -> Result:
    """Run one contender in a process of its own, and read its record.

    Raises:
        LitLoraError: The process failed; the message contains its last lines.
    """
    contender = CONTENDERS[name]
    orders = job.folder / f"{name}.orders.json"
    out = job.folder / f"{name}.record.json"
    log = job.folder / f"{name}.log"
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
        raise LitLoraError(f"{name} ({variant}): no step is left to time after {warmup} warm-up steps; raise --steps")
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
    """Wait for a process; return its exit status and its peak of resident and of anonymous bytes (sampled)."""
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
    """Run these variants of the contenders once; one that fails is reported and skipped."""
    results = []
    for name, chosen in variants.items():
        for variant in chosen:
            try:
                results.append(run_once(job, name, variant, rows=rows, warmup=warmup))
            except LitLoraError as error:
                note(f"skipped: {error}")
                continue
            note(describe(results[-1]))
    return results


def alternate(job: Job, chosen: dict[str, str], rows: Path, *, warmup: int, rounds: int) -> list[Result]:
    """Run the chosen variant of each contender ``rounds`` times: A B C A B C …, each in a new process."""
    results = []
    for _ in range(rounds):
        for name, variant in chosen.items():
            results.append(run_once(job, name, variant, rows=rows, warmup=warmup))
            note(describe(results[-1]))
    return results


def describe(result: Result) -> str:
    """One line about one process."""
    return (
        f"{result.contender} {result.variant}: {result.tokens_per_second:.0f} tokens/s "
        f"({result.tokens_per_cpu_second:.0f} per processor second), peak {human_bytes(result.peaks[0])}, "
        f"load before {result.load_before:.1f}"
    )


def summarize(results: Sequence[Result]) -> list[list[str]]:
    """The final table: one row per contender, the fastest peer first, then ours, then the limit."""
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(result.contender, []).append(result)
    median = {name: statistics.median(run.tokens_per_second for run in runs) for name, runs in groups.items()}
    fastest_peer = max((speed for name, speed in median.items() if name in PEERS), default=0.0)

    rows = []
    for name in sorted(groups, key=lambda name: (name not in PEERS, median[name])):
        runs = groups[name]
        speeds = [run.tokens_per_second for run in runs]
        versus_peer = f"{median[name] / fastest_peer:.2f}" if fastest_peer else ""
        versus_limit = f"{median[name] / median['limit']:.0%}" if "limit" in median else ""
        peaks = [human_bytes(statistics.median(run.peaks[kind] for run in runs)) for kind in (0, 1)]
        if name == "limit":  # products alone: nothing to compare but their speed
            versus_peer = ""
            peaks = ["", ""]
        speed_range = f"{min(speeds):.0f}–{max(speeds):.0f}"
        title = CONTENDERS[name].title
        rows.append([title, runs[0].variant, f"{median[name]:.0f}", speed_range, versus_peer, versus_limit, *peaks])
    return rows


_PEAKS = {"cpu": ("peak RSS", "peak RssAnon"), "cuda": ("peak reserved", "peak allocated")}


def columns(device: str) -> tuple[str, ...]:
    """The header of the final table."""
    return ("contender", "variant", "tokens/s", "range", "× fastest peer", "of the limit", *_PEAKS[device])


def loss_rows(results: Sequence[Result], warmup: int) -> tuple[list[str], list[list[str]]]:
    """A table of the loss per target token at each step.

    It has a column for the first run of each contender and variant, if that trained on exactly the same steps.
    """
    runs: dict[tuple[str, str], Result] = {}
    for run in results:
        is_comparable = run.tokens == _ordered_tokens(results) and not math.isnan(run.losses[0])
        if is_comparable:
            runs.setdefault((run.contender, run.variant), run)

    columns = list(runs.values())
    header = ["step", *(f"{CONTENDERS[run.contender].title} {run.variant}" for run in columns)]
    rows = []
    step_count = len(columns[0].losses) if columns else 0
    for step in range(step_count):
        name = f"{step + 1} (warm-up)" if step < warmup else f"{step + 1}"
        rows.append([name, *(f"{run.losses[step]:.4f}" for run in columns)])
    rows.append(["mean", *(f"{statistics.mean(run.losses):.4f}" for run in columns)])
    if any("validation_loss" in run.extra for run in columns):
        rows.append(["validation", *(f"{run.extra.get('validation_loss', math.nan):.4f}" for run in columns)])
    return header, rows


def _ordered_tokens(results: Sequence[Result]) -> list[int]:
    """Tokens of each step as written for the contenders; TRL packs rows and ``/length`` regroups them."""
    for run in results:
        if run.contender != "trl" and not run.variant.endswith("/length"):
            return run.tokens
    return []


def report(
    args: argparse.Namespace,
    surveyed: list[Result],
    final: list[Result],
    reference: list[Result],
    about: dict[str, Any],
) -> str:
    """The record as Markdown; only the losses of ``reference`` are shown."""
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
        "Tokens per second count prompt and answer tokens, without padding, over the timed steps of one process; the",
        f"table shows the median of {args.rounds} alternating processes of each. Peak memory is that of the process.",
        "The limit is the time of the unavoidable matrix products alone (see `scripts/benchmark_peers/gemm_limit.py`).",
        "",
        *markdown_table(columns(args.device), summarize(final)),
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
    """The processor, its cores and the operating system, for the record."""
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
    """Create a virtual environment with PyTorch first, then the contender; return its Python.

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
        UsageError: A contender has none.
    """
    own_pythons = {}
    for text in args.venv:
        name, _, path = text.partition("=")
        own_pythons[name] = Path(path)
    pythons = {}
    for name in names:
        contender = CONTENDERS[name]
        if name in own_pythons:
            pythons[name] = own_pythons[name]
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
    """The model folder of each contender, converted if it needs a format of its own.

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
        UsageError: Options contradict each other, or there is no such contender or variant.
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, help="Hugging Face folder, weights in bf16")
    parser.add_argument("--data", type=Path, help="gsm8k_train.jsonl.gz: a question and an answer per line")
    about = "random weights of this size, such as llama-3.2-1b, and random rows, or those of --model and --data"
    parser.add_argument("--shape", metavar="NAME", help=about)
    parser.add_argument("--length", type=int, default=512, help="tokens per random row, with --shape alone (512)")
    parser.add_argument("--device", choices=list(PLACES), default="cpu", help="device of all contenders (cpu)")
    parser.add_argument("--python", type=Path, metavar="PATH", help="Python of all contenders without one of their own")
    parser.add_argument("--venv", action="append", default=[], metavar="NAME=PYTHON", help="Python of a contender")
    parser.add_argument(
        "--create-venvs",
        type=Path,
        metavar="FOLDER",
        help="folder in which to create and keep missing virtual environments",
    )
    parser.add_argument(
        "--torch-index", metavar="URL", help="package index for PyTorch, such as that of its CPU builds"
    )
    parser.add_argument("--method", choices=list(METHODS), default="lora", help="method to compare (lora)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help=", ".join(CONTENDERS))
    parser.add_argument(
        "--variant", action="append", default=[], metavar="NAME=VARIANT", help="variant to run; of several, the fastest"
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--batch", type=int, default=8, help="rows per step (8)")
    parser.add_argument("--warmup", type=int, default=2, help="steps before the clock starts (2)")
    parser.add_argument("--steps", type=int, default=8, help="timed steps per process (8)")
    parser.add_argument("--survey-steps", type=int, default=2, help="timed steps per process of the survey (2)")
    parser.add_argument("--validation", type=int, default=0, help="rows for a loss after the last step (0)")
    parser.add_argument("--rounds", type=int, default=3, help="processes per contender in the final rounds (3)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks"), help="folder of the record (benchmarks)")
    parser.add_argument("--no-reference", action="store_true", help="skip the run in float32")
    args = parser.parse_args(arguments)
    if (args.model is None) != (args.data is None) or not (args.shape or args.model):
        raise UsageError("expected --model and --data, or --shape, or all three")
    if args.validation and not args.data:
        raise UsageError("--validation needs --data: random rows have nothing to validate")
    args.only = args.only or list(METHODS[args.method])
    variants_by_name: dict[str, list[str]] = {}
    for text in args.variant:
        name, _, variant = text.partition("=")
        variants_by_name.setdefault(name, []).append(variant)
    args.variant = variants_by_name
    for name in [*args.only, *args.variant]:
        if name not in CONTENDERS:
            raise UsageError(f"{name}: no such contender{did_you_mean(name, CONTENDERS)}")
    for name, variants in args.variant.items():
        for variant in variants:
            if variant not in CONTENDERS[name].variants:
                raise UsageError(f"{name}: no variant {variant!r}, known: {', '.join(CONTENDERS[name].variants)}")
    return args


def measure(args: argparse.Namespace, folder: Path) -> str:
    """Do all runs in ``folder`` and write the record; return its text.

    Raises:
        LitLoraError: A contender failed in the final rounds.
    """
    pythons = choose_pythons(args, args.only)
    rows = folder / "rows.json"
    survey_rows = folder / "survey-rows.json"
    model = folder / Path(args.shape).name if args.shape else args.model.resolve()
    amount: dict[str, Any] = {"batch": args.batch, "steps": args.warmup + args.steps, "target": rows}
    if args.shape:
        write_random_model(args.shape, model, device=args.device, tokenizer=args.model)
    if args.data:
        sizes = write_rows(args.data, args.model, seed=0, validation=args.validation, **amount)
    else:
        sizes = write_random_rows(model, length=args.length, **amount)
    job = Job(folder, choose_models(model, pythons, folder), pythons, args.threads, args.device)
    steps = json.loads(rows.read_text(encoding="utf-8"))["steps"]
    write_text(survey_rows, json.dumps({"steps": steps[: 1 + args.survey_steps], "validation": []}))

    variants = {name: args.variant.get(name) or list(CONTENDERS[name].variants) for name in args.only}
    undecided = {name: choices for name, choices in variants.items() if len(choices) > 1}
    surveyed = survey(job, undecided, survey_rows, warmup=1)
    chosen = {}
    for name, choices in variants.items():
        runs_of_name = [run for run in surveyed if run.contender == name]
        fastest = max(runs_of_name, key=lambda run: run.tokens_per_second, default=None)
        chosen[name] = fastest.variant if fastest else choices[0]
    final = alternate(job, chosen, rows, warmup=args.warmup, rounds=args.rounds)
    reference = []
    if REFERENCES[args.method][0] in args.only and not args.no_reference:
        reference = [run_once(job, *REFERENCES[args.method], rows=rows, warmup=args.warmup)]

    versions: dict[str, str] = {}
    for run in final:
        versions |= run.versions
    about: dict[str, Any] = machine()
    if args.device == "cuda":
        about["GPU"] = torch.cuda.get_device_name()
    about |= {
        "threads": args.threads,
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "commit": commit(),
        "command": f"`{shlex.join(['python', 'scripts/benchmark.py', *sys.argv[1:]])}`",
        "model": model.name,
        "training": f"{TITLES[args.method]} r={job.rank} alpha={job.alpha} on all linear layers, "
        f"AdamW lr {job.learning_rate}, {args.batch} rows per step, {args.warmup} warm-up steps, {args.steps} timed",
        "rows": ", ".join(f"{name} {value:.0f}" for name, value in sizes.items()),
    }
    if args.validation:
        about["validation"] = f"{args.validation} further rows, after the last step"

    size = f"_{model.name}" if args.shape else ""
    place = {"cpu": "cpu", "cuda": "gpu"}[args.device]
    stem = args.out / f"{place}_{args.method}{size}_{date.today():%Y%m}"
    text = report(args, surveyed, final, reference, about)
    write_text(Path(f"{stem}.md"), text)
    record: dict[str, Any] = {"about": about}
    for name, runs in {"survey": surveyed, "final": final, "reference": reference}.items():
        record[name] = [asdict(run) for run in runs]
    write_text(Path(f"{stem}.json"), json.dumps(record, indent=1) + "\n")
    header = columns(args.device)
    table(f"{TITLES[args.method]} on {PLACES[args.device]}", header, summarize(final), right=range(2, len(header)))
    say(f"record: {stem}.md")
    return text


def commit() -> str:
    """The commit of this checkout, marked if files have changed since."""
    command = ["git", "-C", str(RUNNERS), "describe", "--always", "--dirty", "--exclude", "*"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    return done.stdout.strip() or "not a checkout"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table and write the record; return the exit code."""
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
