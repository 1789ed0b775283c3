from __future__ import annotations

import dataclasses
import json
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from gguf import GGMLQuantizationType
from safetensors.torch import save_file

from lit_lora.checkpoint import load_model
from lit_lora.checkpoint.convert import convert, open_source, plan_conversion, quantization_stripped
from lit_lora.checkpoint.tensors import INDEX, open_tensors
from lit_lora.errors import DiskError, InputError
from lit_lora.files import sha256_file
from lit_lora.tokenizer import Tokenizer, encode_text
from tests.checkpoint.makers import (
    CONFIG,
    litgpt_state,
    state_dict,
    write_hf_folder,
    write_litgpt,
    write_tiny_gguf,
)
from tests.tokenizer.sentencepiece_model import sentencepiece_model, vocabulary


def converted(source: Path, out: Path, **options: Any) -> Path:
    convert(plan_conversion(open_source(source), **options), out)
    return out


def torch_folder(folder: Path, tokenizer: Path, state: dict[str, Any] | None = None, **changes: Any) -> Path:
    """A folder with pytorch_model.bin; ``changes`` are to the config."""
    write_hf_folder(folder, tokenizer, CONFIG | changes)
    torch.save(state or state_dict(CONFIG | changes), folder / "pytorch_model.bin")
    return folder


@pytest.fixture(params=["gguf", "bin", "sharded bin", "safetensors", "litgpt"])
def source(request: pytest.FixtureRequest, tmp_path: Path, tokenizer_folder: Path) -> Path:
    """The same tiny model in every format."""
    folder = tmp_path / "source"
    if request.param == "gguf":
        folder.mkdir()
        return write_tiny_gguf(folder / "tiny.F32.gguf", tokenizer_folder)
    if request.param == "litgpt":
        return write_litgpt(write_hf_folder(folder, tokenizer_folder), litgpt_state(state_dict(), grouped=True))
    if request.param == "bin":
        return torch_folder(folder, tokenizer_folder)
    write_hf_folder(folder, tokenizer_folder)
    if request.param == "safetensors":
        save_file(state_dict(), folder / "model.safetensors")
        return folder
    names = list(state_dict())
    shards = {name: f"pytorch_model-0000{1 + (names.index(name) > 5)}-of-00002.bin" for name in names}
    for shard in set(shards.values()):
        state = {name: tensor for name, tensor in state_dict().items() if shards[name] == shard}
        torch.save(state, folder / shard)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": shards}))
    return folder


def test_every_format_becomes_the_same_checkpoint(source: Path, tmp_path: Path) -> None:
    out = converted(source, tmp_path / "out", dtype=torch.float32)
    reader = open_tensors(out)
    state = state_dict()
    assert set(reader.names()) == set(state)
    assert all(torch.equal(reader.read(name), tensor) for name, tensor in state.items())
    config = json.loads((out / "config.json").read_text())
    assert config["torch_dtype"] == "float32"
    assert config["num_key_value_heads"] == 2
    assert (out / "tokenizer.json").is_file()
    for file in open_source(source).files:
        assert sha256_file(file) in (out / "README.md").read_text()


