"""Our LoRA against PEFT, live: same tensors, same outputs and gradients; each opens the other's files."""

from __future__ import annotations

import importlib.util
import warnings

import pytest
import torch
from torch.nn import functional as F

from lit_lora import peft as ours
from lit_lora.checkpoint.load import load_model

if importlib.util.find_spec("peft") is None:
    pytest.skip("peft is not installed", allow_module_level=True)

SIZES = {
    "vocab_size": 53,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "attention_bias": True,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

# PEFT's settings, and ours that mean the same
CASES = {
    "q,v": ({"target_modules": ["q_proj", "v_proj"], "r": 4, "lora_alpha": 8}, {"target_modules": "q,v", "rank": 4}),
    "all-linear": ({"target_modules": "all-linear", "r": 2, "lora_alpha": 3}, {"rank": 2, "alpha": 3.0}),
    "rslora": (
        {"target_modules": "all-linear", "r": 4, "lora_alpha": 8, "use_rslora": True},
        {"rank": 4, "use_rslora": True},
    ),
    "patterns": (
        {
            "target_modules": ["q_proj", "down_proj"],
            "r": 4,
            "lora_alpha": 8,
            "rank_pattern": {"down_proj": 3, r"^model\.layers\.1\.self_attn\.q_proj": 6},
            "alpha_pattern": {"layers.0.self_attn.q_proj": 5},
        },
        {
            "target_modules": ["q_proj", "down_proj"],
            "rank": 4,
            "rank_pattern": {"down_proj": 3, "layers.1.self_attn.q_proj": 6},
            "alpha_pattern": {"layers.0.self_attn.q_proj": 5.0},
        },
    ),
    "layers": (
        {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1], "r": 4, "lora_alpha": 8},
        {"target_modules": ["q_proj", "up_proj"], "layers": [1], "rank": 4},
    ),
    "exclude": (
        {"target_modules": "all-linear", "exclude_modules": ["o_proj"], "r": 4, "lora_alpha": 8},
        {"exclude_modules": ["o_proj"], "rank": 4},
    ),
    "bias all": (
        {"target_modules": ["q_proj"], "bias": "all", "r": 4, "lora_alpha": 8},
        {"target_modules": ["q_proj"], "bias": "all", "rank": 4},
    ),
    "bias lora_only": (
        {"target_modules": ["q_proj"], "bias": "lora_only", "r": 4, "lora_alpha": 8},
        {"target_modules": ["q_proj"], "bias": "lora_only", "rank": 4},
    ),
    "embedding and head": (
        {"target_modules": ["q_proj", "embed_tokens", "lm_head"], "r": 4, "lora_alpha": 8},
        {"target_modules": ["q_proj", "embed_tokens", "lm_head"], "rank": 4},
    ),
    "modules_to_save": (
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "model.norm"], "r": 4, "lora_alpha": 8},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "model.norm"], "rank": 4},
    ),
    "tokens": (
        {
            "target_modules": ["q_proj"],
            "trainable_token_indices": {"embed_tokens": [5, 7], "lm_head": [5, 7]},
            "r": 4,
            "lora_alpha": 8,
        },
        {"target_modules": ["q_proj"], "trainable_tokens": [7, 5], "rank": 4},
    ),
}

both_ties = pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
every_case = pytest.mark.parametrize("case", CASES)


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Folders of tiny random Llama models of transformers, by tie."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folders = {}
    for tied in (False, True):
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=tied))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim == 1:
                    parameter.normal_(1.0 if "norm" in name else 0.0, 0.2)
        folders[tied] = tmp_path_factory.mktemp("base")
        model.save_pretrained(folders[tied])
    return folders


def theirs_of(folder):
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def peft_model(folder, case):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_peft_model(theirs_of(folder), LoraConfig(**CASES[case][0], task_type="CAUSAL_LM")).eval()


def our_model(folder, case=None):
    model = load_model(folder).eval()
    if case is not None:
        ours.freeze(model)
        config = ours.methods()["lora"].model_validate({"name": "lora", **CASES[case][1]})
        config.apply(model)
        return model, config
    return model


def shake(model):
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)


def save_peft(model, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)
    return folder


