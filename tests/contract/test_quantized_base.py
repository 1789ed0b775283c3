"""What every low-rank method must hold over a quantised base."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lit_lora import peft
from lit_lora.checkpoint import load_model
from lit_lora.errors import UsageError
from lit_lora.model import CausalLM, ModelConfig
from lit_lora.peft.base import own_modules
from lit_lora.quantize import QuantizeConfig, found_config
from tests.contract.test_methods import CASES as PLAIN
from tests.contract.test_methods import LOW_RANK, train
from tests.peft import tiny
from tests.peft.tiny import LAYERS, save_base, shake

VOCABULARY = tiny.VOCABULARY
CONFIGS = [QuantizeConfig(block_size=32), QuantizeConfig(name="fp4", double_quant=False), QuantizeConfig(name="int8")]
# Codes have no gradient: whole layers of the decoder cannot train, and LoRA-GA has nothing to start from.
CASES = {**PLAIN, "loftq": {"name": "loftq", "rank": 4}}
ON_CODES = [*(name for name in LOW_RANK if "modules_to_save" not in name and name != "lora-ga"), "loftq"]
every_case = pytest.mark.parametrize("case", ON_CODES)
every_config = pytest.mark.parametrize("config", CONFIGS, ids=str)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that blocks of 64 fit."""
    torch.manual_seed(1)
    model = CausalLM(
        ModelConfig(
            vocab_size=VOCABULARY,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            attention_bias=True,
        )
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.15)
    return save_base(model, tmp_path_factory.mktemp("base") / "base")


def method(case: str) -> peft.Method:
    return peft.methods()[CASES[case]["name"]].model_validate(CASES[case])


def adapted(folder: Path, case: str, config: QuantizeConfig) -> CausalLM:
    return tiny.adapted(load_model(folder, quantize=config), method(case))


def token_ids(case: str) -> torch.Tensor:
    return tiny.token_ids(VOCABULARY + 2 if "tokens" in case else VOCABULARY)


@every_config
@every_case
def test_logits_at_init_are_those_of_the_quantised_base(folder, case, config):
    model = adapted(folder, case, config).eval()
    with torch.no_grad():
        base = load_model(folder, quantize=config)(tiny.token_ids())
        got = model(tiny.token_ids())[..., :VOCABULARY]
        plain = load_model(folder)(tiny.token_ids())
    torch.testing.assert_close(got, base, atol=1e-4, rtol=1e-4)
    assert (base - plain).abs().max() > 1e-3, "not quantised"


@every_config
@every_case
def test_own_parameters_move_and_codes_stay_bit_for_bit(folder, case, config):
    model = adapted(folder, case, config)
    own = {id(p) for m in own_modules(model).values() for n, p in m.named_parameters() if "base_layer" not in n}
    trainable = {id(p) for p in model.parameters() if p.requires_grad}
    assert trainable <= own
    codes = {name: buffer.clone() for name, buffer in model.named_buffers()}
    before = {name: value.clone() for name, value in peft.trainable_state(model).items()}
    ids = torch.arange(VOCABULARY + 2 if "tokens" in case else VOCABULARY).repeat(2)[None]
    train(model, 3, ids)
    assert [name for name, value in peft.trainable_state(model).items() if torch.equal(value, before[name])] == []
    assert all(torch.equal(buffer, codes[name]) for name, buffer in model.named_buffers())
    peft.remove(model)
    with torch.no_grad():
        assert torch.equal(model.eval()(tiny.token_ids()), load_model(folder, quantize=config)(tiny.token_ids()))


@every_config
@every_case
def test_a_saved_adapter_notes_its_base_and_gives_the_same_logits(folder, case, config, tmp_path):
    model = adapted(folder, case, config).eval()
    shake(model)
    peft.save_adapter(model, method(case), tmp_path / "adapter", base=folder)
    noted = peft.quantization_of(tmp_path / "adapter")
    assert noted == config == found_config(model)
    again = load_model(folder, quantize=noted)
    peft.load_adapter(again, tmp_path / "adapter")
    with torch.no_grad():
        assert torch.equal(again.eval()(token_ids(case)), model(token_ids(case)))


def test_the_adapter_knows_its_base_in_16_bits_and_quantised_but_not_another(folder, tmp_path):
    model = adapted(folder, "lora", CONFIGS[0])
    shake(model)
    peft.save_adapter(model, method("lora"), tmp_path / "adapter", base=folder)
    peft.load_adapter(load_model(folder), tmp_path / "adapter")
    with pytest.raises(Exception, match="trained on another base model"):
        peft.load_adapter(load_model(folder, quantize=CONFIGS[1]), tmp_path / "adapter")


def test_the_count_and_the_table_are_those_of_the_full_base(folder):
    quantised, plain = adapted(folder, "lora", CONFIGS[0]), tiny.adapted(load_model(folder), method("lora"))
    assert peft.count_parameters(quantised) == peft.count_parameters(plain)
    assert {row.shape for row in peft.matched_table(quantised)} == {
        f"{shape} nf4-dq, blocks of 32, rank 8" for shape in ("64×64", "32×64", "128×64", "64×128")
    }


@pytest.mark.parametrize("settings", [{"name": "full"}, {"name": "full", "train": ["mlp"]}], ids=str)
def test_full_finetuning_of_codes_is_refused(folder, settings):
    model = load_model(folder, quantize=CONFIGS[0])
    with pytest.raises(UsageError, match=r"the base is quantised \(nf4-dq, blocks of 32\)"):
        peft.methods()["full"].model_validate(settings).apply(model)


def test_whole_layers_of_codes_are_refused(folder):
    with pytest.raises(UsageError, match=r"peft.modules_to_save: model.layers.0.mlp.gate_proj is quantised"):
        adapted(folder, "lora modules_to_save", CONFIGS[0])
