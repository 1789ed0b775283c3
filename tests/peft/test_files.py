"""Adapter folders: PEFT's format, written whole, and everything that does not fit refused by name."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from lit_lora import peft
from lit_lora.checkpoint.load import load_model
from lit_lora.errors import InputError, UsageError
from lit_lora.model import CausalLM, ModelConfig
from lit_lora.peft.core.base_tensors import Base
from lit_lora.peft.core.modules import model_updates
from lit_lora.peft.files.load import check_base
from tests.peft.tiny import VOCABULARY, adapted, lora, make_adapter, make_model, save_base, shake, token_ids

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture
def folder(tmp_path):
    base = save_base(make_model(), tmp_path / "base")
    return make_adapter(base, tmp_path / "adapter", target_modules="q,v")


def edit_config(folder, **changes):
    path = folder / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def load(folder, **options):
    return peft.load_adapter(make_model(), folder, **options)


def test_the_folder_holds_pefts_two_files_and_a_model_card(folder):
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", CONFIG, WEIGHTS, "lit_lora.json"]
    config = json.loads((folder / CONFIG).read_text())
    assert config["peft_type"] == "LORA"
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (8, 16, ["q_proj", "v_proj"])
    keys = load_file(folder / WEIGHTS)
    assert keys[f"{Q_PROJ}.lora_A.weight"].shape == (8, 16)
    assert keys[f"{Q_PROJ}.lora_B.weight"].shape == (16, 8)
    assert {value.dtype for value in keys.values()} == {torch.float32}


def test_the_model_card_names_base_data_method_and_figures_but_no_private_path(tmp_path):
    model = adapted(make_model(), lora())
    metrics = {"Validation loss": 1.23456, "Exact | match": "0 % → 71 %"}
    folder = tmp_path / "adapter"
    peft.save_adapter(model, lora(), folder, base=tmp_path / "SmolLM2", data="tickets.jsonl, 800 rows", metrics=metrics)
    card = (folder / "README.md").read_text()
    for text in (
        "SmolLM2",
        "tickets.jsonl, 800 rows",
        "LoRA, rank 8, alpha 16",
        "1.235",
        "0 % → 71 %",
        "Exact | match",
    ):
        assert text in card
    assert str(tmp_path) not in card
    peft.save_adapter(model, lora(), folder, base="HuggingFaceTB/SmolLM2-135M-Instruct")
    assert "base_model: HuggingFaceTB/SmolLM2-135M-Instruct" in (folder / "README.md").read_text()


def test_saving_replaces_an_older_adapter_whole(folder):
    (folder / "stale").write_text("old")
    peft.save_adapter(adapted(make_model(), lora()), lora(), folder, base="b")
    assert not (folder / "stale").exists()
    assert [path.name for path in folder.parent.iterdir() if path.name.startswith(".")] == []


def test_a_model_without_an_adapter_is_not_saved(tmp_path):
    with pytest.raises(UsageError, match="no adapter to save"):
        peft.save_adapter(make_model(), lora(), tmp_path / "adapter", base="b")
    assert not (tmp_path / "adapter").exists()


def test_pain_10_loading_reports_what_was_applied_and_changes_the_output(folder):
    base = make_model()
    expected = base(token_ids())
    report = peft.load_adapter(base, folder)
    assert not torch.allclose(base(token_ids()), expected, atol=1e-2)
    assert "8 tensors applied, update norm" in str(report)
    assert str(report).endswith("base checked")
    exact = sum(
        (module.scaling * module.lora_B @ module.lora_A).square().sum()
        for module in (layer.self_attn.q_proj for layer in base.model.layers)
    ) + sum(
        (module.scaling * module.lora_B @ module.lora_A).square().sum()
        for module in (layer.self_attn.v_proj for layer in base.model.layers)
    )
    assert report.norm == pytest.approx(exact.sqrt().item(), rel=1e-5)


def test_one_tensor_is_reported_in_the_singular(tmp_path):
    config = peft.methods()["prefix"].model_validate({"name": "prefix"})
    model = adapted(make_model(), config)
    shake(model)
    peft.save_adapter(model, config, tmp_path / "adapter", base="b")
    assert ": 1 tensor applied, " in str(peft.load_adapter(make_model(), tmp_path / "adapter"))


def test_pain_10_without_a_fingerprint_the_report_names_the_base_that_was_trained_on(folder):
    (folder / "lit_lora.json").unlink()  # as PEFT writes it
    edit_config(folder, base_model_name_or_path="some/model")
    report = peft.load_adapter(make_model(), folder)
    assert str(report).endswith("base checked by shapes only, it was trained on some/model")


def test_pain_10_an_adapter_without_effect_is_told(tmp_path, capsys):
    model = adapted(make_model(), lora())
    peft.save_adapter(model, lora(), tmp_path / "adapter", base="b")
    report = load(tmp_path / "adapter")
    assert report.norm == 0
    assert "no effect" in capsys.readouterr().err


def test_pain_10_missing_and_unexpected_keys_are_errors_with_counts_and_names(folder):
    edit_tensors(folder, lambda tensors: tensors.pop(f"{Q_PROJ}.lora_A.weight"))
    with pytest.raises(InputError, match=r"1 tensor \(model\.layers\.0\.self_attn\.q_proj\.lora_A\) missing"):
        load(folder)
    edit_tensors(folder, lambda tensors: tensors.pop(f"{Q_PROJ}.lora_B.weight"))
    edit_tensors(
        folder,
        lambda tensors: tensors.update(
            {
                f"base_model.model.model.layers.{n}.self_attn.x_proj.lora_{side}.weight": torch.ones(8, 8)
                for n in (0, 1)
                for side in "AB"
            }
        ),
    )
    with pytest.raises(InputError, match=r"2 modules \(.*x_proj, .*\) of 5 not found in this model"):
        load(folder)


def test_pain_10_a_tensor_missing_from_a_pair_of_layers_is_not_silently_skipped(folder):
    edit_tensors(folder, lambda tensors: [tensors.pop(f"{Q_PROJ}.lora_{side}.weight") for side in "AB"])
    with pytest.raises(InputError, match=r"no tensors for 1 module \(model\.layers\.0\.self_attn\.q_proj\)"):
        load(folder)


def test_pain_10_wrong_shapes_are_errors(folder):
    edit_tensors(folder, lambda tensors: tensors.update({f"{Q_PROJ}.lora_A.weight": torch.ones(8, 12)}))
    with pytest.raises(InputError, match=r"q_proj\.lora_A\.weight has shape \[8, 12\], expected \[8, 16\]"):
        load(folder)
    edit_tensors(folder, lambda tensors: tensors.update({f"{Q_PROJ}.lora_A.weight": torch.ones(7, 16)}))
    with pytest.raises(InputError, match=r"factors of .*q_proj do not match: \[16, 8\], \[7, 16\]"):
        load(folder)


def test_pain_10_a_rank_that_the_tensors_do_not_have_is_an_error(folder):
    edit_config(folder, r=16)
    with pytest.raises(InputError, match=r"rank 16 for .*, but its tensors have rank 8"):
        load(folder)


def test_pain_10_an_adapter_for_another_base_is_refused_unless_forced(folder):
    with pytest.raises(InputError, match=r"trained on another base model \(.*base\): 8 tensors"):
        peft.load_adapter(make_model(seed=9), folder)
    assert peft.load_adapter(make_model(seed=9), folder, force=True).norm > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_same_base_in_another_dtype_is_known_again(folder, dtype):
    assert peft.load_adapter(make_model().to(dtype), folder).norm > 0


def test_nan_and_infinite_values_are_refused_with_names(folder):
    edit_tensors(folder, lambda tensors: tensors[f"{Q_PROJ}.lora_B.weight"].fill_(float("nan")))
    with pytest.raises(InputError, match=r"1 tensor \(.*q_proj\.lora_B\.weight\) with NaN or infinite"):
        load(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, "0 magnitude vectors for 4 modules, but use_dora is true"),
        ({"lora_bias": True}, "lora_bias"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"ensure_weight_tying": True}, "ensure_weight_tying"),
        ({"some_future_option": {"a": 1}}, "some_future_option"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa' is not supported: .* changed base"),
        ({"init_lora_weights": "mica"}, "init_lora_weights 'mica'"),
        ({"peft_type": "XLORA"}, "peft_type 'XLORA' is not supported, expected one of: LORA, "),
        ({"lora_alpha": "x"}, "alpha"),
        ({"rank_pattern": {"(": 4}}, "not a regular expression"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(folder, change, message):
    edit_config(folder, **change)
    with pytest.raises(InputError, match=message):
        load(folder)


def test_unused_options_of_a_newer_peft_do_no_harm(folder):
    edit_config(folder, use_qalora=False, arrow_config=None, loftq_config={}, qalora_group_size=16, peft_version="9")
    assert load(folder).norm > 0


def test_pain_48_a_pickled_adapter_is_refused_with_a_hint(folder):
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")
    with pytest.raises(InputError, match="pickle") as error:
        load(folder)
    assert "safetensors" in error.value.hint


def test_broken_files_are_one_clear_line(folder):
    with pytest.raises(InputError, match=r"adapter_config.json: no such file"):
        load(folder.parent)
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[:-10])
    with pytest.raises(InputError, match="truncated or not a safetensors file"):
        load(folder)
    (folder / WEIGHTS).write_bytes(data)
    (folder / CONFIG).write_text("{")
    with pytest.raises(InputError, match="not valid JSON"):
        load(folder)
    (folder / CONFIG).write_text("[]")
    with pytest.raises(InputError, match="expected a JSON object"):
        load(folder)


def test_a_failed_load_leaves_the_model_as_it_was(folder):
    model = make_model()
    expected = model(token_ids())
    edit_tensors(folder, lambda tensors: tensors.update({f"{Q_PROJ}.lora_A.weight": torch.ones(8, 12)}))
    with pytest.raises(InputError):
        peft.load_adapter(model, folder)
    assert torch.equal(model(token_ids()), expected)


def test_a_second_adapter_is_refused_until_the_first_is_taken_out(folder):
    model = make_model()
    peft.load_adapter(model, folder)
    with pytest.raises(UsageError, match="already has an adapter"):
        peft.load_adapter(model, folder)
    peft.remove(model)
    peft.load_adapter(model, folder)


def test_loaded_adapters_train_on(folder):
    model = make_model()
    peft.load_adapter(model, folder)
    before = {name: value.clone() for name, value in peft.trainable_state(model).items()}
    assert len(before) == 8
    model.train()(token_ids()).square().mean().backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    assert all(not torch.equal(value, before[name]) for name, value in peft.trainable_state(model).items())


def test_target_names_are_short_where_they_mean_the_same_modules(tmp_path):
    for settings, expected in (
        ({"target_modules": "q,v"}, ["q_proj", "v_proj"]),
        ({"target_modules": "q,v", "layers": [1]}, [f"model.layers.1.self_attn.{name}_proj" for name in "qv"]),
    ):
        model = adapted(make_model(), lora(**settings))
        peft.save_adapter(model, lora(**settings), tmp_path / "adapter", base="b")
        assert json.loads((tmp_path / "adapter" / CONFIG).read_text())["target_modules"] == expected


def test_an_adapter_with_its_bases_embedding_is_checked_against_it(tmp_path):
    """PEFT writes the whole base embedding beside a low-rank update of it."""
    model = adapted(make_model(), lora(target_modules=["embed_tokens"]))
    shake(model)
    peft.save_adapter(model, lora(), tmp_path / "a", base="b")
    (tmp_path / "a" / "lit_lora.json").unlink()
    key = "base_model.model.model.embed_tokens.base_layer.weight"
    edit_tensors(tmp_path / "a", lambda t: t.update({key: make_model().model.embed_tokens.weight.detach()}))
    assert load(tmp_path / "a").norm > 0
    with pytest.raises(InputError, match=r"another base model .*embed_tokens"):
        peft.load_adapter(make_model(seed=9), tmp_path / "a")


def smollm2():
    config = ModelConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        return CausalLM(config)


def test_pain_19_a_published_adapter_of_peft_is_read(real_data):
    folder = real_data / "adapters" / "smollm-135m-medical-flashcards-checkpoint-1645"
    adapter = peft.read_adapter(folder)
    assert (adapter.config.rank, adapter.config.base_alpha, adapter.config.dropout) == (16, 32, 0.05)
    assert adapter.base == "HuggingFaceTB/SmolLM-135M-Instruct"
    assert adapter.tensors == 120
    updates = check_base(adapter, peft.base_tensors(smollm2()), smollm2())
    assert len(updates) == 60
    with pytest.raises(InputError, match=r"56 modules \(.*\) of 60 not found in this model"):
        check_base(adapter, peft.base_tensors(make_model()), make_model())


def test_pain_19_a_published_adapter_of_peft_survives_our_writing(real_data, tmp_path):
    source = real_data / "adapters" / "smollm-135m-medical-flashcards-checkpoint-1645"
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({"model": torch.nn.ModuleDict({"layers": torch.nn.ModuleList()})})
    for _ in range(30):
        attention = {"q_proj": torch.nn.Linear(576, 576, bias=False), "v_proj": torch.nn.Linear(576, 192, bias=False)}
        model["model"]["layers"].append(torch.nn.ModuleDict({"self_attn": torch.nn.ModuleDict(attention)}))
    report = peft.load_adapter(model, source)
    peft.save_adapter(model, report.adapter.config, tmp_path / "adapter", base="b")
    old, new = load_file(source / WEIGHTS), load_file(tmp_path / "adapter" / WEIGHTS)
    assert old.keys() == new.keys()
    assert all(torch.equal(old[name].float(), new[name]) for name in old)
    again = json.loads((tmp_path / "adapter" / CONFIG).read_text())
    assert (again["r"], again["lora_alpha"], again["target_modules"]) == (16, 32, ["q_proj", "v_proj"])
    shutil.rmtree(tmp_path / "adapter")


def test_a_rank_beyond_that_of_the_matrix_is_read(tmp_path):
    """PEFT takes any; a start from the weight's own factors is written with twice the rank."""
    base = save_base(make_model(), tmp_path / "base")
    model = adapted(load_model(base), config := lora(init="pissa", rank=16, target_modules=["q_proj"]))
    shake(model)
    peft.save_adapter(model, config, tmp_path / "adapter", base=base)
    report = peft.load_adapter(fresh := load_model(base), tmp_path / "adapter")
    assert report.adapter.config.rank == 32
    torch.testing.assert_close(fresh(token_ids()), model(token_ids()), atol=1e-5, rtol=1e-5)


