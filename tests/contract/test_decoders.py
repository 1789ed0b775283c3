"""The contract of methods on decoders of many families, our own and those of transformers.

A method that the parts of a family do not allow is refused in one line; all others hold every property. What the
families do not change is tested on a Llama: ``test_methods.py``, ``test_low_rank.py``, ``test_added.py``.
"""

from __future__ import annotations

import copy
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch

from lit_lora import peft
from lit_lora.checkpoint.load import load_model
from lit_lora.data.batches import collate
from lit_lora.data.rows import Rows
from lit_lora.errors import UsageError
from lit_lora.generate import Sampling, generate
from lit_lora.peft.core.modules import model_updates, own_modules
from lit_lora.quantize import QuantizeConfig
from lit_lora.train.loss import backward
from tests.families import tiny_configs
from tests.families.opened import SHARED, documents
from tests.peft.tiny import put_on, shake
from tests.tiny import gradients_of

OWN = ("llama", "qwen3", "gemma3_text", "phi3", "olmo2", "qwen3_moe")
OWN_ATTENTION = ("gpt2", "gpt_neox", "gpt_oss")
PADDED = ("falcon", "mpt", "qwen3_5_text")
HOSTED = (*OWN_ATTENTION, *PADDED)
FAMILIES = (*OWN, *HOSTED)
VOCABULARY = tiny_configs.VOCABULARY

# Where an activation has a kink, rounding may change a gradient.
SMOOTH = {"name": "parallel", "bottleneck": 4, "activation": "gelu"}
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"name": "lora", "rank": 4},
    "lora q,v": {"name": "lora", "rank": 4, "target_modules": "q,v"},
    "lora embedding and norm": {"name": "lora", "rank": 2, "target_modules": ["{embedding}", "{query}"]}
    | {"modules_to_save": ["{norm}"]},
    "lora tokens": {"name": "lora", "rank": 2, "trainable_tokens": [3, VOCABULARY, VOCABULARY + 1]},
    "lora experts": {"name": "lora", "rank": 2, "target_parameters": ["experts.*_proj"]},
    "pissa": {"name": "lora", "rank": 4, "init": "pissa"},
    "eva": {"name": "lora", "rank": 2, "init": "eva"},
    "dora": {"name": "dora", "rank": 4},
    "multilora": {"name": "multilora", "rank": 2},
    "longlora": {"name": "longlora", "rank": 2, "factor": 1, "group": 4},
    "vera": {"name": "vera", "rank": 24},
    "tied": {"name": "tied-lora", "rank": 4},
    "glora": {"name": "glora"},
    "ia3": {"name": "ia3"},
    "bitfit": {"name": "bitfit"},
    "houlsby": {"name": "houlsby", "bottleneck": 4, "init_zero": True},
    "parallel": SMOOTH,
    "lin": {"name": "lin", "bottleneck": 4, "init_zero": True},
    "prefix": {"name": "prefix", "num_virtual_tokens": 3, "init_text": [4, 8, 15]},
    "prompt": {"name": "prompt", "num_virtual_tokens": 3, "init": "random"},
    "llama-adapter": {"name": "llama-adapter", "adapter_len": 3, "adapter_layers": 2},
    "composed": {"name": "composed", "methods": [{"name": "lora", "rank": 2}, SMOOTH]},
    "full": {"name": "full"},
}
WITHOUT_BIAS = ("llama", "qwen3", "gemma3_text", "phi3", "olmo2", "qwen3_moe", "mpt", "qwen3_5_text")
REFUSED = {
    "lora experts": set(FAMILIES) - {"qwen3_moe", "gpt_oss"},  # whose layers are mixtures of experts
    "longlora": set(HOSTED),
    "ia3": {"qwen3_moe", "gpt_oss"},  # whose MLPs have no linear layer
    "bitfit": set(WITHOUT_BIAS),
    "prefix": set(PADDED),
    "prompt": set(PADDED),
    "llama-adapter": set(HOSTED),
}
ON_CODES = ("lora", "dora", "vera", "ia3", "houlsby", "lin")
AT_ONCE = {"prefix", "prompt"}  # tokens before every document have their effect at once
# start at a product that is taken off again, add columns to one, or compute experts in another order
NEAR = {"pissa", "lora tokens", "lora experts"}
PARTLY_FROZEN = {"pissa", "vera"}
FEW = {"ia3", "bitfit", "vera", "prefix", "prompt", "llama-adapter"}  # train few numbers
# By default, what depends on the names of parts is tried on every family, and GPT-2 has most of the contract: it is
# hosted, and unlike a Llama in all its parts. The rest of the product is slow.
BY_NAME = {"lora q,v", "ia3", "houlsby"}
AS_ON_A_LLAMA = {"pissa", "eva", "multilora", "vera", "tied", "glora", "composed"}

ALL = [(family, case) for case in METHODS for family in FAMILIES]
CASES = [(family, case) for family, case in ALL if family not in REFUSED.get(case, ())]
WITH_OWN = [(family, case) for family, case in CASES if case != "full"]
MERGEABLE = [(f, c) for f, c in WITH_OWN if peft.METHODS[str(METHODS[c]["name"])][0] == "mergeable"]


