"""Check that a change leaves all numbers identical: 20 steps of each recipe at seed 0, compared with a saved record.

    python scripts/same_numbers.py --out before.json        # at the revision before the change
    python scripts/same_numbers.py --against before.json    # at the revision after it

Each recipe is run through the command line, on a tiny random model, so the script depends on no code between the
command and ``metrics.jsonl``. For each run it records the loss and the gradient norm of every step in full precision,
the validation losses, and a hash of the saved weights: equal hashes after 20 steps mean equal gradients. Two machines
may differ in the last bits, so compare on one.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
import yaml
from safetensors import safe_open
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

__all__ = ["main"]

STEPS = 20
SYSTEM = "Sort the order."
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
THINGS = ("red lamp", "blue chair", "green table", "small radio", "old clock", "new phone", "wooden shelf")
# Name of the run -> its config beyond the common part. bfloat16 and float32 use different kernels.
RUNS: dict[str, dict[str, Any]] = {
    "lora": {"recipe": "lora", "peft": {"name": "lora", "rank": 4, "dropout": 0.1}},
    "lora fp32": {"recipe": "lora", "model": {"dtype": "fp32"}, "peft": {"name": "lora", "rank": 4, "init": "eva"}},
    "qlora": {"recipe": "qlora", "peft": {"name": "lora", "rank": 4}},
    "qlora loftq": {"recipe": "qlora", "peft": {"name": "loftq", "rank": 4}},
    "houlsby": {"recipe": "adapter", "peft": {"name": "houlsby"}},
    "prefix": {"recipe": "adapter", "peft": {"name": "prefix"}, "optimizer": {"name": "adamw8bit"}},
    "full": {"recipe": "full", "train": {"activation_checkpointing": "selective"}},
    "classify": {"recipe": "classify", "peft": {"name": "lora", "rank": 4}},
}


def main() -> None:
    """Run every recipe, then write or compare the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the record to this file")
    parser.add_argument("--against", type=Path, help="compare with the record in this file; exit 1 if anything differs")
    arguments = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    with tempfile.TemporaryDirectory() as folder:
        record = measure(Path(folder))
    if arguments.out:
        arguments.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    if arguments.against:
        before = json.loads(arguments.against.read_text(encoding="utf-8"))
        differing = [name for name in RUNS if record[name] != before.get(name)]
        for name in RUNS:
            print(f"{name:12} {'differs' if name in differing else 'identical'}", explain(record[name]))
        sys.exit(bool(differing))
    for name in RUNS:
        print(f"{name:12} {explain(record[name])}")


def explain(metrics: dict[str, Any]) -> str:
    """The first and last loss of a run and the start of its hash, for the reader."""
    losses = metrics["loss"]
    return f"loss {losses[0]:.6f} to {losses[-1]:.6f}, weights {metrics['weights'][:12]}"


def measure(folder: Path) -> dict[str, Any]:
    """The metrics of every run, by its name."""
    decoder = folder / "decoder"
    encoder = folder / "encoder"
    make_decoder(decoder)
    make_encoder(encoder)
    chats = folder / "chats.jsonl"
    labels = folder / "labels.jsonl"
    write_rows(chats, labels)
    record = {}
    for name, settings in RUNS.items():
        classify = settings["recipe"] == "classify"
        common = {
            "model": {"path": str(encoder if classify else decoder)},
            "data": {"path": str(labels if classify else chats), "validation": 8},
            "train": {"max_steps": STEPS, "batch_size": 6, "micro_batch_tokens": 160, "eval_every": 10, "samples": 0},
            "seed": 0,
            "out": str(folder / "runs" / name),
        }
        config = {key: merged(common.get(key), settings.get(key)) for key in {**common, **settings}}
        record[name] = run(config, folder)
    return record


def merged(common: Any, own: Any) -> Any:
    """A section of the config with the run's own keys."""
    if isinstance(common, dict):
        return {**common, **(own or {})}
    return common if own is None else own


def run(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Run one config through the command line, and read its metrics and weights."""
    path = folder / "config.yaml"
    out = Path(config["out"])
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "LIT_LORA_CACHE": str(folder / "cache")}
    command = [sys.executable, "-m", "lit_lora", "finetune", "--config", str(path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)} exits with {done.returncode}\n{done.stderr}")
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    metrics: dict[str, Any] = {}
    for name in ("loss", "grad_norm", "validation_loss"):
        metrics[name] = [record[name] for record in records if name in record]
    weights = sorted(out.glob("adapter/*.safetensors")) or sorted(out.glob("model/*.safetensors"))
    metrics["weights"] = hash_of(weights)
    return metrics


def hash_of(files: list[Path]) -> str:
    """SHA-256 of the names, shapes and bytes of all tensors in some safetensors files."""
    digest = hashlib.sha256()
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for name in sorted(tensors.keys()):
                tensor = tensors.get_tensor(name).contiguous()
                digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def make_decoder(folder: Path) -> None:
    """A tiny random Llama with a byte-level tokenizer and a chat template."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=specials,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator([f"{SYSTEM} system user assistant where is my order " + " ".join(THINGS)] * 3, trainer)
    folder.mkdir()
    backend.save(str(folder / "tokenizer.json"))
    tokens = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**tokens, "tokenizer_class": "PreTrainedTokenizerFast"}))
    (folder / "chat_template.jinja").write_text(CHATML)
    config = transformers.LlamaConfig(
        vocab_size=backend.get_vocab_size(),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    save_random(transformers.LlamaForCausalLM, config, folder)


def make_encoder(folder: Path) -> None:
    """A tiny random BERT with a tokenizer of words."""
    words = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", *sorted({word for thing in THINGS for word in thing.split()})]
    ids = {word: number for number, word in enumerate(words)}
    backend = tokenizers.Tokenizer(models.WordLevel(ids, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", ids["[CLS]"]), ("[SEP]", ids["[SEP]"])]
    )
    fast = transformers.PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend,
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        unk_token="[UNK]",
        model_max_length=64,
    )
    fast.save_pretrained(folder)
    config = transformers.BertConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
    )
    save_random(transformers.BertForMaskedLM, config, folder)


def save_random(kind: Any, config: Any, folder: Path) -> None:
    """Write a model of this shape with values that depend only on the seed."""
    torch.manual_seed(0)
    kind(config).to(torch.float32).save_pretrained(folder)


def write_rows(chats: Path, labels: Path) -> None:
    """Conversations that share a system message, and short texts with a label."""
    with chats.open("w", encoding="utf-8") as file:
        for number in range(80):
            question = f"Where is my {THINGS[number % 7]}, order {17 * number}?"
            answer = f"{THINGS[number % 7].split()[1]} {17 * number}"
            roles = (("system", SYSTEM), ("user", question), ("assistant", answer))
            messages = [{"role": role, "content": text} for role, text in roles]
            file.write(json.dumps({"messages": messages}) + "\n")
    with labels.open("w", encoding="utf-8") as file:
        for number in range(80):
            text = f"{THINGS[number % 7]} {THINGS[(3 * number + 1) % 7]}"
            file.write(json.dumps({"text": text, "label": ("odd", "even")[number % 7 % 2]}) + "\n")


if __name__ == "__main__":
    main()
