"""Combined adapters against PEFT's ``add_weighted_adapter``, live: each way, and each opens the other's adapters."""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path

import pytest
import torch

from lit_lora.checkpoint.load import load_model
from lit_lora.merge import combine
from lit_lora.peft import load_adapter
from tests.parity.test_peft import bases, theirs_of  # noqa: F401 - bases is a fixture

if importlib.util.find_spec("peft") is None:
    pytest.skip("peft is not installed", allow_module_level=True)

SETTINGS = {
    "one": {"target_modules": ["q_proj", "v_proj"], "r": 4, "lora_alpha": 8},
    "two": {"target_modules": ["q_proj", "v_proj"], "r": 4, "lora_alpha": 3},
}


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.7, -0.4)])
@pytest.mark.parametrize(("how", "theirs"), [("concatenate", "cat"), ("linear", "linear"), ("svd", "svd")])
def test_a_combination_is_that_of_peft(bases, tmp_path: Path, how: str, theirs: str, weights: tuple[float, float]):  # noqa: F811
    from peft import LoraConfig, get_peft_model

    model = theirs_of(bases[False])
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, settings in SETTINGS.items():
            config = LoraConfig(**settings, task_type="CAUSAL_LM", init_lora_weights=False)
            if name == "one":
                model = get_peft_model(model, config, adapter_name=name)
            else:
                model.add_adapter(name, config)
        model.save_pretrained(str(tmp_path))
        rank = {"svd_rank": 3} if how == "svd" else {}
        model.add_weighted_adapter(["one", "two"], list(weights), "both", combination_type=theirs, **rank)
    model.set_adapter("both")
    model.eval()
    result = combine(
        [tmp_path / "one", tmp_path / "two"],
        weights,
        tmp_path / "ours",
        how=how,
        rank=3 if how == "svd" else None,
        base=bases[False],
    )
    assert result.ranks == {"concatenate": (8, 8), "linear": (4, 4), "svd": (3, 3)}[how]
    assert (result.lost < 1e-6) == (how == "concatenate")
    mine = load_model(bases[False]).eval()
    base = mine(torch.arange(9)[None]).detach()
    load_adapter(mine, tmp_path / "ours")
    ids = torch.randint(0, 53, (2, 9), generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(mine(ids), model(ids).logits, rtol=1e-4, atol=1e-4)
    assert (mine(torch.arange(9)[None]) - base).abs().max() > 1e-2, "the adapters do something"
    reopened = theirs_of(bases[False])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from peft import PeftModel

        reopened = PeftModel.from_pretrained(reopened, tmp_path / "ours").eval()
    torch.testing.assert_close(reopened(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)
