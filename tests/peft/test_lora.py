"""LoRA's settings on a model: which modules are adapted, what is refused, and what trains."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lit_lora import peft
from lit_lora.config import validate
from lit_lora.errors import UsageError
from lit_lora.peft.core.matching import matches
from lit_lora.peft.core.modules import own_modules
from lit_lora.peft.core.modules_to_save import TokenEmbedding, TokenHead
from lit_lora.peft.lora.config import LoRAConfig
from lit_lora.peft.lora.linear import LoRALinear
from tests.peft.tiny import VOCABULARY, adapted, lora, make_model, shake, token_ids

ALL_LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def targets(**settings):
    return set(own_modules(adapted(make_model(), lora(**settings))))


@pytest.mark.parametrize(
    ("pattern", "matched"),
    [
        ("q_proj", True),
        ("self_attn.q_proj", True),
        ("model.layers.0.self_attn.q_proj", True),
        ("model.layers.*.q_proj", True),
        ("layers.0.*", True),
        ("*_proj", True),
        ("proj", False),
        ("attn.q_proj", False),
        ("layers.1.*", False),
        ("model.layers", False),
        ("Q_PROJ", False),
    ],
)
def test_a_pattern_matches_whole_parts_of_a_name(pattern, matched):
    assert matches(pattern, "model.layers.0.self_attn.q_proj") is matched


def test_all_linear_is_every_linear_layer_but_the_head():
    names = targets()
    assert {name.rpartition(".")[2] for name in names} == ALL_LINEAR
    assert len(names) == 2 * len(ALL_LINEAR)


def test_the_papers_preset_is_queries_and_values():
    assert {name.rpartition(".")[2] for name in targets(target_modules="q,v")} == {"q_proj", "v_proj"}


def test_layers_and_exclusions_narrow_the_targets():
    names = targets(layers=[1], exclude_modules=["mlp.*", "layers.1.self_attn.o_proj"])
    assert names == {f"model.layers.1.self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj")}


def test_layers_leave_a_named_head_in():
    assert targets(layers=[0], target_modules=["q_proj", "lm_head"]) == {"model.layers.0.self_attn.q_proj", "lm_head"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"target_modules": ["q_prj", "v_proj"]},
            r"'q_prj' matches no module \(did you mean 'q_proj'\?\), available: ",
        ),
        ({"target_modules": ["FAKE"]}, r"'FAKE' matches no module, available: .*q_proj.*lm_head"),
        ({"target_modules": ["gate_projx", "up_projx"]}, r"(?s)'gate_projx'.*\n.*'up_projx'"),
        ({"target_modules": ["q_proj", "self_attn"]}, "'self_attn' matches no module"),
        ({"target_modules": ["q_prj", "norm", "act"]}, r"(?s)'q_prj' matches .*\n.*'norm' is of the wrong.*\n.*'act'"),
        (
            {"target_modules": ["k_proj", "q_prj"], "rank": 9, "rank_pattern": {"q_proj": 4}},
            r"^peft.target_modules: 'q_prj' matches .*\npeft.rank: 9 is too large for .*k_proj \(8×16\).* at most 8$",
        ),
        ({"target_modules": []}, "no module is left"),
        ({"exclude_modules": ["lm_head"]}, r"exclude_modules: 'lm_head' matches no module"),
        ({"exclude_modules": ["*"]}, "no module is left"),
        ({"layers": [2]}, r"layer 2 has no target; targets are in layers 0 to 1"),
        ({"rank_pattern": {"q_porj": 4}}, r"rank_pattern: 'q_porj' matches no module \(did you mean 'q_proj'"),
        ({"alpha_pattern": {"lm_head": 4}}, "alpha_pattern: 'lm_head' matches no module"),
        ({"rank": 9}, r"peft\.rank: 9 is too large for .*k_proj \(8×16\), expected at most 8"),
        ({"rank_pattern": {"q_proj": 0}}, "expected more than 0, got 0"),
        ({"modules_to_save": ["lm_haed"]}, r"modules_to_save: 'lm_haed' matches no module \(did you mean 'lm_head'"),
        ({"target_modules": ["lm_head"], "modules_to_save": ["lm_head"]}, "in both target_modules and modules_to_save"),
        ({"trainable_tokens": [1], "target_modules": ["embed_tokens"]}, "in target_modules and has trainable_tokens"),
        ({"trainable_tokens": [1], "modules_to_save": ["lm_head"]}, "in modules_to_save and has trainable_tokens"),
        ({"trainable_tokens": ["<tool>"]}, "expected token ids, got texts"),
        ({"trainable_tokens": [VOCABULARY + 1]}, f"new ones from {VOCABULARY} on without gaps"),
        ({"trainable_tokens": [-1]}, "expected ids >= 0"),
    ],
)
def test_pain_09_what_matches_nothing_is_an_error_with_a_suggestion(settings, message):
    with pytest.raises(UsageError, match=message):
        adapted(make_model(), lora(**settings))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_modules": 3}, r"c\.yaml: target_modules: expected all-linear, q,v or a list of names, got 3"),
        ({"trainable_tokens": [1, "a"]}, r"c\.yaml: trainable_tokens: expected a list of token ids or a list of token"),
        ({"trainable_tokens": "a"}, r"c\.yaml: trainable_tokens: expected a list"),
        ({"rank": 0}, "rank: input should be greater than or equal to 1, got 0"),
        ({"r": 8}, "unknown key 'r'"),
    ],
)
def test_wrong_settings_are_one_line_with_their_key(settings, message):
    with pytest.raises(UsageError, match=message) as error:
        validate({"name": "lora", **settings}, LoRAConfig, name="c.yaml")
    assert len(str(error.value).splitlines()) == 1


def test_lora_plus_gives_every_b_its_own_rate_and_nothing_else():
    model = adapted(make_model(), lora(loraplus_lr_ratio=16, target_modules=["q_proj", "embed_tokens"]))
    factors = lora(loraplus_lr_ratio=16).lr_factors(model)
    assert factors == {f"model.layers.{n}.self_attn.q_proj.lora_B": 16.0 for n in (0, 1)}
    assert peft.lr_factors(lora(), model) == {}


def test_a_frozen_a_keeps_only_its_product_for_the_backward():
    def saved_bytes(**settings):
        sizes = {}

        def keep(tensor):
            sizes[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
            return tensor

        layer = adapted(nn.Sequential(nn.Linear(256, 256)), lora(rank=4, **settings))
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            layer(torch.randn(512, 256))
        weights = {p.data_ptr() for p in layer.parameters()}
        return sum(size for place, size in sizes.items() if place not in weights)

    assert saved_bytes(freeze_A=True) == 512 * 4 * 4
    assert saved_bytes() == 512 * (4 + 256) * 4


def test_names_can_be_given_with_commas():
    assert targets(target_modules="q_proj, v_proj") == targets(target_modules=["q_proj", "v_proj"])


def test_pain_09_the_table_shows_what_was_matched():
    model = adapted(make_model(), lora(rank_pattern={"layers.1.self_attn.q_proj": 2}, modules_to_save=["model.norm"]))
    rows = {(row.pattern, row.shape): (row.count, row.trainable) for row in peft.matched_table(model)}
    assert rows["model.layers.*.self_attn.q_proj", "16×16, rank 8"] == (1, 8 * 32)
    assert rows["model.layers.*.self_attn.q_proj", "16×16, rank 2"] == (1, 2 * 32)
    assert rows["model.layers.*.mlp.down_proj", "16×24, rank 8"] == (2, 2 * 8 * 40)
    assert sum(trainable for _, trainable in rows.values()) == peft.count_parameters(model).trainable
    assert any(pattern.startswith("model.norm") for pattern, _ in rows)


def test_asking_for_biases_where_there_are_none_is_an_error():
    model = nn.Sequential(nn.Linear(4, 4, bias=False))
    with pytest.raises(UsageError, match="no bias to train"):
        lora(bias="all", rank=2).apply(model)


def test_a_second_adapter_is_refused():
    model = adapted(make_model(), lora())
    with pytest.raises(UsageError, match="already has an adapter"):
        lora().apply(model)


def test_pain_08_training_through_activation_checkpointing_gives_the_same_gradients():
    def gradients(wrap):
        model = adapted(make_model(), lora(dropout=0.3)).train()
        shake(model)
        for layer in model.model.layers if wrap else []:
            layer.forward = lambda *args, inner=layer.forward: checkpoint(inner, *args, use_reentrant=False)
        torch.manual_seed(7)
        F.cross_entropy(model(token_ids()).flatten(0, 1), token_ids().flatten()).backward()
        return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}

    plain, wrapped = gradients(False), gradients(True)
    assert plain.keys() == wrapped.keys()
    for name, gradient in plain.items():
        assert gradient.abs().sum() > 0, name
        torch.testing.assert_close(wrapped[name], gradient)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_pain_11_a_small_learning_rate_moves_the_adapter_on_a_half_precision_base(dtype):
    model = adapted(make_model(dtype=dtype), lora()).train()
    before = {name: value.clone() for name, value in peft.trainable_state(model).items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    for _ in range(50):
        loss = F.cross_entropy(model(token_ids()).flatten(0, 1).float(), token_ids().flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert math.isfinite(loss.item())
    for name, value in peft.trainable_state(model).items():
        assert value.dtype == torch.float32
        # 50 steps of up to 1e-5: in bfloat16 a value of 0.1 would not have moved at all
        assert (value - before[name]).abs().max() > 5e-5, name
    moments = [value for state in optimizer.state.values() for value in state.values() if value.ndim]
    assert {value.dtype for value in moments} == {torch.float32}


def test_dropout_acts_on_the_branch_in_training_only():
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(64, 8), rank=4, scaling=1.0, dropout=0.5)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(4000, 64)
    kept = layer.eval()(x)
    assert torch.equal(layer(x), kept)
    dropped = layer.train()(x)
    assert not torch.equal(dropped, kept)
    branch, noisy = kept - layer.base_layer(x), dropped - layer.base_layer(x)
    slope = (branch * noisy).sum() / branch.square().sum()
    assert abs(slope - 1) < 0.05  # the same on average
    nn.init.zeros_(layer.lora_B)
    assert torch.equal(layer(x), layer.base_layer(x))


def test_init_follows_the_reference():
    torch.manual_seed(0)
    kaiming = LoRALinear(nn.Linear(512, 8), 64, 1.0).lora_A
    assert kaiming.abs().max() <= 1 / math.sqrt(512)
    assert abs(kaiming.std().item() * math.sqrt(3 * 512) - 1) < 0.02
    gaussian = LoRALinear(nn.Linear(512, 8), 64, 1.0, init="gaussian").lora_A
    assert abs(gaussian.std().item() * 64 - 1) < 0.02


@pytest.mark.parametrize(
    ("settings", "scaling"),
    [({}, 2.0), ({"rank": 4}, 2.0), ({"rank": 4, "alpha": 4}, 1.0), ({"rank": 4, "use_rslora": True}, 4.0)],
)
def test_scaling_is_alpha_over_rank_or_its_root(settings, scaling):
    model = adapted(make_model(), lora(**settings))
    assert {module.scaling for module in own_modules(model).values()} == {scaling}


def test_the_paper_counts_come_out():
    """GPT-3's q and v at rank 1: 4.7 million; Llama-2-7B, all linear layers at rank 8: 20 million."""

    def count(linears, layers, rank):
        with torch.device("meta"):
            model = nn.ModuleList(nn.Linear(wide, out, bias=False) for wide, out in linears)
        peft.freeze(model)
        with torch.device("meta"):
            lora(rank=rank, dropout=0.0).apply(model)
        return layers * peft.count_parameters(model).trainable

    assert count([(12288, 12288)] * 2, 96, 1) == 4_718_592
    assert count([(4096, 4096)] * 4 + [(4096, 11008)] * 2 + [(11008, 4096)], 32, 8) == 19_988_480


