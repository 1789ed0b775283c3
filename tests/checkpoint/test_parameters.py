"""Names and shapes in files against those of a model, with transformers as the oracle in both directions."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from lit_lora.checkpoint.parameters import StoredParameters
from lit_lora.errors import InputError
from tests.families import tiny_configs

TEXT = [
    "llama", "gpt2", "gpt_neox", "falcon", "mpt", "bloom", "opt", "phi", "phi3", "mixtral", "qwen2_moe", "qwen3_moe",
    "granitemoe", "deepseek_v3", "gpt_oss", "falcon_h1", "mamba", "qwen3_next", "gemma3n_text", "gemma4_text",
]  # fmt: skip
COMPOSITE = ["gemma3#composite", "gemma4#composite", "qwen3_5#composite", "mistral3#composite"]

# Where the two versions of transformers put the text model of a composite.
OLD = {"model.language_model.": "language_model.model.", "lm_head.": "language_model.lm_head."}
NEW = {"language_model.model.": "model.language_model.", "language_model.lm_head.": "lm_head."}


def text_model(folder: Path) -> PreTrainedModel:
    """transformers' text model of a checkpoint, without values."""
    whole = AutoConfig.from_pretrained(folder)
    text = whole.get_text_config(decoder=True)
    text.tie_word_embeddings = whole.tie_word_embeddings
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(text, trust_remote_code=False)
    return model


def expected_state(saved: PreTrainedModel, model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The values that ``model`` should get, by its own names."""
    base = f"{model.base_model_prefix}."
    decoder, whole = saved.get_decoder().state_dict(), saved.state_dict()
    state = {}
    for name in dict(model.named_parameters()) | {name: 0 for name in model.state_dict()}:
        inner = name.removeprefix(base)
        state[name] = decoder[inner] if inner != name and inner in decoder else whole[name]
    return state


def assert_round_trip(folder: Path, saved: PreTrainedModel, tied: bool) -> StoredParameters:
    model = text_model(folder)
    stored = StoredParameters(folder, model)
    files = {name: stored.files.read(name) for name in stored.files.names()}
    for name, value in expected_state(saved, model).items():
        if tied and name not in stored.names():
            assert name.endswith(("lm_head.weight", "embed_out.weight"))
            continue
        assert stored.shape(name) == value.shape
        assert torch.equal(stored.read(name), value), name
        assert torch.equal(stored.read_once(name), value)
        assert stored.read(name, torch.float16).dtype == torch.float16

    written = {}
    for conversion in stored.conversions:
        written |= stored.to_files(conversion, {name: stored.read(name) for name in conversion.parameters})
    assert written.keys() | set(stored.others()) == files.keys()
    for name, tensor in written.items():
        assert tensor.shape == files[name].shape
        assert torch.equal(tensor, files[name]), name
    return stored


@pytest.mark.parametrize("key", TEXT)
def test_every_parameter_is_read_as_transformers_does_and_written_back_bit_for_bit(key: str, tmp_path: Path) -> None:
    saved = tiny_configs.save(key, tmp_path)
    stored = assert_round_trip(tmp_path, saved, saved.config.tie_word_embeddings)
    assert stored.others() == []
    assert set(stored.names()) <= saved.state_dict().keys()


@pytest.mark.parametrize("key", COMPOSITE)
@pytest.mark.parametrize("layout", [OLD, NEW], ids=["transformers 4", "transformers 5"])
def test_the_text_model_of_a_composite_is_found_and_the_rest_left_alone(
    key: str, layout: dict[str, str], tmp_path: Path
) -> None:
    saved = tiny_configs.save(key, tmp_path)
    rename(tmp_path, layout)
    stored = assert_round_trip(tmp_path, saved, saved.config.tie_word_embeddings)
    assert not any("language_model" in name or "lm_head" in name for name in stored.others())
    parts = {name for name in saved.state_dict() if "language_model" not in name and "lm_head" not in name}
    assert len(stored.others()) == len(parts)


def rename(folder: Path, prefixes: dict[str, str]) -> None:
    """Rewrite a checkpoint of one file with other names."""

    def renamed(name: str) -> str:
        for old, new in prefixes.items():
            if name.startswith(old):
                return new + name.removeprefix(old)
        return name

    tensors = load_file(folder / "model.safetensors")
    save_file({renamed(name): tensor for name, tensor in tensors.items()}, folder / "model.safetensors")


def test_an_old_file_without_the_prefix_of_the_base_model_is_read(tmp_path: Path) -> None:
    saved = tiny_configs.save("gpt2", tmp_path)
    rename(tmp_path, {"transformer.": ""})
    with_masks = load_file(tmp_path / "model.safetensors") | {"h.0.attn.bias": torch.ones(1, 1, 8, 8)}
    save_file(with_masks, tmp_path / "model.safetensors")
    stored = StoredParameters(tmp_path, text_model(tmp_path))
    assert torch.equal(stored.read("transformer.wte.weight"), saved.transformer.wte.weight)
    assert stored.others() == ["h.0.attn.bias"]  # transformers ignores it, too
    assert "h.0.attn.bias" not in stored.names()


def test_a_missing_expert_is_an_error_that_names_the_tensors(tmp_path: Path) -> None:
    tiny_configs.save("qwen3_moe", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.mlp.experts.2.gate_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"the 7 tensors from .*experts\.0\.gate_proj.* do not make up") as error:
        StoredParameters(tmp_path, text_model(tmp_path))
    assert "\n" not in str(error.value)


def test_a_tensor_among_the_text_models_that_it_has_no_place_for_is_listed(tmp_path: Path) -> None:
    tiny_configs.save("gemma3#composite", tmp_path)
    rename(tmp_path, NEW)
    tensors = load_file(tmp_path / "model.safetensors")
    stray = "model.language_model.layers.9.mlp.up_proj.weight"
    save_file(tensors | {stray: torch.ones(2, 2)}, tmp_path / "model.safetensors")
    assert stray in StoredParameters(tmp_path, text_model(tmp_path)).names()


def test_prediction_heads_that_transformers_ignores_are_left_alone(tmp_path: Path) -> None:
    tiny_configs.save("qwen3_next", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(tensors | {"mtp.fc.weight": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    stored = StoredParameters(tmp_path, text_model(tmp_path))
    assert stored.others() == ["mtp.fc.weight"]
    assert "mtp.fc.weight" not in stored.names()
