"""``lit-lora inspect-update``: the spectra are those of the matrices, and bad input is told in a line."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from lit_lora import peft
from lit_lora.checkpoint.load import load_model
from lit_lora.cli import main
from lit_lora.merge import find_changes, find_places, merge, plan_merge
from lit_lora.peft.core.base_tensors import base_tensors
from lit_lora.quantize import QuantizeConfig
from tests.finetune.tiny_task import make_base, write_config, write_rows
from tests.peft.tiny import LAYERS, adapted, make_adapter, make_model, save_base, shake


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_base(make_model(), tmp_path / "base")


def call(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as done:
        main(["inspect-update", *map(str, arguments)])
    captured = capsys.readouterr()
    return int(done.value.code or 0), captured.out, captured.err


def difference(before: torch.nn.Module, after: Path) -> dict[str, torch.Tensor]:
    """What differs between a model and a checkpoint, by name."""
    new = dict(load_model(after, dtype=torch.float32).named_parameters())
    return {name: (new[name] - old).detach().double() for name, old in before.named_parameters()}


@pytest.mark.parametrize(
    "settings",
    [
        {"name": "lora", "rank": 3},
        {"name": "lora", "rank": 2, "target_modules": ["embed_tokens", "v_proj"], "bias": "all"},
        {"name": "lora", "rank": 8, "init": "pissa"},
        {"name": "lora", "modules_to_save": ["lm_head"]},
        {"name": "lora", "trainable_tokens": [3, 5]},
        {"name": "dora", "rank": 3},
        {"name": "ia3"},
        {"name": "bitfit"},
        {"name": "vera", "rank": 6},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_the_spectra_are_those_of_merged_minus_base(base: Path, tmp_path: Path, settings: dict[str, object]) -> None:
    """Two ways to the same numbers: factors and rules here, an SVD of whole matrices there."""
    config = peft.methods()[str(settings["name"])].model_validate(settings)
    model = adapted(load_model(base), config)
    shake(model)
    peft.save_adapter(model, config, tmp_path / "run" / "adapter", base=base)
    merge(plan_merge(find_places(tmp_path / "run")), tmp_path / "run" / "merged")
    expected = difference(load_model(base), tmp_path / "run" / "merged")
    for source, given in ((tmp_path / "run", None), (tmp_path / "run" / "merged", base)):
        found = {change.name: change for change in find_changes(source, base=given)}
        assert found.keys() >= {name for name, change in expected.items() if change.norm() > 1e-4}
        for name, change in found.items():
            assert change.norm == pytest.approx(float(expected[name].norm()), rel=1e-4, abs=1e-5)
            if expected[name].ndim == 1:
                assert change.singular_values == ()
                continue
            values = torch.linalg.svdvals(expected[name])
            mine = torch.tensor(change.singular_values, dtype=torch.float64)
            torch.testing.assert_close(mine, values[: len(mine)], rtol=1e-4, atol=1e-5)
            assert values[len(mine) :].sum() < 1e-3, "what the update cannot have is zero in the merged weights"


def test_the_figures_of_a_known_change(tmp_path: Path) -> None:
    """Singular values 3, 1 and 1: energies 9, 1, 1 of 11."""
    model = make_model()
    base = save_base(model, tmp_path / "base")
    weight = model.model.layers[1].mlp.up_proj.weight
    before = float(weight.detach().norm())
    with torch.no_grad():
        weight[:3, :3] += torch.diag(torch.tensor([3.0, 1.0, -1.0]))
    (change,) = find_changes(save_base(model, tmp_path / "tuned"), base=base)
    assert (change.kind, change.layer, change.shape) == ("up_proj", 1, (24, 16))
    assert change.singular_values[:3] == pytest.approx((3, 1, 1), rel=1e-5)
    assert max(change.singular_values[3:]) < 1e-4
    assert change.stable_rank == pytest.approx(11 / 9, rel=1e-5)
    assert [change.rank_holding(share) for share in (0.5, 0.81, 0.9, 0.95, 1.0)][:4] == [1, 1, 2, 3]
    assert (change.norm, change.weight_norm) == pytest.approx((math.sqrt(11), before), rel=1e-5)


def test_a_run_is_shown_by_kind_and_plotted(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_adapter(base, tmp_path / "run" / "adapter", rank=4)
    code, out, err = call(capsys, tmp_path / "run")
    assert code == 0, err
    rows = {line.split("\t")[0]: line.split("\t") for line in out.splitlines() if "\t" in line}
    assert list(rows)[1:] == ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "all"]
    assert rows["q_proj"][1] == str(LAYERS)
    assert rows["q_proj"][6] == "4"
    assert 1 <= float(rows["q_proj"][4].split()[0]) <= 4
    assert (tmp_path / "run" / "update.png").read_bytes().startswith(b"\x89PNG")
    assert "14 of 29 tensors change" in err


def test_json_has_every_tensor(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_adapter(base, tmp_path / "adapter", rank=4)
    code, out, _ = call(capsys, tmp_path / "adapter", "--json", "--plot", tmp_path / "mine.png")
    assert (code, (tmp_path / "mine.png").is_file()) == (0, True)
    tensors = json.loads(out)["tensors"]
    assert len(tensors) == 7 * LAYERS
    for tensor in tensors:
        assert len(tensor["singular_values"]) == 4
        assert 1 <= tensor["rank_90"] <= 4
        assert tensor["norm"] == pytest.approx(math.hypot(*tensor["singular_values"]))


def test_an_adapter_that_was_never_trained_is_told(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_adapter(base, tmp_path / "adapter", size=0.0)
    code, out, err = call(capsys, tmp_path / "adapter")
    assert code == 0
    assert "base and result are identical" in err
    assert "nan" not in out
    assert not (tmp_path / "adapter" / "update.png").exists()


def test_bad_input_is_told_in_one_line(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = save_base(make_model(vocabulary=40), tmp_path / "other")
    broken = make_model()
    with torch.no_grad():
        broken.model.layers[0].mlp.up_proj.weight[0, 0] = torch.nan
    save_base(broken, tmp_path / "broken")
    make_adapter(base, tmp_path / "adapter")
    (tmp_path / "empty").mkdir()
    prefix = peft.methods()["prefix"].model_validate({"name": "prefix"})
    peft.save_adapter(adapted(load_model(base), prefix), prefix, tmp_path / "prefix", base=base)
    for arguments, code, message in [
        ([tmp_path / "nowhere"], 3, "no such folder"),
        ([tmp_path / "empty"], 3, "expected a run folder"),
        ([base], 2, "base model (none named) not found"),
        ([other, "--base", base], 3, "embed_tokens.weight has shape [40, 16], but"),
        ([tmp_path / "broken", "--base", base], 3, "up_proj.weight: the change has NaN"),
        ([tmp_path / "prefix"], 3, "computes beside the base's weights"),
        ([tmp_path / "adapter", "--plot", tmp_path / "no" / "folder.png"], 4, "the plot cannot be written"),
    ]:
        found, _, err = call(capsys, *arguments)
        assert (found, err.count("error:")) == (code, 1), err
        assert message in err
        assert "Traceback" not in err


def test_a_run_over_a_quantized_base_is_measured_against_what_it_was_trained_on(tmp_path: Path) -> None:
    base, held = make_base(tmp_path / "base", intermediate_size=64), QuantizeConfig(block_size=32)
    config = peft.methods()["dora"].model_validate({"name": "dora", "rank": 2})
    model = adapted(load_model(base, quantize=held), config)
    shake(model)
    peft.save_adapter(model, config, tmp_path / "run" / "adapter", base=base)
    merge(plan_merge(find_places(tmp_path / "run")), tmp_path / "run" / "merged")
    merged = dict(load_model(tmp_path / "run" / "merged").named_parameters())
    weights = base_tensors(load_model(base, quantize=held))
    changes = list(find_changes(tmp_path / "run"))
    assert len(changes) == 14
    for change in changes:
        expected = torch.linalg.svdvals((merged[change.name] - weights[change.name]).detach().double())
        torch.testing.assert_close(torch.tensor(change.singular_values).double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("train", ["all", ["up_proj"]])
def test_a_run_that_trained_the_model_itself_finds_its_base(
    tmp_path: Path, train: object, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LIT_LORA_CACHE", str(tmp_path / "cache"))
    make_base(tmp_path / "base")
    write_rows(tmp_path / "rows.jsonl")
    sections = {"peft": {"name": "full", "train": train}, "model": {"dtype": "bf16"}}  # of a base in float32
    config = write_config(tmp_path, recipe="full", **sections)
    with pytest.raises(SystemExit) as done:
        main(["finetune", "--config", str(config), "train.max_steps=3"])
    assert not done.value.code
    capsys.readouterr()
    code, out, err = call(capsys, tmp_path / "run")
    assert code == 0, err
    kinds = [line.split("\t")[0] for line in out.splitlines()[2:]]
    assert kinds == ["up_proj"] if train != "all" else {"q_proj", "lm_head"} < set(kinds), "rounding is no change"
    assert (tmp_path / "run" / "update.png").is_file()