def test_any_tree_of_linear_layers_can_be_adapted():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.ModuleDict({"score": nn.Linear(8, 3)})["score"])
    x, expected = torch.randn(5, 6), None
    expected = model(x)
    peft.freeze(model)
    lora(target_modules=["0"], modules_to_save=["2"], rank=2).apply(model)
    assert torch.equal(model(x), expected)
    assert set(own_modules(model)) == {"0", "2"}
    peft.remove(model)
    assert torch.equal(model(x), expected)


def test_modules_to_save_take_the_modules_inside_them():
    model = adapted(make_model(), lora(target_modules="q,v", modules_to_save=["layers.0.mlp"]))
    copies = {name for name in own_modules(model) if "mlp" in name}
    assert copies == {f"model.layers.0.mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")}


def test_pain_15_tokens_named_by_text_are_added_by_the_tokenizer():
    asked = []
    config = lora(trainable_tokens=["<tool>", "</tool>"]).with_token_ids(
        lambda texts: asked.extend(texts) or [VOCABULARY + index for index in range(len(texts))]
    )
    assert asked == ["<tool>", "</tool>"]
    assert config.trainable_tokens == [VOCABULARY, VOCABULARY + 1]
    assert lora(trainable_tokens=[1]).with_token_ids(None).trainable_tokens == [1]
    assert peft.with_token_ids(peft.methods()["ia3"](), None) == peft.methods()["ia3"]()


