"""``lit-lora combine``: sums of adapters, exact where they say so, and bad input told in a line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lit_lora import peft
from lit_lora.checkpoint.load import load_model
from lit_lora.cli import main
from lit_lora.merge import find_places, merge, plan_merge
from lit_lora.peft import load_adapter
from tests.peft.tiny import adapted, make_adapter, make_model, save_base, token_ids


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_base(make_model(), tmp_path / "base")


def call(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as done:
        main(["combine", *map(str, arguments)])
    captured = capsys.readouterr()
    return int(done.value.code or 0), captured.out, captured.err


def merged(folder: Path, base: Path) -> dict[str, torch.Tensor]:
    """The base's parameters with an adapter merged into them."""
    out = folder.with_name(f"{folder.name}-merged")
    merge(plan_merge(find_places(folder, base=base)), out)
    return {name: parameter.detach() for name, parameter in load_model(out, dtype=torch.float32).named_parameters()}


def test_the_sum_is_exact_over_other_ranks_and_targets(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = make_adapter(base, tmp_path / "a", rank=2, target_modules="q,v")
    second = make_adapter(base, tmp_path / "b", rank=3, alpha=1.0, seed=5, target_modules=["v_proj", "up_proj"])
    code, out, err = call(capsys, first, second, "--weights", "2,-0.5", "--out", tmp_path / "both")
    assert code == 0, err
    assert "2 adapters, 6 modules, ranks 2 to 5, 0.00% off the exact sum" in out
    before = {name: p.detach() for name, p in load_model(base).named_parameters()}
    one, two, both = (merged(tmp_path / name, base) for name in ("a", "b", "both"))
    for name, value in both.items():
        expected = before[name] + 2 * (one[name] - before[name]) - 0.5 * (two[name] - before[name])
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5)


def test_an_adapter_less_itself_is_the_base(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = make_adapter(base, tmp_path / "a", rank=2)
    assert call(capsys, adapter, adapter, "--weights", "1,-1", "--out", tmp_path / "none")[0] == 0
    model = load_model(base).eval()
    expected = model(token_ids()).detach()
    load_adapter(model, tmp_path / "none")
    torch.testing.assert_close(model(token_ids()), expected, rtol=1e-5, atol=1e-5)


def test_svd_of_the_full_rank_loses_nothing_and_less_rank_loses_more(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [make_adapter(base, tmp_path / name, rank=2, seed=seed) for name, seed in (("a", 4), ("b", 5))]
    lost = []
    for rank in (4, 3, 1):
        options = ("--how", "svd", "--rank", rank, "--out", tmp_path / f"r{rank}")
        code, out, _ = call(capsys, *folders, *options)
        assert code == 0
        lost.append(float(out.partition(f"rank {rank}, ")[2].partition("%")[0]))
    assert lost[0] == 0
    assert 0 < lost[1] < lost[2] < 100


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["a", "b", "--weights", "1"], 2, "expected one finite weight for each of the 2 adapters"),
        (["a", "b", "--weights", "1,x"], 2, "--weights 1,x: expected numbers"),
        (["a", "b", "--weights", "1,nan"], 2, "expected one finite weight for each"),
        (["a", "b", "--how", "svd"], 2, "svd needs a rank"),
        (["a", "b", "--rank", "2"], 2, "rank 2: has no effect with concatenate, only with svd"),
        (["a", "b", "--how", "linear"], 2, "the adapters have ranks [2, 3]"),
        (["a", "whole"], 3, "lm_head.weight is not a low-rank update"),
        (["a", "dora"], 3, "is not a low-rank update"),
        (["a", "ia3"], 3, "is not a low-rank update"),
        (["a", "houlsby"], 3, "computes beside the base's weights, so it has no update to sum"),
        (["a", "other"], 3, "trained on another base model"),
        (["a", "nowhere"], 3, "nowhere: no such folder"),
        (["a", "--out", "base"], 4, "base: already exists"),
    ],
)
def test_what_cannot_be_combined_is_told(
    base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    make_adapter(base, Path("a"), rank=2)
    make_adapter(base, Path("b"), rank=3)
    if "whole" in arguments:
        make_adapter(base, Path("whole"), modules_to_save=["lm_head"], target_modules="q,v")
    for name, settings in {"dora": {"rank": 2}, "ia3": {}, "houlsby": {"bottleneck": 2}}.items():
        if name in arguments:
            config = peft.methods()[name].model_validate(settings)
            peft.save_adapter(adapted(load_model(base), config), config, Path(name), base=base)
    if "other" in arguments:
        make_adapter(save_base(make_model(seed=9), tmp_path / "base2"), Path("other"), rank=2)
    given = arguments if "--out" in arguments else [*arguments, "--out", "new"]
    found, _, err = call(capsys, *given)
    assert found == code
    assert message in err
    assert not Path("new").exists()