def test_pain_17_transformers_opens_the_result_with_equal_logits(source: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = converted(source, tmp_path / "out", dtype=torch.float32)
    theirs, loading = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True, local_files_only=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    assert AutoTokenizer.from_pretrained(out, local_files_only=True).eos_token == "<|im_end|>"
    ids = torch.arange(50).reshape(1, 50)
    with torch.no_grad():
        torch.testing.assert_close(load_model(out)(ids), theirs(ids).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", [GGMLQuantizationType.F32, GGMLQuantizationType.Q8_0])
def test_gguf_becomes_bfloat16_unless_asked_otherwise(
    tmp_path: Path, tokenizer_folder: Path, kind: GGMLQuantizationType
) -> None:
    path = write_tiny_gguf(tmp_path / "tiny.gguf", tokenizer_folder, kind)
    reader = open_tensors(converted(path, tmp_path / "out"))
    assert {reader.dtype(name) for name in reader.names()} == {torch.bfloat16}


def test_other_formats_keep_their_dtype_unless_asked_otherwise(tmp_path: Path, tokenizer_folder: Path) -> None:
    half = torch_folder(tmp_path / "half", tokenizer_folder, state_dict(dtype=torch.float16))
    kept = converted(half, tmp_path / "kept")
    assert json.loads((kept / "config.json").read_text())["torch_dtype"] == "float16"
    assert open_tensors(kept).dtype("model.norm.weight") == torch.float16
    wide = converted(kept, tmp_path / "wide", dtype=torch.float32)
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(open_tensors(wide).read(name), open_tensors(kept).read(name).float())


def test_rounding_happens_once(tmp_path: Path, tokenizer_folder: Path) -> None:
    out = converted(torch_folder(tmp_path / "in", tokenizer_folder), tmp_path / "out", dtype=torch.bfloat16)
    reader = open_tensors(out)
    assert all(torch.equal(reader.read(name), tensor.bfloat16()) for name, tensor in state_dict().items())


def test_a_copy_of_a_tied_head_is_dropped(tmp_path: Path, tokenizer_folder: Path) -> None:
    state = state_dict()
    state |= {
        "lm_head.weight": state["model.embed_tokens.weight"],
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
    }
    out = converted(torch_folder(tmp_path / "in", tokenizer_folder, state), tmp_path / "out")
    assert set(open_tensors(out).names()) == set(state_dict())


def test_pain_14_a_head_trained_apart_is_kept_and_untied(
    tmp_path: Path, tokenizer_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = state_dict()
    state["lm_head.weight"] = state["model.embed_tokens.weight"] + 1
    out = converted(torch_folder(tmp_path / "in", tokenizer_folder, state), tmp_path / "out")
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    assert torch.equal(load_model(out).lm_head.weight, state["lm_head.weight"])
    assert "untied" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("model.norm.weight"), r"tensor model\.norm\.weight is missing$"),
        (lambda state: state.update(extra=torch.ones(1)), "tensor extra is not part of the model"),
        (lambda state: state.update({"model.norm.weight": torch.ones(3)}), r"norm\.weight: shape \(3,\), .*\(64,\)"),
        (lambda state: state["model.norm.weight"].fill_(float("nan")), r"model\.norm\.weight holds NaN or infinity"),
    ],
)
def test_a_state_dict_that_is_not_the_model_is_an_error(
    tmp_path: Path, tokenizer_folder: Path, change: Any, message: str
) -> None:
    state = state_dict()
    change(state)
    folder = torch_folder(tmp_path / "in", tokenizer_folder, state)
    with pytest.raises(InputError, match=message):
        converted(folder, tmp_path / "out")
    assert not list(tmp_path.glob("*out*")), "nothing half-written"


def test_a_weight_too_large_for_fp16_is_named(tmp_path: Path, tokenizer_folder: Path) -> None:
    state = state_dict()
    state["model.norm.weight"][0] = 1e5
    folder = torch_folder(tmp_path / "in", tokenizer_folder, state)
    with pytest.raises(InputError, match=r"model\.norm\.weight: a weight is beyond 65504"):
        converted(folder, tmp_path / "out", dtype=torch.float16)
    converted(folder, tmp_path / "out", dtype=torch.bfloat16)


def test_an_unsupported_model_type_is_refused_before_any_work(tmp_path: Path, tokenizer_folder: Path) -> None:
    folder = torch_folder(tmp_path / "in", tokenizer_folder, model_type="gpt_neox")
    with pytest.raises(InputError, match="model_type 'gpt_neox' is not supported"):
        plan_conversion(open_source(folder))


