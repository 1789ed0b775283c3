"""Added modules and prompts one by one: their equations, published counts, and what their settings refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lit_lora import peft
from lit_lora.errors import UsageError
from lit_lora.model import CausalLM, ModelConfig
from lit_lora.peft.adapters.bottleneck import drop_layers
from lit_lora.peft.core.modules import own_modules
from tests.peft.tiny import LAYERS, WIDTH, adapted, make_model, shake, token_ids

TEXT = [5, 9, 11]


def method(name: str, **settings: Any) -> peft.Method:
    return peft.methods()[name].model_validate({"name": name, **settings})


def with_method(name: str, model: nn.Module | None = None, **settings: Any) -> Any:
    return adapted(model or make_model(), method(name, **settings)).eval()


def on_meta(**sizes: int) -> CausalLM:
    """A decoder without memory for its weights."""
    config = {"vocab_size": 32000, "intermediate_size": 11008, "tie_word_embeddings": False, "head_dim": 128}
    with torch.device("meta"):
        return CausalLM(ModelConfig.model_validate({**config, **sizes}))


def llama_2_7b() -> CausalLM:
    return on_meta(hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=32)


@pytest.mark.parametrize(
    ("name", "settings", "expected"),
    [
        ("llama-adapter", {"adapter_len": 10, "adapter_layers": 30}, 1_229_760),
        ("llama-adapter", {}, 1_229_760),
        ("llama-adapter-v2", {"adapter_len": 10}, 4_279_744),
        ("prompt", {"num_virtual_tokens": 5}, 20_480),
        ("prefix", {"num_virtual_tokens": 7}, 7 * 2 * 32 * 4096),
        ("houlsby", {"train_norms": False}, 64 * (2 * 64 * 4096 + 4096 + 64)),
        ("houlsby", {"train_norms": True}, 64 * (2 * 64 * 4096 + 4096 + 64) + 266_240),
        ("houlsby", {"train_norms": True, "drop_layers": 31}, 2 * (2 * 64 * 4096 + 4096 + 64) + 3 * 4096),
        ("parallel", {"bottleneck": 512}, 32 * (2 * 512 * 4096 + 4096 + 512)),
    ],
)
def test_counts_on_llama_2_7b_are_those_that_were_published(name, settings, expected):
    model = llama_2_7b()
    peft.freeze(model)
    method(name, **settings).apply(model)
    assert peft.count_parameters(model).trainable == expected
    assert sum(row.trainable for row in peft.matched_table(model)) == expected


def test_a_prefix_of_five_on_gpt_2_medium_has_245760_numbers():
    model = on_meta(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, num_key_value_heads=16, head_dim=64)
    peft.freeze(model)
    method("prefix", num_virtual_tokens=5).apply(model)
    assert peft.count_parameters(model).trainable == 245_760


def test_counts_on_bert_and_gpt_2_of_transformers_are_those_that_were_published():
    from transformers import BertConfig, BertModel, GPT2Config, GPT2Model

    with torch.device("meta"):
        bert, gpt2 = BertModel(BertConfig()), GPT2Model(GPT2Config())
    peft.freeze(bert)
    method("houlsby", target_modules=["output.dense"], train_norms=False).apply(bert)
    assert peft.count_parameters(bert).trainable == 2_379_264
    peft.freeze(gpt2)
    method("lin", task_embedding=False).apply(gpt2)
    assert peft.count_parameters(gpt2).trainable == 1_872_048


def test_adapters_work_in_an_encoder_of_transformers():
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 24}
    bert = BertModel(BertConfig(vocab_size=61, **sizes), add_pooling_layer=False).eval()
    expected = bert(token_ids()).last_hidden_state
    peft.freeze(bert)
    method("houlsby", target_modules=["output.dense"], init_zero=True).apply(bert)
    assert torch.equal(bert(token_ids()).last_hidden_state, expected)
    bert(token_ids()).last_hidden_state.square().sum().backward()
    assert all(p.grad is not None for p in bert.parameters() if p.requires_grad)
    shake(bert)
    assert not torch.allclose(bert(token_ids()).last_hidden_state, expected, atol=1e-2)
    peft.remove(bert)
    assert torch.equal(bert(token_ids()).last_hidden_state, expected)


def seen(module: nn.Module, model: nn.Module) -> tuple[Any, Any]:
    """What a module is given and gives in one pass."""
    found = []
    hook = module.register_forward_hook(lambda _, args, output: found.append((args, output)))
    with torch.no_grad():
        model(token_ids())
    hook.remove()
    return found[0]


@pytest.mark.parametrize(
    ("activation", "function"), [("gelu", F.gelu), ("relu", F.relu), ("silu", F.silu), ("none", lambda x: x)]
)
def test_a_serial_adapter_computes_its_equation(activation, function):
    plain = make_model()
    model = with_method("houlsby", activation=activation, train_norms=False, target_modules=["layers.0.mlp"])
    shake(model)
    (adapter,) = own_modules(model).values()
    _, before = seen(plain.model.layers[0].mlp, plain)
    _, after = seen(model.model.layers[0].mlp, model)
    middle = function(before @ adapter.down.T + adapter.down_bias)
    torch.testing.assert_close(after, before + middle @ adapter.up.T + adapter.up_bias, atol=1e-5, rtol=1e-5)


def test_a_parallel_adapter_computes_its_equation():
    model = with_method("parallel", target_modules=["layers.0.mlp"], scale=3.0)
    shake(model)
    (adapter,) = own_modules(model).values()
    (x,), after = seen(model.model.layers[0].mlp, model)
    mlp = make_model().model.layers[0].mlp
    expected = mlp(x) + 3 * (F.relu(x @ adapter.down.T + adapter.down_bias) @ adapter.up.T + adapter.up_bias)
    torch.testing.assert_close(after, expected, atol=1e-5, rtol=1e-5)


def test_an_adapter_after_a_block_computes_its_equation():
    plain, model = make_model(), with_method("lin", task_embedding=False)
    shake(model)
    adapter = own_modules(model)["model.layers.0.adapter"]
    _, (x, delta) = seen(plain.model.layers[0], plain)
    _, (stream, branch) = seen(model.model.layers[0], model)
    h = x + delta
    torch.testing.assert_close(stream, h)
    normed = F.layer_norm(h, (WIDTH,), adapter.norm, adapter.norm_bias)
    expected = F.relu(normed @ adapter.down.T + adapter.down_bias) @ adapter.up.T + adapter.up_bias
    torch.testing.assert_close(branch, expected, atol=1e-5, rtol=1e-5)


def test_a_task_embedding_is_added_to_every_token():
    plain, model = make_model(), with_method("lin", init_zero=True)
    model.model.embed_tokens.task.vector.data.normal_()
    expected = plain.model.embed_tokens(token_ids()) + model.model.embed_tokens.task.vector
    assert torch.equal(model.model.embed_tokens(token_ids()), expected)


def test_dropped_layers_have_no_adapter_and_nothing_below_is_differentiated():
    model = with_method("houlsby", drop_layers=1, train_norms=False).train()
    assert {module.layer for module in own_modules(model).values()} == {1}
    needs: dict[int, bool] = {}
    for index, layer in enumerate(model.model.layers):
        layer.register_forward_hook(lambda _, args, out, i=index: needs.update({i: out[1].requires_grad}))
    model(token_ids())
    assert needs == {0: False, 1: True}


def test_adapters_dropped_at_inference_are_as_if_they_had_never_been():
    model = with_method("houlsby", train_norms=False)
    shake(model)
    upper = with_method("houlsby", train_norms=False, drop_layers=1)
    values = peft.trainable_state(model)
    with torch.no_grad():
        for name, value in peft.trainable_state(upper).items():
            value.copy_(values[name])
    drop_layers(model, 1)
    assert torch.equal(model(token_ids()), upper(token_ids()))
    drop_layers(model, LAYERS)
    assert torch.equal(model(token_ids()), make_model().eval()(token_ids()))


def test_norms_that_train_with_adapters_are_dropped_with_them():
    model, base = with_method("houlsby"), make_model().eval()
    shake(model)
    drop_layers(model, 1)
    hidden = {}
    for name, of in (("base", base), ("dropped", model)):
        of.model.layers[0].register_forward_hook(lambda _, args, out, n=name: hidden.update({n: out}))
        of(token_ids())
    assert all(torch.equal(one, other) for one, other in zip(hidden["base"], hidden["dropped"], strict=True))
    assert not torch.equal(model(token_ids()), base(token_ids()))
    drop_layers(model, LAYERS)
    left = [name for name in own_modules(model) if ".layers." in name]
    assert left == []


@pytest.mark.parametrize(("name", "first"), [("houlsby", -1), ("houlsby", LAYERS + 1), ("prefix", 1)])
def test_layers_that_cannot_be_dropped_are_told(name, first):
    with pytest.raises(UsageError, match="drop_layers"):
        drop_layers(with_method(name), first)


def test_robust_dropping_draws_anew_for_every_batch_in_training_and_drops_nothing_after():
    model = with_method("parallel", drop_layers="random")
    shake(model)
    whole = with_method("parallel")
    shake(whole)
    assert torch.equal(model(token_ids()), whole(token_ids()))
    drop_layers(whole, 1)
    outputs = [model.train()(token_ids()) for _ in range(20)]
    kinds = [torch.equal(output, whole(token_ids())) for output in outputs]
    assert 4 < sum(kinds) < 16  # one layer dropped about as often as none
    kept = [output for output, dropped in zip(outputs, kinds, strict=True) if not dropped]
    assert all(torch.equal(output, model.eval()(token_ids())) for output in kept)


@pytest.mark.parametrize(
    ("name", "settings", "tolerance"),
    [
        ("prefix", {}, 1e-5),
        ("prefix", {"prefix_projection": True, "encoder_hidden_size": 8}, 1e-3),
        ("prompt", {}, 1e-5),
    ],
)
def test_what_starts_from_a_text_is_that_text_before_every_document(name, settings, tolerance):
    model = with_method(name, num_virtual_tokens=3, init_text=TEXT, **settings)
    documents = [[1, 2, 3, 4], [7], [20, 21]]
    row = torch.tensor([[token for document in documents for token in document]])
    with torch.no_grad():
        got = model(row, lengths=[len(document) for document in documents])[0]
        plain = make_model().eval()
        alone = [plain(torch.tensor([TEXT + document]))[0, 3:] for document in documents]
    torch.testing.assert_close(got, torch.cat(alone), atol=tolerance, rtol=tolerance)


def test_p_tuning_with_an_encoder_that_does_nothing_is_its_template():
    model = with_method("p-tuning", template=[1, [9], 1], init_text=[5, 11], encoder="mlp")
    model.model.prompt.mlp_head = nn.Identity()
    with torch.no_grad():
        expected = make_model().eval()(torch.tensor([[*TEXT, 1, 2, 3]]))[:, 3:]
        torch.testing.assert_close(model(torch.tensor([[1, 2, 3]])), expected, atol=1e-5, rtol=1e-5)


def test_fixed_tokens_of_a_template_do_not_train():
    model = with_method("p-tuning", template=[1, [9], 2])
    assert model.model.prompt.prefix_length == 4
    assert len(model.model.prompt.embedding) == 3
    assert torch.equal(model.model.prompt.rows()[1], make_model().model.embed_tokens.weight[9])
    assert not model.model.prompt.fixed.requires_grad


def test_rows_of_an_adaption_prompt_have_no_order_and_a_gate_opens_one_head():
    model = with_method("llama-adapter", adapter_len=4, adapter_layers=1)
    (adaption,) = own_modules(model).values()
    attention = model.model.layers[-1].self_attn
    (closed,), _ = seen(attention.o_proj, model)
    with torch.no_grad():
        adaption.adaption_gate[2] = 0.7
    (opened,), _ = seen(attention.o_proj, model)
    changed = (opened != closed).view(len(opened), 4, 4).any(-1).any(0)
    assert changed.tolist() == [False, False, True, False]
    with torch.no_grad():
        logits = model(token_ids())
        adaption.adaption_prompt.copy_(adaption.adaption_prompt[[2, 0, 3, 1]])
        torch.testing.assert_close(model(token_ids()), logits, atol=1e-5, rtol=1e-5)


def test_gated_attention_computes_its_equation():
    """The sum of two softmaxes, written out for the first token, where the first is one."""
    model = with_method("llama-adapter", adapter_len=4, adapter_layers=2)
    shake(model, 0.5)
    attention = model.model.layers[0].self_attn
    (x, _), _ = seen(attention, model)
    (context,), _ = seen(attention.o_proj, model)
    adaption = attention.adaption
    for head in range(4):
        size, group = slice(4 * head, 4 * head + 4), slice(4 * (head // 2), 4 * (head // 2) + 4)
        query = attention.q_proj(x)[0, size]  # position 0: not turned
        keys, values = (project(adaption.adaption_prompt)[:, group] for project in (attention.k_proj, attention.v_proj))
        chances = torch.softmax(keys @ query / 2, dim=0)
        expected = attention.v_proj(x)[0, group] + adaption.adaption_gate[head] * (chances @ values)
        torch.testing.assert_close(context[0, size], expected, atol=1e-5, rtol=1e-5)


def test_scale_and_bias_compute_their_equation_and_version_2_without_them_is_version_1():
    second = with_method("llama-adapter-v2", adapter_len=3)
    first = with_method("llama-adapter", adapter_len=3)
    for model in (first, second):
        for module in own_modules(model).values():
            if hasattr(module, "adaption_gate"):
                module.adaption_gate.data.fill_(0.5)
                module.adaption_prompt.data.copy_(torch.arange(3 * WIDTH).view(3, WIDTH) / 30)
    torch.testing.assert_close(second(token_ids()), first(token_ids()), atol=1e-6, rtol=1e-6)
    linear = second.model.layers[0].mlp.up_proj
    linear.scale_and_bias.scale.data.normal_()
    linear.scale_and_bias.bias.data.normal_()
    x = torch.randn(3, WIDTH)
    expected = linear.scale_and_bias.scale * (x @ linear.weight.T + linear.scale_and_bias.bias)
    if linear.bias is not None:
        expected += linear.scale_and_bias.scale * linear.bias
    torch.testing.assert_close(linear(x), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("houlsby", {"target_modules": ["mpl"]}, r"peft.target_modules: 'mpl' matches no module \(did you mean 'mlp'"),
        ("houlsby", {"drop_layers": 2}, "peft.drop_layers: expected 0 to 1, fewer than all layers, got 2"),
        ("llama-adapter", {"adapter_layers": 3}, "peft.adapter_layers: expected at most the model's 2 layers, got 3"),
        ("prefix", {"num_virtual_tokens": 2048}, "2048 virtual tokens leave no room in the model's context of 2048"),
        ("prompt", {"num_virtual_tokens": 4000}, "4000 virtual tokens leave no room in the model's context of 2048"),
        ("prompt", {"init_text": [61]}, "peft.init_text: expected ids from 0 to 60"),
        ("prefix", {"init_text": "words"}, "peft.init_text: expected token ids, got text"),
        ("p-tuning", {"template": [1, "words"]}, "peft.template: expected token ids, got text"),
        ("p-tuning", {"template": [1, [77]]}, "peft.template: expected token ids from 0 to 60"),
        ("residual", {}, "this model has no Conv2d"),
    ],
)
def test_settings_that_do_not_fit_the_model_are_told_in_one_line(name, settings, message):
    with pytest.raises(UsageError, match=message) as caught:
        with_method(name, **settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["prefix", "prompt", "p-tuning", "llama-adapter"])
def test_what_needs_our_attention_refuses_other_models(name):
    with pytest.raises(UsageError, match="puts tokens before every document"):
        method(name).apply(nn.Sequential(nn.Linear(2, 2)))


def test_two_methods_before_every_document_are_refused():
    model = with_method("prefix")
    with pytest.raises(UsageError, match="already has a prefix or prompt"):
        method("prompt").apply(model)
    with pytest.raises(UsageError, match="already has a prefix or prompt"):
        method("prefix").apply(model)
    with pytest.raises(UsageError, match="the model already has a module named adapter"):
        method("houlsby").apply(with_method("houlsby"))


def test_composed_methods_learn_each_at_its_own_rate():
    config = method("composed", methods=[{"name": "lora", "loraplus_lr_ratio": 4.0}, {"name": "prefix"}])
    model = adapted(make_model(), config)
    factors = config.lr_factors(model)
    assert factors["model.prefix.embedding"] == 10
    # LoRA+'s own rate is a tenth of LoRA's, for A; B learns at loraplus_lr_ratio times that.
    assert factors["model.layers.0.mlp.up_proj.lora_A"] == pytest.approx(0.1)
    assert factors["model.layers.0.mlp.up_proj.lora_B"] == pytest.approx(0.4)
    assert len(factors) == 1 + 2 * 7 * LAYERS


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("prefix", {"init": "random", "init_text": "a"}, "init_text has no effect"),
        ("prompt", {"init": "random", "init_text": "a"}, "init_text has no effect"),
        ("p-tuning", {"template": ["a", "b"]}, "expected numbers of virtual tokens and texts"),
        ("p-tuning", {"template": [0, "b"]}, "expected numbers of virtual tokens and texts"),
        ("p-tuning", {"template": [3, "b"], "num_virtual_tokens": 4}, "the template has 3 virtual tokens"),
        ("p-tuning", {"encoder": "mlp", "encoder_num_layers": 3}, "encoder_num_layers has no effect"),
        ("houlsby", {"drop_layers": "random"}, "expected train_norms: false"),
        ("llama-adapter", {"gate": "per-tensor"}, "per-head"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(name, settings, message):
    with pytest.raises(ValueError, match=message):
        method(name, **settings)
