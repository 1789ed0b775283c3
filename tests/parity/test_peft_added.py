"""Our prefixes and prompts against PEFT, live: same tensors, same outputs; each opens the other's files."""

from __future__ import annotations

import importlib.util
import json
import warnings

import pytest
import torch
from torch.nn import functional as F

from lit_lora import peft as ours
from lit_lora.checkpoint.load import load_model
from lit_lora.errors import InputError
from tests.parity.test_peft import SIZES, ids, open_in_peft, save_peft, shake, theirs_of

if importlib.util.find_spec("peft") is None:
    pytest.skip("peft is not installed", allow_module_level=True)

# PEFT's own use of transformers
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

# PEFT's class and settings, and ours that mean the same
CASES = {
    "prefix": ("PrefixTuningConfig", {"num_virtual_tokens": 5}, {"name": "prefix", "init": "random"}),
    "prefix projection": (
        "PrefixTuningConfig",
        {"num_virtual_tokens": 5, "prefix_projection": True, "encoder_hidden_size": 7},
        {"name": "prefix", "prefix_projection": True, "encoder_hidden_size": 7},
    ),
    "prompt": ("PromptTuningConfig", {"num_virtual_tokens": 5}, {"name": "prompt", "init": "random"}),
    "p-tuning mlp": (
        "PromptEncoderConfig",
        {"num_virtual_tokens": 5, "encoder_hidden_size": 9},
        {"name": "p-tuning", "encoder": "mlp", "encoder_hidden_size": 9},
    ),
    "p-tuning lstm": (
        "PromptEncoderConfig",
        {
            "num_virtual_tokens": 5,
            "encoder_hidden_size": 9,
            "encoder_reparameterization_type": "LSTM",
            "encoder_dropout": 0.0,
        },
        {"name": "p-tuning", "encoder": "lstm", "encoder_hidden_size": 9},
    ),
    "llama-adapter": (
        "AdaptionPromptConfig",
        {"adapter_len": 3, "adapter_layers": 1},
        {"name": "llama-adapter", "adapter_len": 3, "adapter_layers": 1, "gate": "per-layer"},
    ),
}
every_case = pytest.mark.parametrize("case", CASES)


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Tiny random Llamas of transformers, by key heads. Without biases: PEFT's AdaptionPrompt adds o_proj's twice."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folders = {}
    for heads in (2, 4):
        torch.manual_seed(0)
        sizes = {**SIZES, "attention_bias": False, "num_key_value_heads": heads}
        folders[heads] = tmp_path_factory.mktemp("base")
        LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=False)).save_pretrained(folders[heads])
    return folders


@pytest.fixture
def base(bases, request):
    """With grouped heads, but for projection: there PEFT's network reads vectors as wide as a key."""
    return bases[4 if "projection" in request.node.name else 2]


def our_model(base, case):
    model = load_model(base).eval()
    ours.freeze(model)
    settings = CASES[case][2]
    tokens = {} if settings["name"].startswith("llama") else {"num_virtual_tokens": 5}
    config = ours.methods()[settings["name"]].model_validate({**settings, **tokens})
    config.apply(model)
    shake(model)
    return model, config


def peft_model(base, case):
    import peft

    torch.manual_seed(1)
    kind, settings, _ = CASES[case]
    model = peft.get_peft_model(theirs_of(base), getattr(peft, kind)(**settings, task_type="CAUSAL_LM")).eval()
    shake(model)
    return model


def logits_of(model, tokens):
    """Without the rows of virtual tokens, which PEFT gives too."""
    logits = model(tokens)
    return getattr(logits, "logits", logits)[:, -tokens.shape[1] :]


def their_names(model):
    """PEFT's trained parameters under the names of ours."""
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            name = name.replace("base_model.model.", "").replace("self_attn.adaption", "self_attn.adaption.adaption")
            for child in ("prefix", "prompt"):
                found[name.replace("prompt_encoder.default", f"model.{child}").replace("ing.weight", "ing")] = parameter
            found[name] = parameter
    return found


