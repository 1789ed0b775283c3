"""The machine's own limit: the matrix products that LoRA training cannot do without, at the rate measured here.

For each step: every linear layer forward and the gradient of its input (not below the first layer, where nothing
trains), the six products of each LoRA pair, attention's two products forward and four backward over half of the
score matrix (the causal half), and the head with the gradient of its input on the target tokens alone. All in
bfloat16, on the shapes of the model and of the step's packed tokens. Nothing else is counted: no norm, no softmax, no
optimizer, no copy.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from typing import Any

import torch
from harness import Clock, Orders, Recorder, Row, read_orders

MEASURE_SECONDS = {"cpu": 0.25, "cuda": 0.02}
CALLS = {"cpu": 1, "cuda": 20}
"""Calls that are timed together: launching a short product on a GPU takes longer than computing it."""


def main() -> None:
    """Measure the products of each step's shapes and write the record."""
    orders = read_orders()
    config = json.loads((orders.model / "config.json").read_text(encoding="utf-8"))
    recorder = Recorder(orders, packages=())
    rates: dict[str, list[float]] = {}
    with torch.inference_mode():
        for number, rows in enumerate(orders.steps):
            seconds = cpu_seconds = 0.0
            timed = products(rows, config, orders) if number >= orders.warmup else {}
            for part, (flops, spent, cpu_spent) in timed.items():
                seconds += spent
                cpu_seconds += cpu_spent
                rates.setdefault(part, []).append(flops / spent / 1e9)
            recorder.add(
                seconds=seconds,
                cpu_seconds=cpu_seconds,
                tokens=sum(len(row.ids) for row in rows),
                targets=sum(row.targets for row in rows),
                loss=float("nan"),
            )
    recorder.extra["gflops"] = {part: statistics.median(values) for part, values in rates.items()}
    recorder.finish()


def products(rows: list[Row], config: dict[str, Any], orders: Orders) -> dict[str, tuple[float, float, float]]:
    """Floating point operations, seconds and processor seconds of each part of one step."""
    tokens = sum(len(row.ids) for row in rows)
    width, inner, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    heads, rank = config["num_attention_heads"], orders.rank
    head_dim = config.get("head_dim") or width // heads
    key_width = config["num_key_value_heads"] * head_dim
    # (inputs, outputs, how many in the model, how many of them stand above something that trains)
    linears = [
        (width, heads * head_dim, layers, layers - 1),
        (width, key_width, 2 * layers, 2 * (layers - 1)),
        (heads * head_dim, width, layers, layers),
        (width, inner, 2 * layers, 2 * layers),
        (inner, width, layers, layers),
    ]
    parts = {part: (0.0, 0.0, 0.0) for part in ("linear layers", "LoRA", "attention", "head")}

    def add(part: str, m: int, k: int, n: int, times: float, *, batch: int = 1, transposed: bool = False) -> None:
        flops, spent, cpu_spent = parts[part]
        seconds, cpu_seconds = product_seconds(m, k, n, batch, transposed, orders.device)
        parts[part] = (
            flops + 2.0 * batch * m * k * n * times,
            spent + seconds * times,
            cpu_spent + cpu_seconds * times,
        )

    for inputs, outputs, count, above in linears:
        add("linear layers", tokens, inputs, outputs, count, transposed=True)
        add("linear layers", tokens, outputs, inputs, above)
        add("LoRA", tokens, inputs, rank, count, transposed=True)
        add("LoRA", tokens, rank, outputs, count, transposed=True)
        add("LoRA", outputs, tokens, rank, count)
        add("LoRA", tokens, outputs, rank, count)
        add("LoRA", rank, tokens, inputs, count)
        add("LoRA", tokens, rank, inputs, above)
    length = round((sum(len(row.ids) ** 2 for row in rows) / len(rows)) ** 0.5)
    times = len(rows) * layers * 0.5
    for _ in range(3):  # scores, and the gradients of probabilities and values are of these two kinds
        add("attention", length, head_dim, length, times, batch=heads, transposed=True)
        add("attention", length, length, head_dim, times, batch=heads)
    targets = sum(row.targets for row in rows)
    add("head", targets, width, config["vocab_size"], 1, transposed=True)
    add("head", targets, config["vocab_size"], width, 1)
    return parts


def product_seconds(m: int, k: int, n: int, batch: int, transposed: bool, device: str) -> tuple[float, float]:
    """Median time of an (m, k) by (k, n) product; ``transposed``: the second factor is stored as (n, k)."""
    first = torch.randn(batch, m, k, dtype=torch.bfloat16, device=device).squeeze(0)
    second = torch.randn(batch, *((n, k) if transposed else (k, n)), dtype=torch.bfloat16, device=device).squeeze(0)
    if transposed:
        second = second.transpose(-1, -2)
    return median_seconds(lambda: torch.matmul(first, second), device)


def median_seconds(work: Callable[[], object], device: str) -> tuple[float, float]:
    """Median wall and processor time of a call, over those that fit in ``MEASURE_SECONDS``, after a warm-up."""
    for _ in range(3):
        work()
    calls = repeated(work, CALLS[device])
    times: list[dict[str, float]] = []
    begin = Clock()
    while len(times) < 5 or begin.read()["seconds"] < MEASURE_SECONDS[device]:
        clock = Clock()
        calls()
        times.append(clock.read())
    return (
        statistics.median(time["seconds"] for time in times) / CALLS[device],
        statistics.median(time["cpu_seconds"] for time in times) / CALLS[device],
    )


def repeated(work: Callable[[], object], count: int) -> Callable[[], object]:
    """So many calls as one; on a GPU recorded, so that they do not wait for being launched."""
    if count == 1:
        return work
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(count):
            work()
    return graph.replay


if __name__ == "__main__":
    main()
