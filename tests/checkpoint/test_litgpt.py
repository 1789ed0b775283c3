from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lit_lora.checkpoint.litgpt import LitGPTReader
from lit_lora.errors import InputError
from tests.checkpoint.makers import CONFIG, litgpt_state, state_dict, write_litgpt

UNTIED = CONFIG | {"tie_word_embeddings": False}


@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize("config", [CONFIG, UNTIED, CONFIG | {"num_key_value_heads": 4}])
def test_fused_projections_are_split_in_both_layouts(tmp_path: Path, grouped: bool, config: dict[str, Any]) -> None:
    state = state_dict(config)
    reader = LitGPTReader(write_litgpt(tmp_path, litgpt_state(state, config, grouped=grouped), config))
    for name, tensor in state.items():
        assert reader.shape(name) == tuple(tensor.shape)
        assert torch.equal(reader.read(name), tensor), name
    found = reader.config()
    assert {key: found[key] for key in config if key in found} == {
        key: value for key, value in config.items() if key in found
    }


def test_a_finetuned_checkpoint_is_unwrapped(tmp_path: Path) -> None:
    state = state_dict()
    reader = LitGPTReader(write_litgpt(tmp_path, {"model": litgpt_state(state, grouped=False)}))
    assert torch.equal(reader.read("model.norm.weight"), state["model.norm.weight"])


def test_a_head_that_was_trained_apart_is_kept_apart(tmp_path: Path) -> None:
    state = litgpt_state(state_dict(), grouped=False)
    state["lm_head.weight"] = state["lm_head.weight"] + 1
    reader = LitGPTReader(write_litgpt(tmp_path, state))
    assert reader.config()["tie_word_embeddings"] is False
    assert torch.equal(reader.read("lm_head.weight"), state["lm_head.weight"])


def test_rope_scalings_are_translated(tmp_path: Path) -> None:
    state = litgpt_state(state_dict(), grouped=False)
    llama3 = {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_seq_len": 8192}
    found = LitGPTReader(write_litgpt(tmp_path / "a", state, rope_adjustments=llama3)).config()["rope_scaling"]
    assert found == {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    linear = LitGPTReader(write_litgpt(tmp_path / "b", state, rope_condense_ratio=4)).config()["rope_scaling"]
    assert linear == {"rope_type": "linear", "factor": 4.0}
    with pytest.raises(InputError, match="only Llama 3's rope_adjustments are supported"):
        LitGPTReader(write_litgpt(tmp_path / "c", state, rope_adjustments={"factor": 2.0})).config()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("mlp_class_name", "GemmaMLP"),
        ("norm_class_name", "LayerNorm"),
        ("parallel_residual", True),
        ("rotary_percentage", 0.25),
        ("n_expert", 8),
        ("attention_logit_softcapping", 50.0),
    ],
)
def test_another_architecture_is_refused_by_the_key_that_says_so(tmp_path: Path, key: str, value: Any) -> None:
    with pytest.raises(InputError, match=rf"model_config\.yaml: {key} is .*only Llama models are supported"):
        LitGPTReader(write_litgpt(tmp_path, litgpt_state(state_dict(), grouped=True), **{key: value}))


def test_an_unmerged_adapter_is_refused_with_the_remedy(tmp_path: Path) -> None:
    state = {"transformer.h.0.attn.qkv.lora_A": torch.ones(2, 2)}
    with pytest.raises(InputError, match="lora_A is not part of a Llama") as caught:
        LitGPTReader(write_litgpt(tmp_path, state))
    assert "merge" in str(caught.value.hint)


def test_a_config_that_is_missing_or_wrong_is_an_error(tmp_path: Path) -> None:
    folder = write_litgpt(tmp_path, litgpt_state(state_dict(), grouped=True), n_query_groups=4)
    with pytest.raises(InputError, match=r"attn\.attn\.weight has 128 rows, expected 192"):
        LitGPTReader(folder)
    write_litgpt(tmp_path, litgpt_state(state_dict(), grouped=True), n_head="many")
    with pytest.raises(InputError, match=r"model_config\.yaml: n_head: expected a number above 0, got 'many'"):
        LitGPTReader(folder)
    (folder / "model_config.yaml").unlink()
    with pytest.raises(InputError, match=r"model_config\.yaml: no such file"):
        LitGPTReader(folder)


def test_a_broken_generation_config_is_one_clear_line(tmp_path: Path) -> None:
    folder = write_litgpt(tmp_path, litgpt_state(state_dict(), grouped=False))
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(InputError, match=r"generation_config\.json:1: not valid JSON"):
        LitGPTReader(folder).config()