def test_a_lone_state_dict_needs_a_config(tmp_path: Path, tokenizer_folder: Path) -> None:
    (tmp_path / "in").mkdir()
    torch.save(state_dict(), tmp_path / "in" / "weights.pth")
    source = open_source(tmp_path / "in" / "weights.pth")
    with pytest.raises(InputError, match=r"config\.json: no such file") as caught:
        plan_conversion(source)
    assert "--config" in str(caught.value.hint)
    folder = write_hf_folder(tmp_path / "model", tokenizer_folder)
    plan = plan_conversion(source, config=folder / "config.json", tokenizer=folder)
    convert(plan, tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_a_missing_tokenizer_is_warned_about(
    tmp_path: Path, tokenizer_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = torch_folder(tmp_path / "in", tokenizer_folder)
    (folder / "tokenizer.json").unlink()
    converted(folder, tmp_path / "out")
    assert "--tokenizer" in capsys.readouterr().err
    with pytest.raises(InputError, match=r"no tokenizer\.json in it"):
        plan_conversion(open_source(folder), tokenizer=folder)


def test_a_sentencepiece_tokenizer_alone_becomes_tokenizer_json(tmp_path: Path, tokenizer_folder: Path) -> None:
    folder = torch_folder(tmp_path / "in", tokenizer_folder)
    for path in folder.glob("*token*"):
        path.unlink()
    (folder / "tokenizer.model").write_bytes(sentencepiece_model(vocabulary()))
    converted(folder, tmp_path / "out")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=False)
    expected = encode_text(Tokenizer.load(folder), "hello world")
    assert (
        theirs("hello world")["input_ids"] == encode_text(Tokenizer.load(tmp_path / "out"), "hello world") == expected
    )


def test_too_little_disk_is_said_before_work_starts(tmp_path: Path, tokenizer_folder: Path) -> None:
    plan = plan_conversion(open_source(torch_folder(tmp_path / "in", tokenizer_folder)))
    with pytest.raises(DiskError, match="the converted checkpoint needs 1000000"):
        convert(dataclasses.replace(plan, bytes=10**18), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_disk_that_fills_up_leaves_nothing(tmp_path: Path, tokenizer_folder: Path) -> None:
    plan = plan_conversion(open_source(write_tiny_gguf(tmp_path / "tiny.gguf", tokenizer_folder)))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (80_000, hard))  # the tokenizer fits into a file, the weights do not
    try:
        with pytest.raises(DiskError, match="out: the file is too large for the disk"):
            convert(plan, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.gguf"]


def test_an_existing_folder_is_never_touched(tmp_path: Path, tokenizer_folder: Path) -> None:
    plan = plan_conversion(open_source(torch_folder(tmp_path / "in", tokenizer_folder)))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("kept")
    with pytest.raises(DiskError, match="already exists"):
        convert(plan, tmp_path / "out")
    assert (tmp_path / "out" / "mine").read_text() == "kept"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no weights in it"),
        ({"a.gguf": b"", "b.gguf": b""}, r"several files with weights and no index \(a\.gguf, b\.gguf\)"),
        ({"training_args.bin": b"x", "optimizer.pt": b"x"}, "no weights in it"),
        ({"m-00002-of-00002.gguf": b"GGUF"}, r"1 of 2 parts are missing: m-00001-of-00002\.gguf"),
        ({"pytorch_model.bin.index.json": b'{"weight_map": {"a": "x.bin"}}'}, r"1 of 1 shards are missing: x\.bin"),
        ({INDEX: b'{"weight_map": {"a": "x.safetensors"}}'}, "1 of 1 shards are missing"),
    ],
)
def test_a_folder_that_is_no_checkpoint_is_an_error(tmp_path: Path, files: dict[str, bytes], message: str) -> None:
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        open_source(tmp_path)


def test_a_file_that_is_no_checkpoint_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file or folder"):
        open_source(tmp_path / "nowhere.gguf")
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(InputError, match="not a checkpoint, expected"):
        open_source(tmp_path / "notes.txt")
    (tmp_path / "model.safetensors").write_text("hello")
    with pytest.raises(InputError, match="one file of a checkpoint") as caught:
        open_source(tmp_path / "model.safetensors")
    assert str(tmp_path) in str(caught.value.hint)


@pytest.mark.parametrize(
    ("stem", "name"),
    [
        ("SmolLM2-135M-Instruct.Q4_1", "SmolLM2-135M-Instruct"),
        ("Meta-Llama-3-8B-Instruct-Q4_K_M", "Meta-Llama-3-8B-Instruct"),
        ("tinyllama-1.1b-chat-v1.0.Q8_0", "tinyllama-1.1b-chat-v1.0"),
        ("model-IQ2_XXS", "model"),
        ("model-bf16-00001-of-00003", "model"),
        ("model", "model"),
    ],
)
def test_the_name_of_a_gguf_file_loses_its_quantization(stem: str, name: str) -> None:
    assert quantization_stripped(stem) == name
