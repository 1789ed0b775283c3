"""SmolLM2 as converted here, against transformers loading the same GGUF file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor

from lit_lora.checkpoint import load_model, open_tensors
from lit_lora.checkpoint.convert import convert, open_source, plan_conversion
from lit_lora.gguf import GGUFReader, families
from lit_lora.model import CausalLM, KVCache

pytestmark = pytest.mark.slow

LENGTH = 4097  # the last logits are those of position 4,096


@pytest.fixture(scope="module")
def folder(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2 in float32."""
    out = tmp_path_factory.mktemp("smollm2") / "fp32"
    convert(plan_conversion(open_source(smollm2_gguf), dtype=torch.float32), out)
    return out


@pytest.fixture(scope="module")
def theirs(smollm2_gguf: Path) -> Any:
    """The GGUF file in transformers, float32."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        smollm2_gguf.parent, gguf_file=smollm2_gguf.name, dtype=torch.float32, local_files_only=True
    )
    return model.eval()


@pytest.fixture(scope="module")
def ours(folder: Path) -> CausalLM:
    """The converted folder in our decoder."""
    return load_model(folder)


@pytest.fixture(scope="module")
def ids() -> Tensor:
    """(1, LENGTH) token ids."""
    return torch.randint(17, 49152, (1, LENGTH), generator=torch.Generator().manual_seed(0))


def differing(read: Any, names: list[str], theirs: Any) -> list[str]:
    """Names of the tensors that are not bit for bit those of transformers."""
    reference = theirs.state_dict()
    return [name for name in names if not torch.equal(read(name), reference[name])]


def test_every_tensor_is_the_one_that_transformers_reads(folder: Path, theirs: Any) -> None:
    reader = open_tensors(folder)
    assert set(reader.names()) | {"lm_head.weight"} == set(theirs.state_dict())
    assert differing(reader.read, reader.names(), theirs) == []


def test_rows_of_q_and_k_in_the_wrong_order_would_be_seen(
    smollm2_gguf: Path, theirs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    unchanged = [replace(family, rules=()) for family in families.FAMILIES if family.model_type == "llama"]
    monkeypatch.setattr(families, "FAMILIES", unchanged)
    reader = GGUFReader(smollm2_gguf)
    names = [name for name in reader.names() if ".layers.3." in name]
    wrong = differing(lambda name: reader.read(name, torch.float32), names, theirs)
    assert wrong == [f"model.layers.3.self_attn.{part}_proj.weight" for part in "qk"]


def gap(ours: Tensor, theirs: Tensor, model: CausalLM) -> float:
    """The largest difference of logits, from hidden states (1, T, D), some positions at a time."""
    pieces = zip(ours[0].split(512), theirs[0].split(512), strict=True)
    return max(float((model.lm_head(a) - model.lm_head(b)).abs().max()) for a, b in pieces)


@torch.no_grad()
def test_logits_agree_with_transformers_up_to_position_4096(ours: CausalLM, theirs: Any, ids: Tensor) -> None:
    assert gap(ours.hidden_states(ids), theirs.model(ids).last_hidden_state, ours) <= 1e-4


@torch.no_grad()
def test_cached_logits_are_the_uncached_ones_up_to_position_4096(ours: CausalLM, ids: Tensor) -> None:
    whole = ours.hidden_states(ids)
    cache = KVCache(1, LENGTH)
    pieces = [ours.hidden_states(piece, cache=cache) for piece in ids.split([4000, 90, 1, 1, 1, 1, 1, 1, 1], dim=1)]
    assert gap(torch.cat(pieces, dim=1), whole, ours) <= 1e-4


# Digits by the layout of the vocabulary: 17 special tokens, then the printable ASCII characters from "!" on. The
# conversation is the start of every SmolLM2 prompt with the default system message.
FIXED = {
    "123": [33, 34, 35],
    "2026": [34, 32, 34, 38],
    "!": [17],
    "<|im_start|>": [1],
    "<|im_end|>": [2],
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n": [
        *[1, 9690, 198, 2683, 359, 253, 5356, 5646, 11173, 3365, 3511, 308, 34519, 28, 7018, 411, 407, 19712, 8182],
        *[2, 198],
    ],
}


@pytest.mark.parametrize("text", FIXED)
def test_token_ids_are_the_known_ones(folder: Path, text: str) -> None:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert tokenizer.encode(text).ids == FIXED[text]


def test_digits_are_split_one_by_one_wherever_they_stand(folder: Path) -> None:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text in ("order #48213", " 99", "v1.25", "12 34", "x٣٤"):
        digits = [token for token in tokenizer.encode(text).tokens if any(part.isdigit() for part in token)]
        assert all(len(token) == 1 for token in digits), text
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
