"""The contenders of the benchmark, and their settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["CONTENDERS", "METHODS", "PEERS", "REFERENCES", "TITLES", "Contender"]


@dataclass(frozen=True)
class Contender:
    """A program to measure: its runner, its settings worth trying, and its virtual environment."""

    title: str
    runner: str
    variants: dict[str, dict[str, Any]]
    requirements: tuple[str, ...] = ()
    """Packages that ``--create-venvs`` installs beside PyTorch; if there are none, it runs in this Python."""
    convert: str | None = None
    """Script, run by its Python, that converts the model folder to its own format."""


_PRECISIONS = ("fp32", "bf16", "autocast")


def _peft_variants() -> dict[str, dict[str, Any]]:
    variants: dict[str, dict[str, Any]] = {
        f"{precision}/{size}": {"precision": precision, "micro_batch": size}
        for precision in _PRECISIONS
        for size in (1, 2, 4, 8)
    }
    for precision in _PRECISIONS:
        base = {"precision": precision, "micro_batch": 8}
        variants[f"{precision}/8/length"] = {**base, "group": "length"}
        variants[f"{precision}/4/length"] = {**base, "micro_batch": 4, "group": "length"}
    for precision in ("bf16", "autocast"):
        variants[f"{precision}/1/eager"] = {"precision": precision, "micro_batch": 1, "attention": "eager"}
        variants[f"{precision}/8/eager"] = {"precision": precision, "micro_batch": 8, "attention": "eager"}
        variants[f"{precision}/2/packed"] = {"precision": precision, "micro_batch": 2, "packed": True}
        variants[f"{precision}/8/packed"] = {"precision": precision, "micro_batch": 8, "packed": True}
    variants["bf16/1/checkpointing"] = {"precision": "bf16", "micro_batch": 1, "checkpointing": True}
    for size in (8, 16, 32):  # for a GPU, where an fp32 adapter on bf16 weights needs autocast
        variants[f"bf16/{size}"] = {"precision": "bf16", "micro_batch": size}
        variants[f"bf16, autocast/{size}"] = {"precision": "bf16, autocast", "micro_batch": size}
    variants["bf16, autocast/32/packed"] = {"precision": "bf16, autocast", "micro_batch": 32, "packed": True}
    variants["bf16, autocast/8/checkpointing"] = {
        "precision": "bf16, autocast", "micro_batch": 8, "checkpointing": True,
    }  # fmt: skip
    variants["fp32, bf16 products/1"] = {"precision": "tf32", "micro_batch": 1}
    variants["fp32, bf16 products/8"] = {"precision": "tf32", "micro_batch": 8}
    return variants


def _peft_quantized_variants() -> dict[str, dict[str, Any]]:
    """NF4 with double quantization: as usually loaded, and as ``prepare_model_for_kbit_training`` prepares it."""
    variants: dict[str, dict[str, Any]] = {}
    for precision in ("bf16", "autocast"):
        for size in (1, 2, 4, 8):
            variants[f"{precision}/{size}"] = {"precision": precision, "micro_batch": size}
    variants["fp32/1"] = {"precision": "fp32", "micro_batch": 1}
    variants["bf16/2/packed"] = {"precision": "bf16", "micro_batch": 2, "packed": True}
    for precision in ("bf16", "autocast"):
        variants[f"{precision}/1/checkpointing"] = {"precision": precision, "micro_batch": 1, "checkpointing": True}
        for size in (1, 4):
            prepared = {"precision": precision, "micro_batch": size, "prepared": True, "checkpointing": True}
            variants[f"{precision}/{size}/prepared, checkpointing"] = prepared
    for size in (8, 16, 32):
        variants[f"bf16, autocast/{size}"] = {"precision": "bf16, autocast", "micro_batch": size}
    return {name: {**variant, "quantize": "nf4"} for name, variant in variants.items()}


def _trl_variants() -> dict[str, dict[str, Any]]:
    variants: dict[str, dict[str, Any]] = {
        f"{precision}/packed {length}": {
            "precision": precision,
            "max_length": length,
            "packed_rows": 1,
            "accumulation": 2048 // length,
        }
        for precision in _PRECISIONS
        for length in (512, 1024, 2048)
    }
    for rows in (1, 3):  # for a GPU: 3 x 2,048 tokens are about 32 rows of GSM8K
        variants[f"bf16, autocast/packed 2048 x {rows}"] = {
            "precision": "bf16, autocast", "max_length": 2048, "packed_rows": rows, "accumulation": 3 // rows,
        }  # fmt: skip
    variants["bf16, autocast/32"] = {
        "precision": "bf16, autocast", "max_length": 2048, "packing": False, "packed_rows": 32, "accumulation": 1,
    }  # fmt: skip
    for precision in _PRECISIONS:
        base = {"precision": precision, "max_length": 2048, "packing": False}
        variants[f"{precision}/1"] = {**base, "packed_rows": 1, "accumulation": 8}
        variants[f"{precision}/8"] = {**base, "packed_rows": 8, "accumulation": 1}
    return variants


def _litgpt_variants() -> dict[str, dict[str, Any]]:
    return {
        f"{precision}/{size}": {"precision": precision, "micro_batch": size}
        for precision in ("bf16-true", "bf16-mixed", "32-true")
        for size in (1, 2, 4, 8, 16, 32)
    }


def _our_variants(**settings: Any) -> dict[str, dict[str, Any]]:
    return {
        f"bf16/{tokens} tokens{mode and '/checkpointing'}": {
            "dtype": "bf16",
            "micro_batch_tokens": tokens,
            "activation_checkpointing": mode or "none",
            **settings,
        }
        for tokens in (16384, 8192, 4096, 2048, 1024, 512, 256)
        for mode in ("", "full")
    }


# A variant is named PRECISION/ROWS_PER_MICRO_BATCH/ANYTHING_ELSE.
CONTENDERS = {
    "peft": Contender("PEFT + transformers", "peft_loop.py", _peft_variants(), ("peft", "transformers", "accelerate")),
    "trl": Contender("TRL", "trl_sft.py", _trl_variants(), ("trl", "peft", "transformers", "datasets")),
    "litgpt": Contender("LitGPT", "litgpt_lora.py", _litgpt_variants(), ("litgpt",), convert="litgpt_convert.py"),
    "peft-bnb": Contender(
        "PEFT + bitsandbytes",
        "peft_loop.py",
        _peft_quantized_variants(),
        ("peft", "transformers", "accelerate", "bitsandbytes"),
    ),
    "ours": Contender("lit-lora", "ours.py", _our_variants()),
    "ours-qlora": Contender("lit-lora, QLoRA", "ours.py", _our_variants(quantize="nf4-dq")),
    "limit": Contender("the machine's limit", "gemm_limit.py", {"bf16 products": {}}),
}
PEERS = ("peft", "trl", "litgpt", "peft-bnb")
METHODS = {"lora": ("peft", "trl", "litgpt", "ours", "limit"), "qlora": ("peft-bnb", "ours-qlora", "ours", "limit")}
"""Method -> the contenders that are compared."""
TITLES = {"lora": "LoRA", "qlora": "QLoRA"}
REFERENCES = {"lora": ("peft", "fp32/1"), "qlora": ("peft-bnb", "fp32/1")}
"""Method -> contender and variant whose losses are the reference; run once at the end."""
