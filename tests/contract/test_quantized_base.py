"""What every low-rank method must hold over a quantized base."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from lit_lora import peft
from lit_lora.checkpoint import load_model
from lit_lora.errors import UsageError
from lit_lora.model import CausalLM, KVCache, ModelConfig
from lit_lora.peft.core.modules import own_modules
from lit_lora.quantize import QuantizeConfig, found_config
from tests.contract.test_low_rank import Stop, stop
from tests.contract.test_methods import CASES as PLAIN
from tests.contract.test_methods import LOW_RANK, PARTLY_FROZEN, own_parameters, train
from tests.peft import tiny
from tests.peft.tiny import LAYERS, save_base, shake
from tests.train.tiny_run import losses, make_rows, same, stored
from tests.train.tiny_run import train as fit

VOCABULARY = tiny.VOCABULARY
CONFIGS = [QuantizeConfig(block_size=32), QuantizeConfig(name="fp4", double_quant=False), QuantizeConfig(name="int8")]
ON_GROUPS = {
    "qa-lora": {"name": "qa-lora", "rank": 2},
    "qa-lora groups": {"name": "qa-lora", "rank": 1, "group_size": 64},
}
OTHERS = {"loftq": {"name": "loftq", "rank": 4}, "lq-lora": {"name": "lq-lora", "rank": 4}}
CASES = {**PLAIN, **OTHERS, **ON_GROUPS}
# Codes have no gradient: whole layers of the decoder cannot train, and LoRA-GA has nothing to start from.
ON_CODES = [*(name for name in LOW_RANK if "modules_to_save" not in name and name != "lora-ga"), *OTHERS]
GROUPS = [QuantizeConfig(name="int4", block_size=32), QuantizeConfig(name="int2", block_size=32)]
PAIRS = [*itertools.product(ON_CODES, CONFIGS), *itertools.product(ON_GROUPS, GROUPS), ("lora", GROUPS[0])]
every_pair = pytest.mark.parametrize(("case", "config"), PAIRS, ids=str)
ONE_EACH = [*itertools.product(ON_CODES, CONFIGS[:1]), *itertools.product(ON_GROUPS, GROUPS[:1])]
every_case = pytest.mark.parametrize(("case", "config"), ONE_EACH, ids=str)


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


# Few numbers train.
MERE_VECTORS = {"ia3", "bitfit", "vera", "tied v", "glora vectors"}


def method(case: str) -> peft.Method:
    return peft.methods()[CASES[case]["name"]].model_validate(CASES[case])


def adapted(folder: Path, case: str, config: QuantizeConfig) -> CausalLM:
    return tiny.adapted(load_model(folder, quantize=config), method(case))


def token_ids(case: str) -> torch.Tensor:
    return tiny.token_ids(VOCABULARY + 2 if "tokens" in case else VOCABULARY)


@every_pair
def test_logits_at_init_are_those_of_the_quantized_base(folder, case, config):
    model = adapted(folder, case, config).eval()
    with torch.no_grad():
        base = load_model(folder, quantize=config)(tiny.token_ids())
        got = model(tiny.token_ids())[..., :VOCABULARY]
        plain = load_model(folder)(tiny.token_ids())
    torch.testing.assert_close(got, base, atol=1e-4, rtol=1e-4)
    assert (base - plain).abs().max() > 1e-3, "not quantized"


@every_pair
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


@every_pair
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


def test_every_method_for_a_quantized_base_has_a_case():
    assert {CASES[case]["name"] for case in (*OTHERS, *ON_GROUPS)} == set(peft.methods("quantized"))


@every_case
def test_only_own_parameters_require_a_gradient_and_are_float32(folder, case, config):
    model = tiny.adapted(load_model(folder, dtype=torch.bfloat16, quantize=config), method(case))
    own = own_parameters(model)
    training = {id(p) for p in model.parameters() if p.requires_grad}
    assert training < own.keys() if case in PARTLY_FROZEN else training == own.keys()
    assert {p.dtype for p in own.values()} == {torch.float32}
    assert {p.dtype for p in model.parameters() if id(p) not in own} == {torch.bfloat16}


@every_case
def test_a_fixed_batch_is_learnt(folder, case, config):
    losses = train(adapted(folder, case, config), 60, tiny.token_ids(), lr=2e-2)
    assert losses[-1] < (0.9 if case in MERE_VECTORS else 0.6) * losses[0]


@every_case
def test_decoding_with_a_cache_is_the_full_pass(folder, case, config):
    model, ids = adapted(folder, case, config), torch.tensor([[5, 3, 7, 8, 9]])
    shake(model, 0.05)
    with torch.no_grad():
        expected = model.eval()(ids)[:, -1:]
        cache = KVCache(1, 8)
        model(ids[:, :-1], cache=cache)
        torch.testing.assert_close(model(ids[:, -1:], cache=cache), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("what", ["selective", "full"])
@every_case
def test_checkpointed_activations_give_the_same_gradients(folder, case, config, what):
    gradients = []
    for checkpointing in ("none", what):
        model = adapted(folder, case, config).train()
        shake(model, 0.05)
        model.checkpoint_activations(checkpointing)
        torch.manual_seed(5)
        model(torch.tensor([[3, 4, 5, 6, 7, 8]]), lengths=[2, 4]).square().mean(-1).sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    plain, again = gradients
    assert all(gradient is not None and torch.equal(again[name], gradient) for name, gradient in plain.items())


RANKS = {"lora": 32, "dora": 32, "loftq": 32, "lq-lora": 32, "qa-lora": 2}
"""32: tensors that are large enough for moments in 8 bits."""


@pytest.mark.parametrize("name", RANKS)
def test_a_resumed_run_with_8_bit_moments_is_the_whole_run_bit_for_bit(folder, name, tmp_path):
    config = GROUPS[0] if name == "qa-lora" else CONFIGS[0]
    chosen = peft.methods()[name].model_validate({"rank": RANKS[name]})

    def run(where: str, **settings: object) -> None:
        model = tiny.adapted(load_model(folder, quantize=config), chosen)
        rows = {"validation": make_rows(3, seed=9), "eval_every": 2, "optimizer": {"name": "adamw8bit", "lr": 1e-3}}
        fit(model, tmp_path / where, max_steps=4, **rows, **settings)

    run("whole")
    with pytest.raises(Stop):
        run("parts", sample=stop)
    run("parts", resume=True)
    assert same(stored(tmp_path / "parts", 4), stored(tmp_path / "whole", 4))
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    in_eight_bits = any(tensor.dtype == torch.uint8 for tensor in stored(tmp_path / "whole", 4).values())
    assert in_eight_bits == (name != "qa-lora")  # whose tensors are too small


def test_the_adapter_knows_its_base_in_16_bits_and_quantized_but_not_another(folder, tmp_path):
    model = adapted(folder, "lora", CONFIGS[0])
    shake(model)
    peft.save_adapter(model, method("lora"), tmp_path / "adapter", base=folder)
    peft.load_adapter(load_model(folder), tmp_path / "adapter")
    with pytest.raises(Exception, match="trained on another base model"):
        peft.load_adapter(load_model(folder, quantize=CONFIGS[1]), tmp_path / "adapter")


def test_the_count_and_the_table_are_those_of_the_full_base(folder):
    quantized, plain = adapted(folder, "lora", CONFIGS[0]), tiny.adapted(load_model(folder), method("lora"))
    assert peft.count_parameters(quantized) == peft.count_parameters(plain)
    assert {row.shape for row in peft.matched_table(quantized)} == {
        f"{shape} nf4-dq, blocks of 32, rank 8" for shape in ("64×64", "32×64", "128×64", "64×128")
    }


@pytest.mark.parametrize("settings", [{"name": "full"}, {"name": "full", "train": ["mlp"]}], ids=str)
def test_full_finetuning_of_codes_is_refused(folder, settings):
    model = load_model(folder, quantize=CONFIGS[0])
    with pytest.raises(UsageError, match=r"the base is quantized \(nf4-dq, blocks of 32\)"):
        peft.methods()["full"].model_validate(settings).apply(model)


def test_whole_layers_of_codes_are_refused(folder):
    with pytest.raises(UsageError, match=r"peft.modules_to_save: model.layers.0.mlp.gate_proj is quantized"):
        adapted(folder, "lora modules_to_save", CONFIGS[0])