def test_biases_are_read_under_the_names_of_earlier_versions_of_peft(tmp_path):
    base = save_base(make_model(), tmp_path / "base")
    folder = make_adapter(base, tmp_path / "adapter", target_modules=["q_proj"], bias="lora_only")
    peft.load_adapter(now := load_model(base), folder)
    edit_tensors(folder, lambda t: [t.update({n.replace("base_layer.", ""): t.pop(n)}) for n in list(t) if "bias" in n])
    assert f"{Q_PROJ}.bias" in load_file(folder / WEIGHTS)
    peft.load_adapter(earlier := load_model(base), folder)
    assert torch.equal(earlier(token_ids()), now(token_ids()))


def test_tokens_may_be_those_of_the_embedding_alone_and_in_any_order(tmp_path):
    base = save_base(make_model(), tmp_path / "base")
    folder = make_adapter(base, tmp_path / "adapter", target_modules=["q_proj"], trainable_tokens=[3, 7, VOCABULARY])
    key = "base_model.model.{}.token_adapter.trainable_tokens_delta"
    edit_tensors(folder, lambda t: t.pop(key.format("lm_head")))
    edit_tensors(folder, lambda t: t.update({key.format("model.embed_tokens"): torch.arange(48.0).view(3, 16)}))
    edit_config(folder, trainable_token_indices={"embed_tokens": [VOCABULARY, 3, 7]})
    peft.load_adapter(model := load_model(base), folder)
    embedded = model.model.embed_tokens(torch.tensor([3, 7, VOCABULARY, 4]))
    assert embedded[:3, 0].tolist() == [16, 32, 0]
    assert torch.equal(embedded[3], model.model.embed_tokens.base_layer.weight[4])
    assert isinstance(model.lm_head, torch.nn.Linear)
    edit_config(folder, trainable_token_indices={"embed_tokens": [VOCABULARY, 3]})
    with pytest.raises(InputError, match=r"trainable_token_indices do not match the 3 rows of model\.embed_tokens"):
        peft.read_adapter(folder)