@pytest.mark.parametrize("tied", [False, True])
def test_pain_14_15_trained_tokens_share_their_rows_where_embedding_and_head_are_tied(tied):
    model = adapted(make_model(tied), lora(target_modules="q,v", trainable_tokens=[VOCABULARY, 3, VOCABULARY + 1]))
    embedding, head = model.model.embed_tokens, model.lm_head
    assert isinstance(embedding, TokenEmbedding)
    assert isinstance(head, TokenHead)
    assert (embedding.token_rows is head.token_rows) == tied
    assert embedding.ids == (3, VOCABULARY, VOCABULARY + 1)
    mean = embedding.base_layer.weight.mean(0)
    torch.testing.assert_close(embedding.token_rows[1].detach(), mean.detach())
    assert torch.equal(embedding.token_rows[0].detach(), embedding.base_layer.weight[3])
    ids = torch.tensor([[3, VOCABULARY + 1, 5]])
    assert torch.equal(embedding(ids)[0, 0], embedding.token_rows[0])
    assert torch.equal(embedding(ids)[0, 1], embedding.token_rows[2])
    assert torch.equal(embedding(ids)[0, 2], embedding.base_layer.weight[5])
    assert model(ids).shape == (1, 3, VOCABULARY + 2)
    trained = peft.count_parameters(model).trainable
    lora_only = peft.count_parameters(adapted(make_model(tied), lora(target_modules="q,v"))).trainable
    assert trained - lora_only == 3 * 16 * (1 if tied else 2)


def test_full_finetuning_of_named_modules_refuses_a_name_that_matches_nothing():
    model = make_model()
    full = peft.methods()["full"]
    with pytest.raises(UsageError, match=r"peft.train: 'layer.0' matches no module"):
        full.model_validate({"name": "full", "train": ["layer.0"]}).apply(model)
