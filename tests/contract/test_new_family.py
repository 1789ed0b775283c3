"""A family of decoders that nobody has heard of: one entry in the table, and everything works on it.

It is a Llama all of whose parts have other names, so each of its runs must give what the same run gives on a Llama of
the same weights.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lit_lora.checkpoint.load import load_model
from lit_lora.checkpoint.save import CheckpointWriter, copy_side_files
from lit_lora.checkpoint.tensors import open_tensors
from lit_lora.cli import main
from lit_lora.model.families import FAMILIES, DecoderNames, Family
from lit_lora.open.decoder import open_model
from tests.finetune.tiny_task import make_base, write_config, write_rows
from tests.train.tiny_run import metrics

# This is all that the package is told of it.
NEOX = Family(
    "NeoxForCausalLM",
    names=DecoderNames(
        embedding="gpt_neox.embed_in",
        layers="gpt_neox.h",
        norm="gpt_neox.final_norm",
        head="embed_out",
        attention_norm="attention_norm",
        attention="attention",
        query="attention.query",
        key="attention.key",
        value="attention.value",
        attention_out="attention.dense",
        mlp_norm="feed_forward_norm",
        mlp="feed_forward",
        mlp_gate="feed_forward.gate",
        mlp_in="feed_forward.dense_h_to_4h",
        mlp_out="feed_forward.dense_4h_to_h",
    ),
)
LLAMA = DecoderNames()
# What only a Llama calls its parts; the adapters of `lin` have a norm too.
PARTS = [part for part in asdict(LLAMA) if getattr(NEOX.names, part) != getattr(LLAMA, part)]
WORDS = {getattr(LLAMA, part).rpartition(".")[2] for part in PARTS} - {"layers", "norm"}

# Case -> recipe and method.
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("lora", {"name": "lora", "rank": 4}),
    "lora q,v": ("lora", {"name": "lora", "rank": 4, "target_modules": "q,v"}),
    "lora pissa": ("lora", {"name": "lora", "rank": 4, "init": "pissa", "target_modules": "q,v"}),
    "trainable tokens": ("lora", {"name": "lora", "rank": 4, "trainable_tokens": [100, 101, 111]}),
    "longlora": ("lora", {"name": "longlora", "rank": 4}),
    "ia3": ("lora", {"name": "ia3"}),
    "vera q,v": ("lora", {"name": "vera", "rank": 4, "target_modules": "q,v"}),
    "qlora": ("qlora", {"name": "lora", "rank": 4}),
    "houlsby": ("adapter", {"name": "houlsby"}),
    "parallel": ("adapter", {"name": "parallel"}),
    "lin": ("adapter", {"name": "lin"}),
    "prefix": ("adapter", {"name": "prefix"}),
    "prompt": ("adapter", {"name": "prompt"}),
    "llama-adapter": ("adapter", {"name": "llama-adapter"}),
    "full": ("full", {"name": "full"}),
}
MERGED = ("lora", "lora q,v", "trainable tokens", "longlora", "ia3", "vera q,v", "qlora")
TIED = ("trainable tokens",)  # on a base whose head shares the embedding, which must be found under its own name


def renamed(name: str) -> str:
    """What the family calls a tensor of a Llama."""
    module, _, parameter = name.rpartition(".")
    layer = re.fullmatch(rf"{LLAMA.layers}\.(\d+)\.(.+)", module)
    place, called = (f"{NEOX.names.layers}.{layer[1]}.", layer[2]) if layer else ("", module)
    part = next(part for part in PARTS if getattr(LLAMA, part) == called)
    return f"{place}{getattr(NEOX.names, part)}.{parameter}"


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    """Two folders with the same task for the same weights: of a Llama, and under the family's names."""
    yield from make_tasks(tmp_path_factory.mktemp("family"), tied=False)


@pytest.fixture(scope="module")
def tied_tasks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    """The same, of a base whose head shares the embedding's weight."""
    yield from make_tasks(tmp_path_factory.mktemp("tied"), tied=True)


def make_tasks(root: Path, *, tied: bool) -> Iterator[tuple[Path, Path]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FAMILIES, "neox", NEOX)
        patch.setenv("LIT_LORA_CACHE", str(root / "cache"))
        llama, other = root / "llama", root / "other"
        make_base(llama / "base", tied=tied)
        stored = open_tensors(llama / "base")
        (other / "base").mkdir(parents=True)
        with CheckpointWriter(other / "base") as writer:
            for name in stored.names():
                writer.add(renamed(name), stored.read(name))
        config = json.loads((llama / "base" / "config.json").read_text())
        config |= {"model_type": "neox", "architectures": [NEOX.architecture]}
        (other / "base" / "config.json").write_text(json.dumps(config))
        copy_side_files(llama / "base", other / "base")
        for folder in (llama, other):
            write_rows(folder / "rows.jsonl")
        yield llama, other


def call(*arguments: object) -> None:
    with pytest.raises(SystemExit) as done:
        main([str(argument) for argument in arguments])
    assert not done.value.code


def finetune(task: Path, case: str) -> Path:
    recipe, method = RUNS[case]
    folder = task / case.replace(",", "")
    sections = {"recipe": recipe, "peft": method, "out": str(folder), "optimizer": {"lr": 3e-2}}
    sections |= {"quantize": {"name": "int8"}} if recipe == "qlora" else {}
    call("finetune", "--config", write_config(task, **sections))
    return folder


def test_no_part_is_called_as_in_a_llama(tasks):
    names = [name for name, _ in load_model(tasks[1] / "base").named_parameters()]
    assert names[:2] == ["gpt_neox.embed_in.weight", "gpt_neox.h.0.attention.query.weight"]
    assert not WORDS & set(".".join(names).split("."))


def test_it_loads_and_computes_what_a_llama_of_the_same_weights_does(tasks):
    ids = torch.randint(0, 384, (2, 17), generator=torch.Generator().manual_seed(0))
    llama, other = (load_model(task / "base") for task in tasks)
    assert torch.equal(other(ids), llama(ids))
    assert [*other.blocks()] == ["gpt_neox.h.0", "gpt_neox.h.1"]
    assert other.get_submodule("embed_out") is other.get_output_embeddings()
    assert other.get_submodule("gpt_neox.embed_in") is other.get_input_embeddings()


@pytest.mark.parametrize("case", RUNS)
def test_it_trains_saves_and_merges_as_a_llama_of_the_same_weights(tasks, tied_tasks, case, capsys):
    ids = torch.randint(3, 384, (1, 24), generator=torch.Generator().manual_seed(1))
    recipe, _ = RUNS[case]
    tasks = tied_tasks if case in TIED else tasks
    runs, logits, merged = [finetune(task, case) for task in tasks], [], []
    for run in runs:
        logits.append(open_model(run, dtype="fp32").model(ids))
        if case in MERGED:
            capsys.readouterr()
            call("merge", run, "--dtype", "fp32")
            assert "2 blocks agree with base + adapter" in capsys.readouterr().out
            merged.append(load_model(run / "merged").eval())
    assert torch.equal(*logits)
    assert not merged or torch.equal(*(model(ids) for model in merged))
    llama, other = (metrics(run) for run in runs)
    assert [record.get("loss") for record in other] == [record.get("loss") for record in llama]
    validated = [record["validation_loss"] for record in other if "validation_loss" in record]
    assert min(validated[1:]) < validated[0]
    if recipe != "full":
        names = load_file(runs[1] / "adapter" / "adapter_model.safetensors")
        assert not WORDS & set(".".join(names).split("."))
