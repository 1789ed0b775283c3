"""What ``lit-lora inspect`` says of everything that a user may have, and each problem that it finds."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lit_lora.checkpoint import load_model
from lit_lora.checkpoint.load import empty_model
from lit_lora.model import ModelConfig
from lit_lora.peft import freeze, methods, save_adapter
from tests.checkpoint.makers import CONFIG, litgpt_state, state_dict, write_hf_folder, write_litgpt, write_tiny_gguf
from tests.classify.tiny import save_base
from tests.cli.test_convert import run
from tests.cli.test_download import serve
from tests.families import tiny_configs
from tests.test_hub import FakeHub, server  # noqa: F401 - fixture
from tests.tiny import tiny_tokenizer

Change = Callable[[], object]


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny checkpoint in the current folder."""
    monkeypatch.chdir(tmp_path)
    tiny_tokenizer(Path("tokenizer"))
    save_file(state_dict(), write_hf_folder(Path("model"), Path("tokenizer")) / "model.safetensors")


def inspected(source: str, capsys: Any, code: int = 0) -> dict[str, Any]:
    """The result of ``inspect --json``, with the exit code that it should have."""
    capsys.readouterr()
    assert run("inspect", source, "--json") == code
    report: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert report["usable"] == (code == 0)
    return report


def change_config(**changes: object) -> None:
    path = Path("model/config.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def change_tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    path = Path("model/model.safetensors")
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path)


def test_a_checkpoint_is_described_by_its_files(capsys: Any) -> None:
    report = inspected("model", capsys)
    assert (report["kind"], report["format"], report["problems"]) == ("checkpoint", "safetensors", [])
    model = report["model"]
    assert (model["model_type"], model["architecture"]) == ("llama", "LlamaForCausalLM")
    assert (model["layers"], model["width"], model["rows"], model["context"]) == (2, 64, 384, 256)
    assert model["rope"] == {"rope_type": "default", "rope_theta": 50000.0}
    assert model["tied"]
    assert report["tokenizer"] == {
        "vocabulary": 384,
        "special_tokens": {
            "bos": ["<|im_start|>", 1],
            "eos": ["<|im_end|>", 2],
            "pad": ["<|im_end|>", 2],
            "end of turn": ["<|im_end|>", 2],
        },
        "starts_with_bos": False,
        "template": "chat_template.jinja (chatml)",
    }
    sizes = {part["name"]: (part["parameters"], part["bytes"]) for part in report["parts"]}
    attention, mlp, norms = 2 * (2 * 64 * 64 + 2 * 64 * 32), 2 * 3 * 64 * 96, 5 * 64
    assert sizes == {
        "embedding": (384 * 64, 4 * 384 * 64),
        "attention": (attention, 4 * attention),
        "MLP": (mlp, 4 * mlp),
        "norms": (norms, 4 * norms),
    }
    targets = {target["name"]: (target["shape"], target["count"], target["all_linear"]) for target in report["targets"]}
    assert targets["self_attn.k_proj"] == ([32, 64], 2, True)
    assert targets["mlp.down_proj"] == ([64, 96], 2, True)
    assert targets["lm_head"] == ([384, 64], 1, False)
    assert len([target for target in targets.values() if target[2]]) == 7


@pytest.mark.parametrize("key", ["llama", "mamba", "gemma3n_text"])
def test_every_name_that_is_listed_can_be_trained(key: str, capsys: Any) -> None:
    tiny_configs.save(key, Path("other"))
    tiny_tokenizer(Path("other"))
    targets = inspected("other", capsys)["targets"]
    names = [target["name"] for target in targets if target["setting"] == "target_modules"]
    model = load_model(Path("other"))
    lora = methods()["lora"].model_validate({"target_modules": names, "rank": 2})
    freeze(model)
    lora.apply(model)


def test_the_tables_are_lines_with_tabs_in_a_pipe(capsys: Any) -> None:
    assert run("inspect", "model") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("#")] == ["# model", "# Sizes", "# Modules"]
    assert "runs by\tlit-lora's decoder" in lines
    assert "bos\t<|im_start|> (1)" in lines
    assert "rope\tdefault, theta 50000" in lines
    assert "self_attn.q_proj\t64×64\t×2\tyes\ttarget_modules" in lines
    assert "embedding\t24,576\t98.3 KB\t98.3 KB F32" in lines


def cut() -> None:
    path = Path("model/model.safetensors")
    path.write_bytes(path.read_bytes()[:-100])