def each(cases, *, by_name=False):
    """The pairs, all but some of them slow.

    Args:
        cases: Family and case each.
        by_name: Try each family by default, with the methods that look for parts by name.
    """
    parameters = []
    for family, case in cases:
        fast = (by_name and case in BY_NAME) or (family == "gpt2" and case not in AS_ON_A_LLAMA)
        marks = [] if fast else [pytest.mark.slow]
        parameters.append(pytest.param(family, case, id=f"{family}-{case}", marks=marks))
    return pytest.mark.parametrize(("family", "case"), parameters)


@lru_cache
def original(family: str, *, quantized: bool) -> Any:
    """The model as it is opened from its checkpoint; not to be changed."""
    torch.manual_seed(0)  # some parts start from random values
    with TemporaryDirectory() as folder:
        tiny_configs.save(family, Path(folder))
        model = load_model(Path(folder), quantize=QuantizeConfig(name="int8") if quantized else None)
        return copy.deepcopy(model)  # not pages of the files


def base(family: str, *, quantized: bool = False) -> Any:
    return copy.deepcopy(original(family, quantized=quantized))


def method(family: str, case: str) -> peft.Method:
    names = base(family).config.names
    settings = dict(METHODS[case])
    for key in ("target_modules", "modules_to_save"):
        if isinstance(settings.get(key), list):
            settings[key] = [pattern.format(**vars(names)) for pattern in settings[key]]
    return peft.methods()[settings["name"]].model_validate(settings)


def adapted(family: str, case: str, *, quantized: bool = False) -> tuple[Any, peft.Method]:
    model = base(family, quantized=quantized)
    peft.freeze(model)
    torch.manual_seed(2)
    return model, put_on(model, method(family, case))


def shaken(family: str, case: str) -> tuple[Any, peft.Method]:
    """With a method that has an effect."""
    model, config = adapted(family, case)
    shake(model, 0.05)
    return model, config


def token_rows(case: str) -> Rows:
    """The documents, whose targets begin behind what they share; with the new tokens, where there are some."""
    rows = []
    for document in documents():
        ids = document.tolist() + ([VOCABULARY, VOCABULARY + 1, 3] * 2 if "tokens" in case else [])
        rows.append((ids, [place > SHARED for place in range(len(ids))]))
    return Rows.from_tokens(rows)


@torch.no_grad()
def logits(model: Any, ids: list[int] | None = None) -> torch.Tensor:
    """(T, V) of one document."""
    tokens = documents()[2] if ids is None else torch.tensor(ids)
    found: torch.Tensor = model.logits(model.hidden_states(tokens[None]))[0]
    return found


def gradients(model: Any, case: str, places: list[int], shared_prefix: int = 0) -> tuple[float, dict[str, Any]]:
    model.zero_grad()
    torch.manual_seed(0)
    loss = float(backward(model, collate(token_rows(case), places, shared_prefix), 1.0))
    return loss, gradients_of(model)


def train(model: Any, case: str, steps: int, lr: float = 1e-2) -> list[float]:
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
    batch = collate(token_rows(case), [0, 1, 2])
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        losses.append(float(backward(model, batch, 1 / batch.target_count)))
        optimizer.step()
    model.eval()
    return losses


def own_parameters(model: Any) -> set[int]:
    modules = own_modules(model).values()
    return {id(p) for m in modules for name, p in m.named_parameters() if "base_layer" not in name}


@pytest.mark.parametrize(
    ("family", "case"), [(family, case) for case, families in REFUSED.items() for family in sorted(families)]
)
def test_what_the_parts_of_a_family_do_not_allow_is_refused_in_one_line_and_changes_nothing(family, case):
    model = base(family)
    peft.freeze(model)
    with pytest.raises(UsageError) as refused:
        put_on(model, method(family, case))
    assert "\n" not in str(refused.value)
    assert not own_modules(model)
    assert torch.equal(logits(model), logits(base(family)))


@each(CASES, by_name=True)
def test_logits_at_first_are_those_of_the_base(family, case):
    expected, got = logits(base(family)), logits(adapted(family, case)[0].eval())[:, :VOCABULARY]
    if case in AT_ONCE:
        assert not torch.allclose(got, expected, atol=1e-3)
    elif case in NEAR:
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    else:
        assert torch.equal(got, expected)


@each(WITH_OWN, by_name=True)
def test_only_own_parameters_train_and_each_moves_within_three_steps(family, case):
    model, _ = adapted(family, case)
    own = own_parameters(model)
    training = {id(p) for p in model.parameters() if p.requires_grad}
    assert training < own if case in PARTLY_FROZEN else training == own
    before = {name: value.clone() for name, value in peft.trainable_state(model).items()}
    train(model, case, 3)
    after = peft.trainable_state(model)
    assert [name for name, value in before.items() if torch.equal(after[name], value)] == []


