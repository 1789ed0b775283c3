"""LongLoRA: no leak, full attention when not training, the longer context in files and merged models."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from lit_lora import peft
from lit_lora.checkpoint.load import load_model
from lit_lora.errors import InputError, UsageError
from lit_lora.merge import Places, merge, plan_merge
from lit_lora.model import CausalLM, ModelConfig
from lit_lora.model.rope import inverse_frequencies
from lit_lora.peft.core.modules import own_modules
from tests.peft.tiny import VOCABULARY, adapted, make_model, save_base, shake

LENGTHS = [13, 5, 8]


def method(**settings: object) -> peft.Method:
    return peft.methods()["longlora"].model_validate({"name": "longlora", "group": 4, **settings})


def long(**settings: object) -> CausalLM:
    model = adapted(make_model(), method(**settings))
    shake(model, 0.1)
    return model


def outputs(model: CausalLM, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, lengths=LENGTHS)[0]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("place", range(sum(LENGTHS)))
def test_a_token_changes_nothing_before_it_and_nothing_in_another_document(place, training):
    model = long().train(training)
    ids = torch.arange(sum(LENGTHS))[None] % VOCABULARY
    other = ids.clone()
    other[0, place] = 60
    changed = (outputs(model, ids) != outputs(model, other)).any(-1)
    ends = torch.tensor(LENGTHS).cumsum(0)
    document = int((ends <= place).sum())
    assert not changed[:place].any()
    assert not changed[ends[document] :].any()
    assert changed[place]


def test_neighbouring_groups_meet_through_two_layers_only_by_the_shift():
    model = long().train()
    ids = torch.arange(sum(LENGTHS))[None] % VOCABULARY
    other = ids.clone()
    other[0, 2] = 60  # in the group 0..3, and in the shifted group 2..5, which reaches 4 and 5 of the next
    changed = (outputs(model, ids) != outputs(model, other)).any(-1)
    assert changed[2:8].all()  # 6 and 7 by the group 4..7 of the second layer
    assert not changed[8:].any()


def test_training_is_in_groups_and_nothing_else_is():
    model, ids = long(factor=1), torch.arange(sum(LENGTHS))[None] % VOCABULARY
    in_groups = outputs(model.train(), ids)
    full = outputs(model.eval(), ids)
    plain = adapted(make_model(), method(factor=1, group=64))
    plain.load_state_dict(model.state_dict())
    assert torch.equal(outputs(plain.eval(), ids), full)
    torch.testing.assert_close(outputs(plain.train(), ids), full, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(in_groups[:13], full[:13], atol=1e-3)
    torch.testing.assert_close(outputs(long(factor=1, group=8).train(), ids)[13:], full[13:], atol=1e-5, rtol=1e-5)


def test_embedding_norms_and_attention_train():
    rows = {row.pattern for row in peft.matched_table(long())}
    norms = {"model.layers.*.input_layernorm", "model.layers.*.post_attention_layernorm", "model.norm"}
    wanted = {*norms, "model.embed_tokens", *(f"model.layers.*.self_attn.{n}_proj" for n in "qkvo")}
    assert {row.removesuffix(".trained") for row in rows} == wanted


def test_the_context_is_stretched_and_comes_back():
    model = make_model()
    before = model.config
    method(factor=4, rope_type="linear").apply(model)
    assert model.context == 4 * 2048
    stretched, plain = (inverse_frequencies(config, config.rope)[0] for config in (model.config, before))
    assert stretched[1] == plain[1] / 4
    peft.remove(model)
    assert model.config is before
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_factor_of_one_leaves_positions_bit_for_bit():
    model, ids = make_model().eval(), torch.arange(20)[None]
    with torch.no_grad():
        expected = model(ids)
        method(factor=1).apply(model)
        assert torch.equal(model(ids), expected)
    assert model.config == make_model().config


@pytest.mark.parametrize("rope_type", ["linear", "yarn"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_saved_adapter_and_a_merged_model_bring_the_longer_context(tmp_path, rope_type, tied):
    base = save_base(make_model(tied), tmp_path / "base")
    config = method(factor=2, rope_type=rope_type, modules_to_save=["*norm"])
    model = adapted(load_model(base), config)
    shake(model, 0.1)
    model.eval()
    folder = peft.save_adapter(model, config, tmp_path / "adapter", base=base)
    ids = torch.arange(40)[None]
    with torch.no_grad():
        expected = model(ids)
        loaded = load_model(base)
        peft.load_adapter(loaded, folder)
        assert torch.equal(loaded(ids), expected)
        assert loaded.context == 4096
    merge(plan_merge(Places(folder, base, tmp_path / "merged")), tmp_path / "merged")
    written = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert written["max_position_embeddings"] == 4096
    assert written["rope_parameters"]["rope_type"] == rope_type
    with torch.no_grad():
        merged = load_model(tmp_path / "merged")
        torch.testing.assert_close(merged(ids), expected, atol=2e-5, rtol=2e-5)
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, expected, atol=1e-4, rtol=1e-4)


def test_configs_of_older_and_newer_transformers_are_extended_in_their_own_words():
    sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    data = {"model_type": "llama", **sizes, "num_attention_heads": 2, "max_position_embeddings": 64}
    old = ModelConfig.from_hf({**data, "rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}})
    written = old.extended(2).to_hf()
    assert written["rope_scaling"] == {"factor": 4.0, "rope_type": "linear"}
    assert (written["rope_theta"], written["max_position_embeddings"]) == (5e5, 128)
    new = ModelConfig.from_hf({**data, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}})
    written = new.extended(4, "yarn").to_hf()
    expected = {"rope_type": "yarn", "rope_theta": 5e5, "factor": 4.0, "original_max_position_embeddings": 64}
    assert written["rope_parameters"] == expected
    assert ModelConfig.from_hf(written).rope == new.extended(4, "yarn").rope


def test_what_does_not_fit_is_refused_in_one_line(tmp_path):
    model = make_model()
    model.config = model.config.extended(2, "yarn")
    with pytest.raises(UsageError, match="already scaled by 'yarn'"):
        method(factor=2, rope_type="linear").apply(model)
    assert not own_modules(model)
    with pytest.raises(UsageError, match="no config with positions"):
        method(target_modules=["0"], modules_to_save=[]).apply(nn.Sequential(nn.Linear(16, 16)))
    with pytest.raises(ValueError, match="unknown name 'longlora'"):
        peft.methods()["composed"].model_validate({"methods": [{"name": "longlora"}, {"name": "prefix"}]})
    model = adapted(make_model(), method())
    folder = peft.save_adapter(model, method(), tmp_path / "adapter", base="b")
    kinds = pytest.importorskip("peft").PeftConfig
    with pytest.raises((KeyError, ValueError), match="LIT_LORA_LONGLORA"):
        kinds.from_pretrained(str(folder))
    (folder / "lit_lora.json").unlink()
    with pytest.raises(InputError, match=r"without lit_lora\.json"):
        peft.read_adapter(folder)
