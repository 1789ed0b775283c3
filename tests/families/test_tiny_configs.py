"""The table of tiny models covers what transformers has, and each of its models can show a mistake."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.families import tiny_configs
from tests.families.record import METHODS, RECORD
from tests.families.tiny_configs import KEYS, NOT_BUILT, VOCABULARY


def test_each_type_of_transformers_is_built_or_has_a_reason():
    types = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    assert types <= {tiny_configs.model_type(key) for key in KEYS} | NOT_BUILT.keys()
    assert NOT_BUILT.keys() <= types


def test_the_record_knows_each_type_of_the_transformers_it_was_made_with():
    record = json.loads(RECORD.read_text())
    recorded = record["models"].keys() | record["not_opened"].keys()
    if transformers.__version__ == record["transformers"]:
        assert recorded == set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    assert not record["models"].keys() & record["not_opened"].keys()
    assert all(set(found["without"]) < set(METHODS) for found in record["models"].values())


@pytest.mark.slow
@pytest.mark.parametrize("key", KEYS)
def test_the_logits_are_causal_and_depend_on_every_token(key):
    model = tiny_configs.build(key)
    ids = torch.randint(10, VOCABULARY, (1, 24), generator=torch.Generator().manual_seed(1))
    other = ids.clone()
    other[0, 12] = 9
    with torch.no_grad():
        logits, changed = (model(input_ids=tokens, use_cache=False).logits for tokens in (ids, other))
    assert model.config.get_text_config().vocab_size == logits.shape[-1] == VOCABULARY
    scale = logits.abs().max()
    assert torch.isfinite(scale)
    difference = (logits - changed).abs().amax(-1)[0] / scale
    assert difference[:12].max() < 1e-5
    assert difference[12:17].min() > 1e-4  # within the window of 5
