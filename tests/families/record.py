"""Write ``benchmarks/models.json``: what works on each causal type of transformers, found by trying it.

python -m tests.families.record [TYPE …]

``scripts/docs.py`` makes ``docs/models.md`` of it.
"""

from __future__ import annotations

import json
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers

from lit_lora import peft
from lit_lora.checkpoint.load import load_model
from lit_lora.errors import InputError, LitLoraError, first_line
from lit_lora.quantize import QuantizeConfig
from lit_lora.train.loss import backward
from tests.families.opened import micro_batch, open_tiny
from tests.families.tiny_configs import KEYS, NOT_BUILT

__all__ = ["METHODS", "RECORD", "record_of"]

RECORD = Path(__file__).parents[2] / "benchmarks" / "models.json"

METHODS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 1},
    "lora q,v": {"rank": 1, "target_modules": "q,v"},
    "dora": {"rank": 1},
    "vera": {"rank": 4},
    "ia3": {},
    "bitfit": {},
    "houlsby": {"bottleneck": 4},
    "parallel": {"bottleneck": 4, "init_zero": False},
    "lin": {"bottleneck": 4, "task_embedding": False},
    "prefix": {"init": "random"},
    "prompt": {"init": "random"},
    "llama-adapter": {},
    "full": {},
}
"""Name of a method, and perhaps a preset -> settings other than its defaults."""


def record_of(key: str, folder: Path) -> dict[str, Any] | str:
    """What works on the model of ``key``; the reason if it is not opened."""
    try:
        opened = open_tiny(key, folder)
    except InputError as error:
        return str(error).replace(f"{folder}/config.json: ", "")
    return {
        "path": opened.path,
        "packing": opened.packing,
        "without": [case for case in METHODS if not _works(partial(_try, folder, case))],
        "qlora": _works(lambda: _train(load_model(folder, quantize=QuantizeConfig(name="int8")), "lora")),
    }


def _works(attempt: Callable[[], bool]) -> bool:
    """Whether an attempt succeeds. It may be refused; any other error is a mistake, which is reported."""
    try:
        return attempt()
    except LitLoraError:
        return False
    except Exception as error:  # of transformers' many models
        print(f"  not refused, but failed: {type(error).__name__}: {first_line(error)[:150]}", file=sys.stderr)
        return False


def _try(folder: Path, case: str) -> bool:
    return _train(load_model(folder), case)


def _train(model: Any, case: str) -> bool:
    """Whether a step of a method has finite gradients, of which some are not 0."""
    name = case.partition(" ")[0]
    peft.freeze(model)
    torch.manual_seed(0)
    method = peft.methods()[name].model_validate({"name": name, **METHODS[case]})
    method.apply(model)
    model.train()
    loss = backward(model, micro_batch(0), 1.0)
    gradients = [p.grad for p in model.parameters() if p.requires_grad and p.grad is not None]
    finite = all(bool(gradient.isfinite().all()) for gradient in gradients)
    return finite and bool(torch.isfinite(torch.as_tensor(loss))) and any(bool(g.any()) for g in gradients)


def main(keys: list[str]) -> None:
    """Try the types, or those in ``keys``, and write what was found."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    types = [key for key in KEYS if "#" not in key]
    before = json.loads(RECORD.read_text()) if keys else {"models": {}, "not_opened": {}}
    found = {key: value for key, value in before["models"].items() if key not in keys}
    refused = {key: reason for key, reason in before["not_opened"].items() if key not in keys} | NOT_BUILT
    for key in keys or types:
        with tempfile.TemporaryDirectory() as folder:
            result = record_of(key, Path(folder))
        if isinstance(result, str):
            refused[key] = result
        else:
            found[key] = result
        print(key, result, flush=True)
    record = {
        "transformers": transformers.__version__,
        "methods": list(METHODS),
        "models": dict(sorted(found.items())),
        "not_opened": dict(sorted(refused.items())),
    }
    RECORD.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