def in_two_shards_without_the_second() -> None:
    tensors = load_file("model/model.safetensors")
    weight_map = {name: f"model-0000{1 + number % 2}-of-00002.safetensors" for number, name in enumerate(tensors)}
    Path("model/model.safetensors").unlink()
    first = "model-00001-of-00002.safetensors"
    save_file({name: tensors[name] for name, shard in weight_map.items() if shard == first}, f"model/{first}")
    Path("model/model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 999\n"
DOWN = "model.layers.1.mlp.down_proj.weight"

PROBLEMS: dict[str, tuple[Change, str, str | None]] = {
    "a missing shard": (in_two_shards_without_the_second, "1 of 2 shards are missing: model-00002-of", "download"),
    "a truncated file": (cut, "model/model.safetensors: truncated or damaged: ", "download it again"),
    "a file of nothing": (lambda: Path("model/model.safetensors").write_text(""), "not a safetensors file", None),
    "a pointer": (lambda: Path("model/model.safetensors").write_text(POINTER), "a Git LFS pointer", "git lfs pull"),
    "a small embedding": (lambda: change_config(vocab_size=300), "384 tokens, the model's embedding 300", None),
    "another's tokenizer": (lambda: change_config(eos_token_id=350), "the ordinary token", "of different models"),
    "no tokenizer": (lambda: Path("model/tokenizer.json").unlink(), "model: no tokenizer.json", None),
    "no config": (lambda: Path("model/config.json").unlink(), "model: no config.json", None),
    "half a config": (lambda: change_config(num_hidden_layers=None), "'num_hidden_layers' is missing", None),
    "a missing tensor": (lambda: change_tensors(lambda all: all.pop(DOWN)), f"tensor {DOWN} is missing", None),
    "a tensor too many": (
        lambda: change_tensors(lambda all: all.update(more=torch.ones(2))),
        "tensor more is not part of the model that its config describes",
        None,
    ),
    "a misshapen tensor": (lambda: change_config(intermediate_size=97), "expected (97, 64) from the config", None),
    "GPTQ": (
        lambda: change_config(quantization_config={"quant_method": "gptq"}, _name_or_path="some/original"),
        "already quantized, by gptq",
        "lit-lora download some/original",
    ),
    "mlx": (lambda: change_config(quantization={"group_size": 64, "bits": 4}), "already quantized, by mlx", "16-bit"),
    "an unknown family": (lambda: change_config(model_type="lama"), "model_type 'lama' is not supported", None),
    "code": (lambda: change_config(model_type="x", auto_map={"AutoConfig": "a.B"}), "model_type 'x'", None),
}


@pytest.mark.parametrize("case", PROBLEMS)
def test_a_problem_is_listed_with_its_remedy(case: str, capsys: Any) -> None:
    change, text, hint = PROBLEMS[case]
    change()
    report = inspected("model", capsys, code=3)
    (problem,) = [problem for problem in report["problems"] if text in problem["text"]]
    assert problem["fatal"]
    assert hint is None or hint in problem["hint"]
    assert run("inspect", "model") == 3
    assert "error\t" in capsys.readouterr().out


def other_head(tensors: dict[str, torch.Tensor]) -> None:
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda: Path("model/chat_template.jinja").unlink(), "no chat template"),
        (lambda: change_tensors(other_head), "the stored head differs: it is used, untied"),
    ],
)
def test_what_does_not_stand_in_the_way_is_a_warning(change: Change, text: str, capsys: Any) -> None:
    change()
    report = inspected("model", capsys)
    (problem,) = report["problems"]
    assert text in problem["text"]
    assert not problem["fatal"]


def test_a_stored_copy_of_the_tied_head_is_no_problem(capsys: Any) -> None:
    change_tensors(lambda all: all.update({"lm_head.weight": all["model.embed_tokens.weight"].clone()}))
    assert inspected("model", capsys)["problems"] == []


