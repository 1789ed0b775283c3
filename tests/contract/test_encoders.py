"""The contract of methods on encoders and encoder-decoders of transformers, each with its head."""

from __future__ import annotations

import copy
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lit_lora import peft
from lit_lora.classify import Task, head_of
from lit_lora.errors import InputError, UsageError
from lit_lora.peft.core.matching import matches
from lit_lora.peft.core.modules import model_updates, own_modules
from tests.classify.tiny import CONFIGS, FAMILIES, SEQ2SEQ, inputs, make_model
from tests.peft.tiny import shake

METHODS = {
    "lora": {"name": "lora", "rank": 4},
    "lora q,v": {"name": "lora", "rank": 4, "target_modules": "q,v", "dropout": 0.1},
    "lora embedding": {
        "name": "lora",
        "rank": 2,
        "target_modules": ["*word_embeddings", "tok_embeddings", "query", "query_proj", "q_lin", "Wqkv"],
    },
    "pissa": {"name": "lora", "rank": 4, "init": "pissa"},
    "dora": {"name": "dora", "rank": 4},
    "multilora": {"name": "multilora", "rank": 2},
    "vera": {"name": "vera", "rank": 24},
    "tied": {"name": "tied-lora", "rank": 4},
    "glora": {"name": "glora"},
    "ia3": {"name": "ia3"},
    "bitfit": {"name": "bitfit"},
    "houlsby": {"name": "houlsby", "bottleneck": 4, "init_zero": True},
    "lin": {"name": "lin", "bottleneck": 4, "task_embedding": False},
    "parallel": {"name": "parallel", "bottleneck": 4},
    "composed": {
        "name": "composed",
        "methods": [{"name": "lora", "rank": 4, "target_modules": "q,v"}, {"name": "lin", "task_embedding": False}],
    },
    "full": {"name": "full"},
    "full head": {"name": "full", "train": []},
}
NOT_FOR = {
    "bitfit": {"t5", "flan-t5", "modernbert"},  # have no bias
    # whose MLP is not one module
    "parallel": {"bert", "roberta", "deberta-v2", "electra", "xlm-roberta", "bart", "mbart", "nllb", "pegasus"},
    "full head": set(SEQ2SEQ),  # whose head is that of the checkpoint
    "lora embedding": set(SEQ2SEQ),  # shared by encoder, decoder and head
}
NEAR = {"pissa", "lin", "composed"}  # start at a product that is taken off again, or at small adapters
PARTLY_FROZEN = {"pissa", "vera"}
# What depends on the names of parts is tested by default on each table of names; the rest of the product is slow.
BY_NAME = {(family, case) for family in ("bart", "distilbert", "modernbert") for case in ("lora q,v", "ia3", "houlsby")}
CASES = [(family, case) for case in METHODS for family in CONFIGS if family not in NOT_FOR.get(case, ())]
WITH_OWN = [(family, case) for family, case in CASES if not case.startswith("full")]
LOW_RANK = [(f, c) for f, c in WITH_OWN if peft.METHODS[str(METHODS[c]["name"])][0] == "mergeable"]


def each(cases):
    parameters = [
        pytest.param(
            family,
            case,
            id=f"{family}-{case}",
            marks=[] if family in FAMILIES or (family, case) in BY_NAME else [pytest.mark.slow],
        )
        for family, case in cases
    ]
    return pytest.mark.parametrize(("family", "case"), parameters)


@lru_cache
def original(family: str, seed: int = 0) -> nn.Module:
    return make_model(family, seed=seed)


def base(family: str) -> nn.Module:
    return copy.deepcopy(original(family))


def head(family: str, model: nn.Module) -> list[str]:
    return head_of(model, [], Task("seq2seq") if family in SEQ2SEQ else Task("classification", ("no", "yes")))


def method(family: str, case: str, model: nn.Module) -> peft.Method:
    settings = dict(METHODS[case])
    if case == "lora embedding":  # each of the names is of one family or another
        known = [name for name, _ in model.named_modules()]
        names = settings["target_modules"]
        settings["target_modules"] = [n for n in names if any(matches(n, other) for other in known)]
    config = peft.methods()[settings["name"]].model_validate(settings)
    return peft.with_modules_to_save(config, head(family, model))


def adapted(family: str, case: str, model: nn.Module | None = None) -> tuple[nn.Module, peft.Method]:
    model = base(family) if model is None else model
    peft.freeze(model)
    torch.manual_seed(2)
    config = method(family, case, model)
    config.apply(model)
    return model, config


def logits(family: str, model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**inputs(family)).logits