@each(WITH_OWN)
def test_the_base_is_bit_identical_after_training_and_comes_back_when_the_adapter_is_taken_out(family, case):
    model, _ = adapted(family, case)
    train(model, case, 3)
    expected = peft.base_tensors(base(family))
    found = peft.base_tensors(model)
    assert found.keys() == expected.keys()
    assert [name for name, value in expected.items() if not torch.equal(found[name], value)] == []
    peft.remove(model)
    assert torch.equal(logits(model), logits(base(family)))


@each(MERGEABLE)
def test_merged_weights_give_the_same_logits(family, case):
    model, _ = shaken(family, case)
    ids = list(token_rows(case)[1].input_ids)
    expected = logits(model.eval(), ids)
    updates = model_updates(model)
    peft.remove(model)
    weights = peft.base_tensors(model)
    assert updates
    for name, update in updates.items():
        weight = weights[name]
        merged = update.apply(weight, 0, update.rows(len(weight)))
        place, _, last = name.rpartition(".")  # a head that shares the weight of an embedding keeps its own
        setattr(model.get_submodule(place), last, torch.nn.Parameter(merged.to(weight.dtype)))
    torch.testing.assert_close(logits(model, ids), expected, atol=1e-4, rtol=1e-4)


@each(WITH_OWN)
def test_a_saved_and_loaded_adapter_gives_the_same_logits_and_files(family, case, tmp_path):
    model, config = shaken(family, case)
    ids = list(token_rows(case)[1].input_ids)
    peft.save_adapter(model, config, tmp_path / "adapter", base="some/base")
    fresh = base(family)
    report = peft.load_adapter(fresh, tmp_path / "adapter")
    assert report.norm > 0
    assert torch.equal(logits(fresh.eval(), ids), logits(model.eval(), ids))
    peft.save_adapter(fresh, report.adapter.config, tmp_path / "again", base="some/base")
    first, second = (tmp_path / name / "adapter_model.safetensors" for name in ("adapter", "again"))
    assert first.read_bytes() == second.read_bytes()


@each(CASES, by_name=True)
def test_packed_documents_and_a_shared_prefix_have_the_gradients_of_each_alone(family, case):
    model, _ = shaken(family, case)
    model.eval()
    expected: dict[str, torch.Tensor] = {}
    total = 0.0
    for place in range(3):
        loss, alone = gradients(model, case, [place])
        total += loss
        expected = {name: gradient + expected.get(name, 0) for name, gradient in alone.items()}
    for shared_prefix in (0, SHARED):
        loss, got = gradients(model, case, [0, 1, 2], shared_prefix)
        assert loss == pytest.approx(total, rel=1e-5)
        assert got.keys() == expected.keys() != set()
        for name, gradient in expected.items():
            scale = gradient.abs().max().item()
            torch.testing.assert_close(got[name], gradient, atol=1e-4 * scale + 1e-6, rtol=1e-3, msg=name)


@each(CASES)
def test_decoding_with_a_cache_is_the_full_pass(family, case):
    model, _ = shaken(family, case)
    model.eval()
    prompts = [[5, 6, 7, 8, 9, 10, 11], [1, 3]]
    steps = list(generate(model, prompts, Sampling(max_new_tokens=4)))
    for row, prompt in enumerate(prompts):
        answer = [step[row] for step in steps]
        found = logits(model, prompt + answer[:-1])[len(prompt) - 1 :]
        assert (found.max(-1).values - found[range(4), answer]).max() <= 1e-4


@pytest.mark.parametrize("what", ["selective", "full"])
@each(CASES)
def test_checkpointed_activations_give_the_same_gradients(family, case, what):
    results = []
    for checkpointing in ("none", what):
        model, _ = shaken(family, case)
        model.train()
        model.checkpoint_activations(checkpointing)
        results.append(gradients(model, case, [0, 1, 2])[1])
    plain, again = results
    assert again.keys() == plain.keys()
    assert [name for name, gradient in plain.items() if not torch.equal(again[name], gradient)] == []


@each(CASES)
def test_a_fixed_batch_is_learnt(family, case):
    losses = train(adapted(family, case)[0], case, 30, lr=3e-2)
    assert losses[-1] < (0.99 if case in FEW else 0.85) * losses[0]


@each([(family, case) for family, case in WITH_OWN if case in ON_CODES])
def test_on_a_quantized_base_it_starts_as_the_base_trains_and_leaves_the_codes(family, case):
    model, _ = adapted(family, case, quantized=True)
    at_first = logits(base(family, quantized=True))
    assert torch.equal(logits(model.eval()), at_first)
    assert not torch.allclose(at_first, logits(base(family)), atol=1e-5), "not quantized"
    codes = {name: buffer.clone() for name, buffer in model.named_buffers()}
    before = {name: value.clone() for name, value in peft.trainable_state(model).items()}
    train(model, case, 3)
    after = peft.trainable_state(model)
    assert [name for name, value in before.items() if torch.equal(after[name], value)] == []
    assert all(torch.equal(buffer, codes[name]) for name, buffer in model.named_buffers())
    peft.remove(model)
    assert torch.equal(logits(model), at_first)
