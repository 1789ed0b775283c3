"""Composite checkpoints: the config where the text model runs on our own decoder, and adapters of the whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForImageTextToText, Gemma3Config

from lit_lora import peft
from lit_lora.checkpoint.load import load_model
from lit_lora.errors import InputError
from lit_lora.hf import HostedConfig, config_from_hf
from lit_lora.hf.config import CompositeConfig
from tests.families import tiny_configs

# As on the Hub: what is the default of transformers' class is left out.
GEMMA_3_4B: dict[str, Any] = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "eoi_token_index": 256000,
    "model_type": "gemma3",
    "text_config": {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
    "torch_dtype": "bfloat16",
    "vision_config": {"hidden_size": 1152, "model_type": "siglip_vision_model", "num_hidden_layers": 27},
}


@pytest.mark.parametrize(
    ("key", "own"),
    [
        ("gemma3#composite", True),
        ("mistral3#composite", True),
        ("mistral3#ministral3#composite", True),
        ("llava", True),
        ("internvl", True),
        ("voxtral", True),
        ("granite_speech", True),
        ("gemma4#composite", False),
        ("qwen3_5#composite", False),
    ],
)
def test_a_composite_runs_on_our_decoder_if_its_text_model_does(key: str, own: bool) -> None:
    config = config_from_hf(tiny_configs.config(key).to_dict())
    assert isinstance(config, CompositeConfig if own else HostedConfig)
    assert (config.hidden_size, config.num_hidden_layers, config.vocab_size) == (32, 4, tiny_configs.VOCABULARY)


def test_what_the_file_leaves_out_is_as_transformers_has_it() -> None:
    config = config_from_hf(GEMMA_3_4B)
    assert config.source is GEMMA_3_4B
    assert (config.model_type, config.dtype, config.tie_word_embeddings) == ("gemma3_text", "bfloat16", True)
    assert (config.vocab_size, config.num_attention_heads, config.num_key_value_heads) == (262208, 8, 4)
    assert (config.rope.factor, config.rope.rope_theta) == (8.0, 1e6)
    assert config.local_rope is not None
    assert config.local_rope.rope_theta == 1e4
    assert [config.window_of(layer) for layer in range(6)] == [1024] * 5 + [None]


def test_an_unchanged_config_is_written_as_it_was_read() -> None:
    assert config_from_hf(GEMMA_3_4B).to_hf() == GEMMA_3_4B


def test_what_finetuning_changes_is_written_where_it_is_read() -> None:
    changed = {"vocab_size": 262300, "tie_word_embeddings": False, "dtype": "float32"}
    written = config_from_hf(GEMMA_3_4B).model_copy(update=changed).to_hf()
    text = GEMMA_3_4B["text_config"] | {"vocab_size": 262300, "tie_word_embeddings": False}
    assert written == GEMMA_3_4B | {"torch_dtype": "float32", "tie_word_embeddings": False, "text_config": text}
    again = config_from_hf(written)
    assert {key: getattr(again, key) for key in changed} == changed


@pytest.mark.parametrize("key", ["gemma3#composite", "gemma4#composite"])
def test_a_dtype_that_both_parts_name_is_changed_in_both(key: str) -> None:
    data = tiny_configs.config(key).to_dict() | {"dtype": "bfloat16"}
    data["text_config"]["dtype"] = "bfloat16"
    config = config_from_hf(data)
    assert config.dtype == "bfloat16"
    assert config_from_hf(config.model_copy(update={"dtype": "float16"}).to_hf()).dtype == "float16"


def test_a_longer_context_is_that_of_the_text_model() -> None:
    longer = config_from_hf(GEMMA_3_4B).extended(2)
    written = longer.to_hf()
    assert {key: value for key, value in written.items() if GEMMA_3_4B[key] != value}.keys() == {"text_config"}
    again = config_from_hf(written)
    assert (again.rope.rope_type, again.rope.factor, again.max_position_embeddings) == ("linear", 16.0, 2 * 131072)
    assert Gemma3Config.from_dict(written).text_config.rope_parameters["full_attention"]["factor"] == 16.0


def test_what_our_decoder_cannot_compute_is_refused_with_the_part_that_says_so() -> None:
    data = GEMMA_3_4B | {"text_config": GEMMA_3_4B["text_config"] | {"use_bidirectional_attention": True}}
    with pytest.raises(InputError, match=r"^config.json: text_config: use_bidirectional_attention"):
        config_from_hf(data)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning", "ignore:Model has `tie_word")
@pytest.mark.parametrize("key", ["gemma3#composite", "qwen3_5#composite"])
def test_an_adapter_that_peft_trained_on_the_whole_opens_on_the_text_model(key: str, tmp_path: Path) -> None:
    tiny_configs.save(key, tmp_path / "base")
    torch.manual_seed(0)
    whole = AutoModelForImageTextToText.from_pretrained(tmp_path / "base", dtype=torch.float32, trust_remote_code=False)
    adapted = get_peft_model(whole, LoraConfig(r=2, target_modules=r".*language_model.*\.(down_proj|up_proj)")).eval()
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained(tmp_path / "adapter")

    model = load_model(tmp_path / "base", dtype=torch.float32)
    ids = torch.randint(3, tiny_configs.VOCABULARY, (1, 9))
    with torch.no_grad():
        base = model.logits(model.hidden_states(ids))
        peft.load_adapter(model, tmp_path / "adapter")
        ours, expected = model.logits(model.hidden_states(ids)), adapted(input_ids=ids).logits
    assert torch.dist(base, expected) > 1e-2
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