@every_case
def test_the_same_tensors_give_the_same_logits_and_gradients(base, case):
    theirs, (model, _) = peft_model(base, case), our_model(base, case)
    named = their_names(theirs)
    own = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(own) == sum(parameter.requires_grad for parameter in theirs.parameters())
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(named[name].view_as(parameter))
    tokens = ids()
    torch.testing.assert_close(logits_of(model, tokens), logits_of(theirs, tokens), atol=1e-5, rtol=1e-5)
    for each in (model, theirs):
        F.cross_entropy(logits_of(each, tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    for name, parameter in own.items():
        expected = named[name].grad.view_as(parameter)
        assert expected.abs().max() > 0
        torch.testing.assert_close(parameter.grad, expected, atol=1e-5, rtol=1e-4, msg=name)


@every_case
def test_an_adapter_of_peft_opens_here_with_the_same_logits(base, case, tmp_path):
    theirs = peft_model(base, case)
    model = load_model(base).eval()
    report = ours.load_adapter(model, save_peft(theirs, tmp_path / "peft"))
    torch.testing.assert_close(logits_of(model, ids()), logits_of(theirs, ids()), atol=1e-5, rtol=1e-5)
    again = ours.save_adapter(model, report.adapter.config, tmp_path / "again", base=base)
    torch.testing.assert_close(
        logits_of(open_in_peft(theirs_of(base), again), ids()), logits_of(model, ids()), atol=1e-5, rtol=1e-5
    )


@every_case
def test_peft_opens_our_adapter_with_the_same_logits(base, case, tmp_path):
    model, config = our_model(base, case)
    adapter = ours.save_adapter(model, config, tmp_path / "adapter", base=base)
    theirs = open_in_peft(theirs_of(base), adapter)
    torch.testing.assert_close(logits_of(theirs, ids()), logits_of(model, ids()), atol=1e-5, rtol=1e-5)


def test_peft_answers_as_we_do_with_a_prefix_in_its_cache(base, tmp_path):
    from lit_lora.generate import Sampling, generate

    for case in ("prefix", "prompt"):
        model, config = our_model(base, case)
        adapter = ours.save_adapter(model, config, tmp_path / case, base=base)
        theirs = open_in_peft(theirs_of(base), adapter)
        prompt = [4, 5, 6, 7]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            given = theirs.generate(
                input_ids=torch.tensor([prompt]), max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0
            )
        expected = given[0].tolist()[-8:]
        assert [token for (token,) in generate(model, [prompt], Sampling(max_new_tokens=8))] == expected, case


@pytest.mark.parametrize("settings", [{"name": "houlsby"}, {"name": "llama-adapter", "adapter_layers": 1}], ids=str)
def test_what_peft_cannot_express_is_refused_by_it(base, settings, tmp_path):
    model = load_model(base).eval()
    ours.freeze(model)
    config = ours.methods()[settings["name"]].model_validate(settings)
    config.apply(model)
    adapter = ours.save_adapter(model, config, tmp_path / "adapter", base=base)
    assert json.loads((adapter / "adapter_config.json").read_text())["peft_type"].startswith("LIT_LORA_")
    with pytest.raises((KeyError, ValueError), match="LIT_LORA_"):
        open_in_peft(theirs_of(base), adapter)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_transformer_submodules": 2}, "is for encoder-decoder models"),
        ({"modules_to_save": ["lm_head"]}, "not supported: modules_to_save"),
        ({"peft_type": "PREFIX_TUNIN"}, "peft_type 'PREFIX_TUNIN' is not supported, expected one of: LORA, "),
    ],
)
def test_what_a_file_of_peft_asks_for_and_nobody_here_does_is_refused(base, change, message, tmp_path):
    folder = save_peft(peft_model(base, "prefix"), tmp_path / "peft")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(InputError, match=message):
        ours.load_adapter(load_model(base), folder)