def open_in_peft(base, folder):
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("error")  # PEFT only warns of keys that it misses or does not know
        warnings.filterwarnings("ignore", category=FutureWarning)  # of transformers, about PEFT
        warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")
        return PeftModel.from_pretrained(base, folder).eval()


def ids():
    tokens = torch.randint(0, SIZES["vocab_size"], (2, 11), generator=torch.Generator().manual_seed(3))
    tokens[0, 2:4] = torch.tensor([5, 7])
    return tokens


def loss_of(model, tokens):
    logits = model(tokens)
    logits = getattr(logits, "logits", logits)
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def gradients(model):
    """Gradients of all that trains, each under our parameter's name."""
    found = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        assert parameter.grad is not None, name
        for old, new in {
            "base_model.model.": "",
            ".default": "",
            "lora_A.weight": "lora_A",
            "lora_B.weight": "lora_B",
            "lora_embedding_": "lora_",
            "modules_to_save.": "trained.",
            "token_adapter.trainable_tokens_delta": "token_rows",
        }.items():
            name = name.replace(old, new)
        found[name] = parameter.grad
    return found


def our_name(name, model):
    """PEFT trains biases in place, we train a copy."""
    if name.endswith(".bias"):
        module = name.removesuffix(".bias").removesuffix(".base_layer")
        return f"{module}.trained_bias" if f"{module}.trained_bias" in model else f"{module}.trained.bias"
    return name


@both_ties
@every_case
def test_an_adapter_of_peft_gives_the_same_logits_and_gradients(bases, case, tied, tmp_path):
    theirs = peft_model(bases[tied], case)
    shake(theirs)
    model = our_model(bases[tied])
    ours.load_adapter(model, save_peft(theirs, tmp_path / "peft"))
    tokens = ids()
    torch.testing.assert_close(model(tokens), theirs(tokens).logits, atol=1e-5, rtol=1e-5)
    for each in (model, theirs):
        loss_of(each, tokens).backward()
    got, expected = gradients(model), gradients(theirs)
    expected = {our_name(name, got): gradient for name, gradient in expected.items()}
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, atol=1e-5, rtol=1e-5, msg=name)


@both_ties
@every_case
def test_pain_19_peft_opens_our_adapter_with_the_same_logits(bases, case, tied, tmp_path):
    model, config = our_model(bases[tied], case)
    shake(model)
    ours.save_adapter(model, config, tmp_path / "adapter", base=bases[tied])
    theirs = open_in_peft(theirs_of(bases[tied]), tmp_path / "adapter")
    torch.testing.assert_close(theirs(ids()).logits, model(ids()), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("case", ["q,v", "all-linear", "rslora", "bias lora_only", "embedding and head"])
def test_twenty_steps_from_the_same_start_give_the_same_losses(bases, case, tmp_path):
    theirs = peft_model(bases[False], case)
    model = our_model(bases[False])
    ours.load_adapter(model, save_peft(theirs, tmp_path / "peft"))
    losses = []
    for each in (model, theirs):
        optimizer = torch.optim.AdamW([p for p in each.parameters() if p.requires_grad], lr=1e-2)
        generator = torch.Generator().manual_seed(4)
        losses.append([])
        for _ in range(20):
            tokens = torch.randint(0, SIZES["vocab_size"], (2, 9), generator=generator)
            loss = loss_of(each, tokens)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]), atol=1e-4, rtol=0)
    assert abs(losses[0][-1] - losses[0][0]) > 1e-3


def test_pain_15_added_tokens_open_in_peft_once_its_base_has_grown(bases, tmp_path):
    model = our_model(bases[True])
    ours.freeze(model)
    config = ours.methods()["lora"].model_validate({"name": "lora", "trainable_tokens": [53, 54, 55]})
    config.apply(model)
    shake(model)
    ours.save_adapter(model, config, tmp_path / "adapter", base=bases[True])
    theirs = theirs_of(bases[True])
    theirs.resize_token_embeddings(56, mean_resizing=False)
    theirs = open_in_peft(theirs, tmp_path / "adapter")
    tokens = ids()
    tokens[1, :3] = torch.tensor([53, 54, 55])
    torch.testing.assert_close(theirs(tokens).logits, model(tokens), atol=1e-5, rtol=1e-5)
