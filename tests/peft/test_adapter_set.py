"""Several adapters in one model: each gives what it gives alone, in any order, and the base comes back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lit_lora import peft
from lit_lora.checkpoint.load import load_model
from lit_lora.errors import InputError, UsageError
from tests.peft.tiny import adapted, make_adapter, make_model, save_base, shake, token_ids

KINDS: dict[str, dict[str, object]] = {
    "lora": {"name": "lora", "rank": 2, "target_modules": ["embed_tokens", "q_proj", "lm_head"]},
    "whole": {"name": "lora", "rank": 2, "modules_to_save": ["lm_head"], "bias": "all"},
    "tokens": {"name": "lora", "rank": 2, "trainable_tokens": [3, 5]},
    "dora": {"name": "dora", "rank": 2},
    "vera": {"name": "vera", "rank": 4},
    "houlsby": {"name": "houlsby", "bottleneck": 4},
    "prefix": {"name": "prefix", "num_virtual_tokens": 3},
    "composed": {"name": "composed", "methods": [{"name": "lora", "rank": 2}, {"name": "houlsby", "bottleneck": 4}]},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The base, and an adapter of each kind."""
    root = tmp_path_factory.mktemp("several")
    found = {"base": save_base(make_model(tied=True), root / "base")}
    for number, (kind, settings) in enumerate(KINDS.items()):
        config = peft.methods()[str(settings["name"])].model_validate(settings)
        model = adapted(load_model(found["base"]), config)
        shake(model, seed=number)
        found[kind] = peft.save_adapter(model, config, root / kind, base=found["base"])
    return found


def test_each_gives_in_any_order_what_it_gives_alone(folders: dict[str, Path]) -> None:
    expected = {None: load_model(folders["base"]).eval()(token_ids()).detach()}
    for kind in KINDS:
        model = load_model(folders["base"]).eval()
        peft.load_adapter(model, folders[kind])
        expected[kind] = model(token_ids()).detach()
    assert all(not torch.equal(value, expected[None]) for kind, value in expected.items() if kind)
    adapters = peft.Adapters(load_model(folders["base"]).eval())
    for kind in KINDS:
        adapters.load(kind, folders[kind])
        assert torch.equal(adapters.model(token_ids()), expected[kind])
    for kind in [None, *KINDS, *reversed(KINDS), None, "lora", "lora"]:
        adapters.use(kind)
        assert adapters.active == kind
        assert torch.equal(adapters.model(token_ids()), expected[kind]), kind


def test_what_cannot_be_loaded_or_used_leaves_the_present_one(folders: dict[str, Path], tmp_path: Path) -> None:
    adapters = peft.Adapters(load_model(folders["base"]).eval())
    adapters.load("dora", folders["dora"])
    before = adapters.model(token_ids()).detach()
    other = make_adapter(save_base(make_model(seed=9), tmp_path / "other"), tmp_path / "adapter")
    with pytest.raises(InputError, match="another base"):
        adapters.load("other", other)
    with pytest.raises(UsageError, match=r"no adapter 'dorra' is loaded \(did you mean 'dora'\?\), loaded: dora"):
        adapters.use("dorra")
    with pytest.raises(UsageError, match="already loaded"):
        adapters.load("dora", folders["lora"])
    assert (adapters.active, adapters.names) == ("dora", ["dora"])
    assert torch.equal(adapters.model(token_ids()), before)
    with pytest.raises(UsageError, match="already has an adapter"):
        peft.Adapters(adapters.model)