def train(family: str, model: nn.Module, steps: int, lr: float = 1e-2) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
    losses = []
    model.train()
    for _ in range(steps):
        found = model(**inputs(family)).logits
        targets = torch.tensor([[5, 7, 2], [9, 4, 2]]).flatten() if family in SEQ2SEQ else torch.tensor([0, 1])
        loss = F.cross_entropy(found.flatten(0, -2), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def own_parameters(model: nn.Module) -> dict[int, str]:
    modules = own_modules(model).items()
    return {id(p): f"{name}.{n}" for name, m in modules for n, p in m.named_parameters() if "base_layer" not in n}


@each(CASES)
def test_nothing_changes_at_first(family, case):
    expected, got = logits(family, base(family)), logits(family, adapted(family, case)[0])
    if case in NEAR:
        torch.testing.assert_close(got, expected, atol=0.05, rtol=0.05)
    else:
        torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-6)


@each(WITH_OWN)
def test_only_own_parameters_train_with_the_head_among_them_and_each_moves(family, case):
    model, _ = adapted(family, case)
    own = own_parameters(model)
    training = {id(p) for p in model.parameters() if p.requires_grad}
    assert training < own.keys() if case in PARTLY_FROZEN else training == own.keys()
    for root in head(family, model):
        whole = {name for name, _ in original(family).get_submodule(root).named_parameters(prefix=root)}
        assert {name.replace(".trained.", ".") for name in own.values() if name.startswith(f"{root}.")} == whole
    logits(family, model)
    before = {name: value.clone() for name, value in peft.trainable_state(model).items()}
    train(family, model, 3)
    stuck = [name for name, value in peft.trainable_state(model).items() if torch.equal(value, before[name])]
    # softmax knows no constant added to every key: such biases have no gradient, in exact arithmetic
    assert [name for name in stuck if "key" not in name] == []


@each(WITH_OWN)
def test_the_base_is_bit_identical_after_training(family, case):
    model, _ = adapted(family, case)
    train(family, model, 3)
    peft.remove(model)
    assert model.state_dict().keys() == original(family).state_dict().keys()
    for name, value in original(family).state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    assert torch.equal(logits(family, model), logits(family, base(family)))


@each(LOW_RANK)
def test_merged_weights_give_the_same_logits(family, case):
    model, _ = adapted(family, case)
    shake(model, 0.1)
    expected = logits(family, model)
    updates = model_updates(model)
    peft.remove(model)
    tensors = peft.base_tensors(model)
    state = {name: update.apply(tensors[name], 0, update.rows(len(tensors[name]))) for name, update in updates.items()}
    model.load_state_dict(state, strict=False)
    assert state
    torch.testing.assert_close(logits(family, model), expected, atol=2e-5, rtol=2e-5)


@each(WITH_OWN)
def test_saved_and_loaded_on_a_base_with_another_random_head_it_gives_the_same_logits(family, case, tmp_path):
    model, config = adapted(family, case)
    shake(model, 0.1)
    peft.save_adapter(model, config, tmp_path / "adapter", base="some/base", task={"kind": "x"}, task_type="SEQ_CLS")
    fresh = base(family)
    for root in head(family, fresh):
        for parameter in fresh.get_submodule(root).parameters():
            nn.init.normal_(parameter)
    report = peft.load_adapter(fresh, tmp_path / "adapter")
    assert report.adapter.task == {"kind": "x"}
    torch.testing.assert_close(logits(family, fresh), logits(family, model), atol=1e-6, rtol=1e-6)
    peft.save_adapter(fresh, report.adapter.config, tmp_path / "again", base="some/base", task_type="SEQ_CLS")
    first, second = (tmp_path / name / "adapter_model.safetensors" for name in ("adapter", "again"))
    assert first.read_bytes() == second.read_bytes()


@each([("bert", "lora"), ("deberta-v2", "houlsby"), ("t5", "ia3")])
def test_an_adapter_is_not_put_on_another_base(family, case, tmp_path):
    model, config = adapted(family, case)
    shake(model, 0.1)
    peft.save_adapter(model, config, tmp_path / "adapter", base="some/base")
    with pytest.raises(InputError, match="trained on another base model"):
        peft.load_adapter(make_model(family, seed=1), tmp_path / "adapter")


@each(CASES)
def test_a_fixed_batch_is_learnt(family, case):
    model, _ = adapted(family, case)
    losses = train(family, model, 40, lr=2e-2)
    assert losses[-1] < (0.95 if family in SEQ2SEQ else 0.6) * losses[0]  # T5's tied head starts far from any token


def test_a_method_that_cannot_train_a_head_says_so(tmp_path: Path):
    model = base("bert")
    config = peft.methods()["prompt"]()
    with pytest.raises(UsageError, match="trains only its own modules, but classifier must"):
        peft.with_modules_to_save(config, head("bert", model))
