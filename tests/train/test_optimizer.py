from __future__ import annotations

import pytest
import torch
from lit_lora.finetune import lora

from lit_lora.config import load_config
from lit_lora.errors import UsageError
from lit_lora.train.optim import OPTIMIZERS, optimizers
from lit_lora.train.optim.build import build_optimizer
from lit_lora.train.optim.master_weights import MasterWeights
from tests.train.tiny_run import adapted, losses, metrics, optimizer_config, tiny_model, train, unfrozen


def written(folder, optimizer):
    path = folder / "c.yaml"
    path.write_text(f"model: {{path: base}}\ndata: {{path: rows.jsonl}}\noptimizer: {optimizer}\n")
    return path


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_name_picks_an_entry_of_the_table(tmp_path, name):
    config = load_config(written(tmp_path, f"{{name: {name}, lr: 0.5}}"), lora.Config).optimizer
    assert type(config) is optimizers()[name]
    assert (config.name, config.lr) == (name, 0.5)
    assert config.smaller_state in (None, *OPTIMIZERS)
    assert config.cpu_time_of in (None, *OPTIMIZERS)


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        ("{name: sgd, betas: [0.8, 0.9]}", "unknown key 'optimizer.betas', known: name, lr, weight_decay, momentum"),
        ("{momentum: 0.9}", "unknown key 'optimizer.momentum', known: name, lr, weight_decay, betas, eps"),
        ("{name: sgd, momentun: 0.9}", "unknown key 'optimizer.momentun' (did you mean 'momentum'?)"),
        ("{name: adamv}", "optimizer.name: unknown name 'adamv' (did you mean 'adamw'?), known: adamw, adamw8bit, "),
        ("{name: sgd, momentum: 2}", "optimizer.momentum: input should be less than 1, got 2"),
    ],
)
def test_an_option_of_another_optimizer_is_an_error_with_its_line(tmp_path, optimizer, message):
    with pytest.raises(UsageError) as error:
        load_config(written(tmp_path, optimizer), lora.Config)
    assert str(error.value).startswith(f"{tmp_path}/c.yaml:3: {message}")


def test_the_config_of_an_older_run_folder_lists_options_of_all_optimizers_and_still_loads(tmp_path, capsys):
    listed = "{name: %s, lr: 0.1, weight_decay: 0.0, betas: [0.9, 0.999], eps: 1.0e-08, momentum: 0.0}"
    assert load_config(written(tmp_path, listed % "sgd"), lora.Config).optimizer == optimizer_config("sgd", lr=0.1)
    told = [f"config: optimizer.{key} is not an option of sgd, ignored" for key in ("betas", "eps")]
    assert capsys.readouterr().err.splitlines() == told
    assert load_config(written(tmp_path, listed % "adamw"), lora.Config).optimizer == optimizer_config("adamw", lr=0.1)
    assert capsys.readouterr().err == "config: optimizer.momentum is not an option of adamw, ignored\n"


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_only_matrices_decay(name):
    master_weights = MasterWeights(unfrozen())
    optimizer = build_optimizer(optimizer_config(name, weight_decay=0.1), master_weights)
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    assert decayed == {id(tensor) for tensor in master_weights.masters.values() if tensor.ndim == 2}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(master_weights.masters)


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_parameters_with_an_lr_factor_learn_at_that_rate(name, tmp_path):
    factors = {"model.layers.0.self_attn.q_proj.lora_B": 16.0, "model.layers.1.mlp.up_proj.lora_A": 0.0}
    settings = {"schedule": {"name": "constant", "warmup": 0}, "optimizer": {"name": name, "lr": 1e-3}}
    moves = []
    for given in (factors, None):
        model = adapted(shaken=True)
        before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        train(model, tmp_path / str(given is None), max_steps=1, lr_factors=given, **settings)
        moves.append({key: model.get_parameter(key).detach() - value for key, value in before.items()})
    for key, move in moves[1].items():
        torch.testing.assert_close(moves[0][key], factors.get(key, 1.0) * move, atol=1e-6, rtol=1e-3)
        assert move.abs().max() > 0


def test_float32_parameters_are_their_own_masters_and_others_get_one():
    model = adapted(torch.bfloat16)
    assert all(master is model.get_parameter(name) for name, master in MasterWeights(model).masters.items())
    model = tiny_model(torch.bfloat16).requires_grad_(True)
    masters = MasterWeights(model).masters
    assert "lm_head.weight" not in masters  # tied: the embedding's
    for name, master in masters.items():
        assert master.dtype == torch.float32
        assert torch.equal(master, model.get_parameter(name).float())


def test_gradients_of_bfloat16_parameters_add_up_in_float32():
    parameter = torch.nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
    model = torch.nn.Module()
    model.weight = parameter
    master_weights = MasterWeights(model)
    for value in (1.0, 2**-9, 2**-9):  # in bfloat16 the small ones would be rounded away
        (parameter * torch.tensor(value, dtype=torch.bfloat16)).sum().backward()
    assert master_weights.masters["weight"].grad.tolist() == [1 + 2**-8] * 3
    assert parameter.grad is None


def test_a_tied_weight_gets_the_gradients_of_both_its_uses(tmp_path):
    settings = {"optimizer": {"name": "sgd", "lr": 1.0}, "schedule": {"name": "constant", "warmup": 0}}
    norms = []
    for dtype in (torch.float32, torch.bfloat16):
        folder = tmp_path / str(dtype)
        train(unfrozen(dtype), folder, max_steps=1, max_grad_norm=1e9, **settings)
        norms.append(metrics(folder)[0]["grad_norm"])
    assert norms[1] == pytest.approx(norms[0], rel=0.02)


def test_adamw_of_the_loop_is_that_of_torch(tmp_path):
    settings = {"betas": (0.8, 0.99), "eps": 1e-6, "weight_decay": 0.1}
    train(unfrozen(), tmp_path, max_steps=5, max_grad_norm=1e9, optimizer={"lr": 1e-2, **settings})
    train(unfrozen(), tmp_path / "none", max_steps=5, max_grad_norm=1e9, optimizer={"lr": 1e-2})
    assert losses(tmp_path) != losses(tmp_path / "none")
    # the same by hand: one dense batch, plain cross entropy, torch's unfused AdamW
    from lit_lora.data.batches import Batches
    from lit_lora.train.schedule import ScheduleConfig
    from tests.train.test_loop import plain_losses
    from tests.train.tiny_run import make_rows

    model, rows = unfrozen(), make_rows()
    order = Batches(rows, batch_size=4, micro_batch_tokens=48, seed=0)
    groups = [
        {"params": [p for p in model.parameters() if p.ndim == 2]},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer, expected = torch.optim.AdamW(groups, lr=1e-2, **settings), []
    for step in range(5):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * ScheduleConfig().factor(step, 5)
        total, count = plain_losses(model, rows.subset(order.row_indices(step)))
        optimizer.zero_grad()
        (total / count).backward()
        optimizer.step()
        expected.append(total.item() / count)
    assert losses(tmp_path) == pytest.approx(expected, abs=1e-4)