def test_a_saved_embedding_may_have_more_tokens_than_the_base(tmp_path):
    base = save_base(make_model(), tmp_path / "base")
    folder = make_adapter(base, tmp_path / "adapter", target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    key = "base_model.model.model.embed_tokens.weight"
    edit_tensors(folder, lambda t: t.update({key: torch.cat([t[key], torch.ones(2, 16)])}))
    peft.load_adapter(model := load_model(base), folder)
    assert model(torch.tensor([[VOCABULARY + 1]])).isfinite().all()
    updates = check_base(peft.read_adapter(folder), peft.base_tensors(make_model()), make_model())
    assert updates["model.embed_tokens.weight"].rows(VOCABULARY) == VOCABULARY + 2
    edit_tensors(folder, lambda t: t.update({key: t[key][:-3].clone()}))
    with pytest.raises(InputError, match=r"embed_tokens\.weight has shape \[60, 16\], expected \[61, 16\]"):
        peft.load_adapter(load_model(base), folder)


@pytest.mark.parametrize("settings", [{"name": "lora"}, {"name": "ia3"}, {"name": "houlsby"}, {"name": "prefix"}])
def test_a_refused_adapter_leaves_modules_and_gradients_as_they_were(settings, tmp_path):
    config = peft.methods()[settings["name"]].model_validate(settings)
    model = adapted(make_model(), config)
    shake(model)
    peft.save_adapter(model, config, tmp_path / "adapter", base="b")
    other = make_model(seed=9)
    before = {name: type(module) for name, module in other.named_modules()}
    with pytest.raises(InputError, match="another base model"):
        peft.load_adapter(other, tmp_path / "adapter")
    assert {name: type(module) for name, module in other.named_modules()} == before
    assert all(parameter.requires_grad for parameter in other.parameters())


class Counted(Base):
    """A base that counts which of its tensors are read."""

    def __init__(self, model: CausalLM) -> None:
        self.tensors, self.read = peft.base_tensors(model), []

    def __getitem__(self, name):
        self.read.append(name)
        return self.tensors[name]

    def __contains__(self, name):
        return name in self.tensors

    def __iter__(self):
        return iter(self.tensors)

    def __len__(self):
        return len(self.tensors)

    def shape(self, name):
        return self.tensors.shape(name)

    def quantized(self, name):
        return False


@pytest.mark.parametrize(
    ("settings", "read"),
    [
        ({"name": "lora", "modules_to_save": ["lm_head"]}, []),
        ({"name": "ia3"}, []),
        ({"name": "dora", "target_modules": "q,v"}, ["q_proj", "v_proj"] * 2),
        ({"name": "glora", "target_modules": ["k_proj"], "C": "vector"}, ["k_proj"] * 2),
    ],
    ids=lambda value: value["name"] if isinstance(value, dict) else "",
)
def test_a_base_in_files_is_read_as_far_as_the_method_needs_it(settings, read, tmp_path):
    config = peft.methods()[settings["name"]].model_validate(settings)
    model = adapted(make_model(), config)
    shake(model)
    expected = model_updates(model)
    peft.save_adapter(model, config, tmp_path / "adapter", base="b")
    base, config_of_base = Counted(make_model()), make_model().config
    with torch.device("meta"):
        empty = CausalLM(config_of_base)
    updates = check_base(peft.read_adapter(tmp_path / "adapter"), base, empty, force=True)
    assert [name.split(".")[-2] for name in base.read] == read
    for name, update in expected.items():
        weight = base.tensors[name]
        rows = update.rows(len(weight))
        assert torch.equal(updates[name].apply(weight, 0, rows), update.apply(weight, 0, rows))
