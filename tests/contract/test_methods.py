"""What every finetuning method must hold, over the table of methods and the settings that change how each works."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn import functional as F

from lit_lora import peft
from lit_lora.model import CausalLM
from lit_lora.peft.core.modules import model_updates, own_modules
from lit_lora.peft.files.load import check_base
from tests.contract.added_cases import ADDED, EXACT, FEW, FOLDED, NEAR
from tests.peft import tiny
from tests.peft.tiny import LAYERS, VOCABULARY, make_model, shake, token_ids

CASES = {
    "lora": {"name": "lora"},
    "lora q,v": {"name": "lora", "target_modules": "q,v", "rank": 3, "alpha": 5.0},
    "lora patterns": {
        "name": "lora",
        "rank_pattern": {"layers.1.*.v_proj": 2, "down_proj": 5},
        "alpha_pattern": {"v_proj": 4.0},
        "layers": [1],
        "exclude_modules": ["gate_proj"],
    },
    "rslora gaussian": {"name": "lora", "use_rslora": True, "rank": 4, "init": "gaussian"},
    "pissa": {"name": "lora", "init": "pissa", "rank": 4},
    "olora": {"name": "lora", "init": "olora", "rank": 3, "use_rslora": True},
    "eva": {"name": "lora", "init": "eva", "rank": 2},
    "lora-ga": {"name": "lora", "init": "lora-ga", "rank": 3},
    "lora+": {"name": "lora", "loraplus_lr_ratio": 16.0},
    "lora-fa": {"name": "lora", "freeze_A": True},
    "lora bias all": {"name": "lora", "target_modules": "q,v", "bias": "all"},
    "lora bias lora_only": {"name": "lora", "bias": "lora_only"},
    "lora embedding and head": {"name": "lora", "target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "lora modules_to_save": {"name": "lora", "modules_to_save": ["lm_head", "model.norm", "layers.0.mlp"]},
    "lora tokens": {"name": "lora", "trainable_tokens": [3, VOCABULARY, VOCABULARY + 1]},
    **ADDED,
    "dora": {"name": "dora"},
    "dora q,v bias": {"name": "dora", "target_modules": "q,v", "rank": 3, "use_rslora": True, "bias": "lora_only"},
    "multilora": {"name": "multilora", "rank": 2},
    "longlora": {"name": "longlora", "factor": 1, "group": 4},
    "vera": {"name": "vera", "rank": 24},
    "tied": {"name": "tied-lora", "rank": 4},
    "tied A, B": {"name": "tied-lora", "rank": 4, "train": ["A", "B"]},
    "tied v": {"name": "tied-lora", "rank": 8, "train": ["v"]},
    "tied u, v": {"name": "tied-lora", "rank": 8, "train": ["u", "v"]},
    "ia3": {"name": "ia3"},
    "ia3 all": {"name": "ia3", "target_modules": "all-linear", "modules_to_save": ["lm_head"]},
    "bitfit": {"name": "bitfit"},
    "glora": {"name": "glora"},
    "glora bias": {"name": "glora", "C": "lora", "D": "constant", "E": "constant"},
    "glora vectors": {"name": "glora", "A": "vector", "B": "constant", "C": "vector", "D": "vector", "E": "vector"},
    "glora mixed": {
        "name": "glora",
        "forms_pattern": {"q_proj": {"A": "none"}, "mlp.*": {"A": "constant", "B": "vector"}, "v_proj": {"B": "none"}},
    },
    "full": {"name": "full"},
    "full part": {"name": "full", "train": ["layers.1", "lm_head"]},
}
LOW_RANK = [name for name, settings in CASES.items() if peft.METHODS[settings["name"]][0] == "mergeable"]


KINDS = ("mergeable", "quantized", "added", "full")


def method(case: str) -> peft.Method:
    settings = CASES[case]
    return peft.methods()[settings["name"]].model_validate(settings)


def adapted(case: str, tied: bool = False, dtype: torch.dtype = torch.float32) -> CausalLM:
    return tiny.adapted(make_model(tied, dtype), method(case))


def train(model: CausalLM, steps: int, ids: torch.Tensor, lr: float = 1e-2) -> list[float]:
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
    losses = []
    for _ in range(steps):
        loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1).float(), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


# What trains is not all that is theirs: the file has more than it, or it trains on as another method.
PARTLY_FROZEN = {"pissa", "olora", "lora-ga", "lora-fa", "vera", "tied A, B", "tied v", "tied u, v"}
# They start at a product of the weight's own, or its gradient's, which is taken off again.
BY_WEIGHT = {"pissa", "olora", "lora-ga"}
# Written as a LoRA that does the same.
WRITTEN_AS_LORA = {"multilora"}


def own_parameters(model: CausalLM) -> dict[int, torch.nn.Parameter]:
    """All that the adapter consists of, by identity."""
    modules = own_modules(model).values()
    return {id(p): p for m in modules for n, p in m.named_parameters() if "base_layer" not in n}


both_ties = pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
every_case = pytest.mark.parametrize("case", CASES)
WITH_OWN = [*LOW_RANK, *ADDED]
every_case_with_own_modules = pytest.mark.parametrize("case", WITH_OWN)
every_low_rank_case = pytest.mark.parametrize("case", LOW_RANK)


def test_every_method_of_the_table_has_a_case():
    for_other_models = {"residual", *peft.methods("quantized")}  # tests/peft/test_residual.py, test_quantized_base.py
    assert {settings["name"] for settings in CASES.values()} | for_other_models == set(peft.METHODS)
    assert set().union(*(peft.methods(kind) for kind in KINDS)) == peft.METHODS.keys()
    for name, (kind, _) in peft.METHODS.items():
        settings = peft.methods()[name]
        assert settings.kind == kind
        assert settings().name == name
        assert settings.model_validate(settings().model_dump()) == settings()


@pytest.mark.parametrize("training", [False, True])
@every_case
def test_applying_a_method_leaves_the_mode_of_every_module_as_it_was(case, training):
    model = make_model().train(training)
    method(case).apply(model)
    assert {module.training for module in model.modules()} == {training}


@both_ties
@every_case
def test_logits_at_init_are_those_of_the_base_bit_for_bit(case, tied):
    model = adapted(case, tied).eval()
    with torch.no_grad():
        expected, got = make_model(tied).eval()(token_ids()), model(token_ids())
    if "tokens" in case:  # their columns are a product of their own, so not the same bits
        torch.testing.assert_close(got[..., :VOCABULARY], expected, atol=1e-5, rtol=1e-5)
        other = [token for token in range(VOCABULARY) if token != 3]
        assert torch.equal(got[..., other], expected[..., other])
    elif case in BY_WEIGHT:
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    elif case in NEAR:
        torch.testing.assert_close(got, expected, atol=0.05, rtol=0.05)
    elif case in ADDED and case not in EXACT:
        assert not torch.allclose(got, expected, atol=0.05)  # it says so: what comes before has its effect at once
    else:
        assert torch.equal(got, expected)


@both_ties
@every_case_with_own_modules
def test_only_own_parameters_require_a_gradient_and_are_float32(case, tied):
    model = adapted(case, tied, torch.bfloat16)
    own = own_parameters(model)
    training = {id(p) for p in model.parameters() if p.requires_grad}
    assert training < own.keys() if case in PARTLY_FROZEN else training == own.keys()
    assert {p.dtype for p in own.values()} == {torch.float32}
    assert {p.dtype for p in model.parameters() if id(p) not in own} == {torch.bfloat16}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@both_ties
@every_case
def test_every_own_parameter_moves_within_three_steps_after_a_validation_pass(case, tied, dtype):
    model = adapted(case, tied, dtype)
    high = VOCABULARY + 2 if "tokens" in case else VOCABULARY
    ids = torch.arange(high).repeat(2)[None, :]  # every token, so that every embedding row is seen
    with torch.no_grad():
        model.eval()(ids)
    before = {name: value.clone() for name, value in peft.trainable_state(model).items()}
    train(model, 3, ids)
    stuck = [name for name, value in peft.trainable_state(model).items() if torch.equal(value, before[name])]
    assert not stuck
    assert before


@both_ties
@every_case_with_own_modules
def test_base_is_bit_identical_after_training_and_comes_back_when_the_adapter_is_taken_out(case, tied):
    original = make_model(tied)
    model = adapted(case, tied)
    train(model, 3, token_ids())
    base = peft.base_tensors(model)
    assert base.keys() == peft.base_tensors(original).keys()
    assert all(torch.equal(base[name], value) for name, value in peft.base_tensors(original).items())
    peft.remove(model)
    assert torch.equal(model.eval()(token_ids()), original.eval()(token_ids()))


def test_parts_of_full_finetuning_that_were_not_named_stay_bit_identical():
    model = adapted("full part")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    train(model, 3, token_ids())
    for name, value in model.state_dict().items():
        named = "layers.1." in name or name == "lm_head.weight"
        assert torch.equal(value, before[name]) != named, name


@both_ties
@every_low_rank_case
def test_merged_weights_give_the_same_logits(case, tied):
    model = adapted(case, tied).double().eval()
    shake(model)
    ids = token_ids(VOCABULARY + 2 if "tokens" in case else VOCABULARY)
    with torch.no_grad():
        expected = model(ids)
        updates = model_updates(model)
        peft.remove(model)
        base = {name: value.clone() for name, value in peft.base_tensors(model).items()}
        for name, update in updates.items():
            weight = base[name]
            merged = update.apply(weight, 0, update.rows(weight.shape[0]))
            pieces = [update.apply(weight, row, row + 1) for row in range(update.rows(weight.shape[0]))]
            torch.testing.assert_close(torch.cat(pieces), merged, atol=1e-6, rtol=1e-6)
            module, _, last = name.rpartition(".")
            setattr(model.get_submodule(module), last, torch.nn.Parameter(merged.double()))
        torch.testing.assert_close(model(ids), expected, atol=2e-5, rtol=2e-5)


@both_ties
@every_case_with_own_modules
def test_saved_and_loaded_adapter_gives_the_same_logits(case, tied, tmp_path):
    model = adapted(case, tied).eval()
    shake(model)
    ids = token_ids(VOCABULARY + 2 if "tokens" in case else VOCABULARY)
    config = method(case)
    peft.save_adapter(model, config, tmp_path / "adapter", base="some/base")
    fresh = make_model(tied).eval()
    report = peft.load_adapter(fresh, tmp_path / "adapter")
    with torch.no_grad():
        expected, got = model(ids), fresh(ids)
        if case in FOLDED:  # an LSTM's bits depend on how it is called
            torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
        else:
            assert torch.equal(got, expected)
    assert report.norm > 0
    if case not in FOLDED | WRITTEN_AS_LORA:
        assert peft.trainable_state(fresh).keys() >= peft.trainable_state(model).keys()
        assert case in PARTLY_FROZEN or len(peft.trainable_state(fresh)) == len(peft.trainable_state(model))
    # and what was loaded can be written again
    peft.save_adapter(fresh, report.adapter.config, tmp_path / "again", base="some/base")
    first, second = (tmp_path / name / "adapter_model.safetensors" for name in ("adapter", "again"))
    assert first.read_bytes() == second.read_bytes()


@both_ties
@every_low_rank_case
def test_adapter_file_holds_the_trained_tensors_and_little_else(case, tied, tmp_path):
    model = adapted(case, tied)
    peft.save_adapter(model, method(case), tmp_path / "adapter", base="some/base")
    size = (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size
    own = [p for n, p in model.named_parameters() if id(p) in own_parameters(model) and not n.endswith(".scales")]
    count = sum(parameter.numel() for parameter in own)
    assert 4 * count < size < 4 * count + 20_000
    adapter = peft.read_adapter(tmp_path / "adapter")
    own = own[::2] if case in BY_WEIGHT else own  # the factors and their start lie side by side
    assert sum(not name.endswith(".zeros") for name in adapter.values) == len(own)  # PEFT's, for absent terms
    updates = check_base(adapter, peft.base_tensors(make_model(tied)), make_model(tied))
    assert updates.keys() == model_updates(model).keys()


@pytest.mark.parametrize("rank", [1, 8])
def test_count_is_rank_times_in_plus_out(rank):
    model = make_model()
    peft.freeze(model)
    peft.methods()["lora"].model_validate({"name": "lora", "rank": rank}).apply(model)
    linears = [(16, 16), (8, 16), (8, 16), (16, 16), (24, 16), (24, 16), (16, 24)]
    expected = LAYERS * rank * sum(out + wide for out, wide in linears)
    assert peft.count_parameters(model).trainable == expected
    table = peft.matched_table(model)
    assert sum(row.trainable for row in table) == expected
    assert (table[0].pattern, table[0].count) == ("model.layers.*.self_attn.q_proj", LAYERS)
    assert {row.count for row in table} == {LAYERS}


@every_case
def test_a_fixed_batch_is_learnt(case):
    model = adapted(case)
    losses = train(model, 60, token_ids(), lr=2e-2)
    assert losses[-1] < (0.87 if case in FEW else 0.7 if case == "bitfit" else 0.6) * losses[0]


def test_kinds_partition_the_table():
    kinds = [set(peft.methods(kind)) for kind in KINDS]
    assert all(a.isdisjoint(b) for a, b in itertools.combinations(kinds, 2))


def test_dora_follows_its_factors_under_a_fused_optimizer_that_counts_no_versions():
    model = adapted("dora")
    shake(model)
    ids = token_ids()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, fused=True)
    for _ in range(2):
        model(ids).float().logsumexp(-1).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    fresh = adapted("dora")
    fresh.load_state_dict(model.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(ids), fresh.eval()(ids))