def test_weights_are_not_read(capsys: Any) -> None:
    """A checkpoint of 16 GB, of which the disk has the header only."""
    sizes = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
    sizes |= {"num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128_256, "tie_word_embeddings": False}
    folder = write_hf_folder(Path("big"), Path("tokenizer"), {**CONFIG, **sizes})
    header: dict[str, Any] = {}
    end = 0
    for name, parameter in empty_model(ModelConfig.from_folder(folder)).named_parameters():
        start, end = end, end + 2 * parameter.numel()
        header[name] = {"dtype": "BF16", "shape": list(parameter.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    report = inspected("big", capsys)
    assert sum(part["parameters"] for part in report["parts"]) == 8_030_261_248
    assert sum(part["bytes"] for part in report["parts"]) == 16_060_522_496
    (problem,) = report["problems"]
    assert "more than twice the tokenizer's 384 tokens" in problem["text"]


def test_a_quantized_checkpoint_shows_codes_and_scales_in_the_part_that_has_them(capsys: Any) -> None:
    assert run("convert", "model", "--quantize", "int8", "--out", "packed") == 0
    report = inspected("packed", capsys)
    assert report["model"]["quantization"] == "bitsandbytes"
    (attention,) = [part for part in report["parts"] if part["name"] == "attention"]
    assert attention["parameters"] == 24_576
    assert attention["dtypes"]["I8"] == 24_576
    assert attention["dtypes"]["F32"] == 4 * 2 * (2 * 64 + 2 * 32)  # one scale per row


def write_adapter(folder: Path, base: str, **settings: Any) -> None:
    model = load_model(Path("model"))
    lora = methods()["lora"].model_validate({"rank": 4, "alpha": 8, "target_modules": ["q_proj", "v_proj"], **settings})
    freeze(model)
    lora.apply(model)
    save_adapter(model, lora, folder, base=base, data="rows.jsonl")


def test_an_adapter_says_what_it_was_trained_by_and_on(capsys: Any) -> None:
    write_adapter(Path("adapter"), base="model")
    for source in ("adapter", "adapter/adapter_model.safetensors"):
        report = inspected(source, capsys)
        adapter = report["adapter"]
        assert (report["kind"], adapter["method"], adapter["peft_type"]) == ("adapter", "lora", "LORA")
        assert (adapter["rank"], adapter["alpha"], adapter["targets"]) == (4, 8, ["q_proj", "v_proj"])
        assert (adapter["base"], adapter["base_folder"], adapter["data"]) == ("model", "model", "rows.jsonl")
        parameters = 2 * 4 * (64 + 64 + 64 + 32)
        assert (adapter["parameters"], adapter["dtypes"]) == (parameters, {"F32": 4 * parameters})
        assert report["problems"] == []


def test_an_adapter_without_its_base_is_a_warning(capsys: Any) -> None:
    write_adapter(Path("adapter"), base="some/base")
    (problem,) = inspected("adapter", capsys)["problems"]
    assert "base model some/base not found" in problem["text"]


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("adapter_model.safetensors", b"cut", "not a safetensors file"),
        ("adapter_config.json", b'{"peft_type": "ADALORA"}', "peft_type 'ADALORA' is not supported"),
    ],
)
def test_a_broken_adapter_is_an_error(name: str, content: bytes, text: str, capsys: Any) -> None:
    write_adapter(Path("adapter"), base="model")
    (Path("adapter") / name).write_bytes(content)
    (problem,) = inspected("adapter", capsys, code=3)["problems"]
    assert text in problem["text"]


def test_a_run_says_how_far_it_is(capsys: Any) -> None:
    Path("run").mkdir()
    Path("run/config.yaml").write_text("recipe: lora\nmodel: {path: model}\ndata: {path: rows.jsonl}\n")
    report = inspected("run", capsys)
    assert report["kind"] == "run"
    assert report["run"] == {"recipe": "lora", "data": "rows.jsonl", "complete": False, "metrics": {}}
    assert "has written no adapter" in report["problems"][0]["text"]
    write_adapter(Path("run/adapter"), base="model")
    Path("run/result.json").write_text('{"val_loss": 1.5}')
    report = inspected("run", capsys)
    assert report["run"]["complete"]
    assert report["run"]["metrics"] == {"val_loss": 1.5}
    assert report["adapter"]["rank"] == 4
    shutil.copytree("model", "run/model")
    shutil.rmtree("run/adapter")
    assert inspected("run", capsys)["model"]["model_type"] == "llama"


def test_one_file_of_a_checkpoint_shows_its_tensors(capsys: Any) -> None:
    report = inspected("model/model.safetensors", capsys)
    assert report["kind"] == "file"
    assert [part["parameters"] for part in report["parts"]] == [sum(tensor.numel() for tensor in state_dict().values())]
    shapes = {target["name"]: (target["shape"], target["count"]) for target in report["targets"]}
    assert shapes["self_attn.k_proj"] == ([32, 64], 2)
    assert "one file of a checkpoint" in report["problems"][0]["text"]


def test_other_formats_are_inspected_too(capsys: Any) -> None:
    write_tiny_gguf(Path("tiny.Q8_0.gguf"), Path("tokenizer"))
    write_hf_folder(Path("pickled"), Path("tokenizer"))
    torch.save(state_dict(), "pickled/pytorch_model.bin")
    write_litgpt(Path("lit"), litgpt_state(state_dict(), grouped=True))
    whole = inspected("model", capsys)
    for source, words in {
        "tiny.Q8_0.gguf": "GGUF",
        "pickled": "PyTorch",
        "pickled/pytorch_model.bin": "PyTorch",
        "lit": "LitGPT",
    }.items():
        capsys.readouterr()
        run("inspect", source, "--json")
        report = json.loads(capsys.readouterr().out)
        assert report["format"].startswith(words)
        assert report["targets"] == whole["targets"]
        assert sum(part["parameters"] for part in report["parts"]) == 86_336
        if source != "lit":  # it has no tokenizer
            assert report["usable"], report["problems"]
            assert report["tokenizer"]["special_tokens"] == whole["tokenizer"]["special_tokens"]


BY_NAMES_IN_MEMORY: dict[str, tuple[str, list[int], int, set[str]]] = {
    "gpt2": ("attn.c_attn", [96, 32], 4, {"embedding", "attention", "MLP", "norms"}),
    "gpt_oss": ("mlp.experts.gate_up_proj", [4, 32, 96], 4, {"embedding", "attention", "experts", "norms", "head"}),
    "falcon_mamba": ("mixer.in_proj", [128, 32], 4, {"embedding", "recurrence", "norms"}),
    "gemma3#composite": (
        "self_attn.q_proj", [32, 32], 4, {"embedding", "attention", "MLP", "norms", "unused by the text model"}
    ),
}  # fmt: skip


@pytest.mark.parametrize("key", BY_NAMES_IN_MEMORY)
def test_a_hosted_or_composite_model_is_inspected_by_the_names_that_it_has_in_memory(key: str, capsys: Any) -> None:
    name, shape, count, part_names = BY_NAMES_IN_MEMORY[key]
    tiny_configs.save(key, Path("hosted"))
    tiny_tokenizer(Path("hosted"))
    report = inspected("hosted", capsys)
    own = "lit-lora's decoder"
    assert report["model"]["runs_by"] == (own if "gemma3" in key else "transformers' model, hosted by lit-lora")
    (target,) = [target for target in report["targets"] if target["name"] == name]
    assert (target["shape"], target["count"]) == (shape, count)
    assert target["setting"] == ("target_parameters" if len(shape) == 3 else "target_modules")
    assert {part["name"] for part in report["parts"]} == part_names
    stored = load_file("hosted/model.safetensors").values()
    assert sum(part["bytes"] for part in report["parts"]) == sum(tensor.nbytes for tensor in stored)
    Path("hosted/model.safetensors").unlink()
    save_file({"other": torch.ones(1)}, "hosted/model.safetensors")
    assert "is missing" in inspected("hosted", capsys, code=3)["problems"][0]["text"]


@pytest.mark.parametrize(("family", "target"), [("bert", "attention.self.query"), ("t5", "layer.*.SelfAttention.q")])
def test_an_encoder_is_for_recipe_classify(family: str, target: str, capsys: Any) -> None:
    save_base(family, Path("encoder"))
    report = inspected("encoder", capsys)
    assert report["model"]["runs_by"] == "transformers, by recipe classify"
    assert target in [target["name"] for target in report["targets"]]
    sizes = {part["name"]: part for part in report["parts"]}
    assert sizes["attention"]["bytes"] == 4 * sizes["attention"]["parameters"]


def test_a_hub_repository_is_inspected_without_its_weights(
    server: FakeHub,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    local = inspected("model", capsys)
    serve(server, Path("model"), monkeypatch)
    report = inspected("some/model-x", capsys)
    assert report == {**local, "path": "some/model-x"}
    assert [headers["Range"] for headers in server.asked("model.safetensors")] == ["bytes=0-99999"]
    assert sorted(path.name for path in Path().iterdir()) == ["model", "tokenizer"]


@pytest.mark.parametrize(
    "case", ["a truncated file", "a pointer", "GPTQ", "mlx", "another's tokenizer", "half a config"]
)
def test_a_problem_of_a_hub_repository_is_listed(
    case: str,
    server: FakeHub,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    change, text, _ = PROBLEMS[case]
    change()
    serve(server, Path("model"), monkeypatch)
    report = inspected("some/model", capsys, code=3)
    (problem,) = [problem for problem in report["problems"] if problem["fatal"]]
    assert text.replace("model/model.safe", "some/model/model.safe") in problem["text"]
    assert "/tmp" not in problem["text"]


def test_a_hub_repository_with_a_missing_shard_or_an_adapter(
    server: FakeHub,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    write_adapter(Path("adapter"), base="some/base")
    serve(server, Path("adapter"), monkeypatch)
    report = inspected("some/adapter", capsys)
    assert (report["kind"], report["adapter"]["rank"], report["problems"]) == ("adapter", 4, [])
    in_two_shards_without_the_second()
    serve(server, Path("model"), monkeypatch)
    report = inspected("some/model-x", capsys, code=3)
    assert report["problems"][0]["text"].startswith("some/model-x: 1 of 2 shards are missing")


def test_nothing_at_a_path_is_one_line(capsys: Any) -> None:
    for name in ("nowhere", "./nowhere/x", "model/nowhere"):
        assert run("inspect", name) == 3
        assert capsys.readouterr().err == f"error: {name}: no such file or folder, nor OWNER/NAME of the Hub\n"
