"""The decoder against transformers, for every family that it computes: numbers, files, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from lit_lora import peft
from lit_lora.checkpoint.load import load_model
from lit_lora.checkpoint.save import save_model
from lit_lora.errors import InputError
from lit_lora.generate import Sampling, generate
from lit_lora.model import FAMILIES, CausalLM, KVCache, ModelConfig
from tests.families import tiny_configs
from tests.families.tiny_configs import KEYS, VOCABULARY, model_type

WITH_EXPERTS = "mixtral", "qwen2_moe", "qwen3_moe", "granitemoe", "flex_olmo"
OWN = [key for key in KEYS if model_type(key) in FAMILIES and model_type(key) not in WITH_EXPERTS]
# Of a family's variants, these have something that no other key has.
QUICK = "gemma3_text#scaled", "phi3#longrope"
LENGTHS = [11, 40, 3]
"""Of packed documents: below and above windows of 5 and original contexts of 16."""


@pytest.fixture(
    scope="module",
    params=[pytest.param(key, marks=() if key in QUICK or "#" not in key else pytest.mark.slow) for key in OWN],
)
def key(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folder(key: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint as transformers saves it."""
    folder = tmp_path_factory.mktemp("base")
    tiny_configs.save(key, folder)
    return folder


@pytest.fixture
def ours(folder: Path) -> CausalLM:
    return load_model(folder).eval()


@pytest.fixture(scope="module")
def theirs(key: str) -> nn.Module:
    return tiny_configs.build(key)


def tokens(*shape: int) -> Tensor:
    return torch.randint(3, VOCABULARY, shape, generator=torch.Generator().manual_seed(0))


def error(got: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest value."""
    return float((got - expected).detach().abs().max() / expected.detach().abs().max())


def test_logits_and_gradients_are_those_of_transformers(ours: CausalLM, theirs: nn.Module) -> None:
    ids, outer = tokens(2, 40), torch.randn(2, 40, VOCABULARY, generator=torch.Generator().manual_seed(1))
    got, expected = ours(ids), theirs(ids).logits
    assert error(got, expected) < 1e-5

    (got * outer).sum().backward()
    (expected * outer).sum().backward()
    for name, parameter in ours.named_parameters():
        gradient = theirs.get_parameter(name).grad
        assert error(parameter.grad, gradient) < 1e-4, name
    theirs.zero_grad()


@torch.no_grad()
def test_packed_documents_are_as_if_each_were_alone(ours: CausalLM) -> None:
    row = tokens(1, sum(LENGTHS))
    packed = ours(row, lengths=LENGTHS)
    alone = torch.cat([ours(document) for document in row.split(LENGTHS, dim=1)], dim=1)
    assert error(packed, alone) < 1e-5


@torch.no_grad()
def test_a_shared_prefix_gives_the_states_of_whole_rows(ours: CausalLM) -> None:
    prefix, rests = tokens(1, 9), tokens(1, 24).split([20, 3, 1], dim=1)
    lengths = [9 + rest.shape[1] for rest in rests]
    whole = ours.hidden_states(torch.cat([x for rest in rests for x in (prefix, rest)], dim=1), lengths=lengths)[0]
    shared = ours.hidden_states(torch.cat([prefix, *rests], dim=1), lengths=lengths, shared_prefix=9)[0]
    expected = torch.cat([piece[9:] for piece in whole.split(lengths)])
    assert error(shared[9:], expected) < 1e-5


@torch.no_grad()
def test_a_cache_gives_what_whole_rows_do(ours: CausalLM) -> None:
    ids, padding = tokens(2, 14), torch.tensor([0, 5])
    cache = KVCache(2, 14, padding=padding)
    cached = torch.cat([ours(piece, cache=cache) for piece in ids.split([8, 1, 1, 4], dim=1)], dim=1)
    for row, start in enumerate(padding.tolist()):
        assert error(cached[row, start:], ours(ids[row : row + 1, start:])[0]) < 1e-5


def test_answers_are_those_of_reading_everything_again_for_every_token(ours: CausalLM) -> None:
    """Beyond windows and the original context, where `longrope` changes the rotation of all tokens."""
    prompts = [tokens(1, 20)[0].tolist(), tokens(1, 12)[0].tolist()]
    steps = list(generate(ours, prompts, Sampling(max_new_tokens=8)))
    for row, prompt in enumerate(prompts):
        text = list(prompt)
        for step in steps:
            logits = ours(torch.tensor([text]))[0, -1]
            assert step[row] is not None
            assert logits[step[row]] > logits.max() - 1e-4
            text.append(step[row])


@pytest.mark.filterwarnings("ignore:Model has `tie_word", "ignore:`is_gradient_checkpointing`:FutureWarning")
def test_lora_has_pefts_outputs_and_gradients(ours: CausalLM, key: str, tmp_path: Path) -> None:
    """With an adapter on every linear layer and the embedding, which PEFT opens."""
    names = ["*_proj", ours.config.names.embedding]
    method = adapt(ours, {"name": "lora", "rank": 3, "target_modules": names})
    theirs = opened_by_peft(ours, method, key, tmp_path)

    ids = tokens(1, 20)
    got, expected = ours(ids), theirs(ids).logits
    assert error(got, expected) < 1e-5
    got.square().sum().backward()
    expected.square().sum().backward()
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters() if parameter.requires_grad}
    trained = {name: parameter for name, parameter in ours.named_parameters() if parameter.requires_grad}
    assert len(trained) == len(gradients)
    for name, parameter in trained.items():
        module, _, factor = name.rpartition(".")
        kind = f"lora_embedding_{factor[-1]}.default" if "embed" in module else f"{factor}.default.weight"
        assert error(parameter.grad, gradients[f"base_model.model.{module}.{kind}"]) < 1e-4, name


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize("name", ["prompt", "prefix", "ia3"])
@torch.no_grad()
def test_other_methods_give_what_they_give_in_peft(ours: CausalLM, key: str, name: str, tmp_path: Path) -> None:
    """Prompts get the embedding's multipliers, prefixes the layers' windows, and fused projections one factor each."""
    settings = {} if name == "ia3" else {"num_virtual_tokens": 4, "init": "random"}
    method = adapt(ours, {"name": name, **settings})
    theirs = opened_by_peft(ours, method, key, tmp_path)
    ids = tokens(1, 9)
    assert error(ours(ids), theirs(ids).logits[:, -9:]) < 1e-5


def adapt(model: CausalLM, settings: dict[str, Any]) -> peft.Method:
    """Apply a method, with random values of what trains."""
    torch.manual_seed(0)
    peft.freeze(model)
    method = peft.methods()[settings["name"]].model_validate(settings)
    method.apply(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.2)
    return method


def opened_by_peft(model: CausalLM, method: peft.Method, key: str, folder: Path) -> nn.Module:
    """The adapter of ``model`` on transformers' model of ``key``."""
    peft.save_adapter(model, method, folder / "adapter", base="base")
    opened = PeftModel.from_pretrained(
        tiny_configs.build(key), folder / "adapter", is_trainable=method.kind == "mergeable"
    )
    return opened.eval()


def test_a_saved_model_opens_in_transformers_with_the_same_tensors(
    ours: CausalLM, folder: Path, theirs: nn.Module, tmp_path: Path
) -> None:
    out = save_model(ours, tmp_path / "out", side_files=folder, card="")
    opened = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=False)
    expected = theirs.state_dict()
    got = opened.state_dict()
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    assert ModelConfig.from_hf(opened.config.to_dict()).model_dump() == ours.config.model_dump()


def test_in_bfloat16_the_kernels_compute_the_same(folder: Path) -> None:
    row = tokens(1, sum(LENGTHS))
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        model = load_model(folder).to(dtype)
        hidden = model.hidden_states(row, lengths=LENGTHS)[0]
        model.logits(hidden).float().square().mean().backward()
        results.append([hidden, *(parameter.grad for parameter in model.parameters())])
    for exact, rounded in zip(*results, strict=True):
        assert torch.cosine_similarity(exact.flatten().float(), rounded.flatten().float(), dim=0) > 0.98


@pytest.mark.parametrize(
    ("kind", "changed", "message"),
    [
        ("qwen3", {"hidden_act": "relu2"}, "hidden_act 'relu2' is not supported"),
        ("gemma2", {"hidden_activation": "relu"}, "hidden_act 'relu' is not supported"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("llama", {"layer_types": ["full_attention", "sliding_attention"] * 2}, "layers of one type"),
        ("qwen3", {"layer_types": ["full_attention", "linear_attention"] * 2}, "linear_attention"),
        ("olmo3", {"layer_types": ["full_attention"]}, "layer_types lists 1 layers of 4"),
        ("glm", {"partial_rotary_factor": 0.4}, "an odd number of dimensions"),
        ("phi3", {"rope_scaling": {"type": "longrope"}}, "needs short_factor"),
        ("gemma3_text", {"rope_scaling": {"rope_type": "proportional"}}, "rope_type 'proportional' is not supported"),
    ],
)
def test_an_option_that_the_decoder_does_not_compute_is_refused(
    kind: str, changed: dict[str, Any], message: str
) -> None:
    config = tiny_configs.config(kind).to_dict()
    for key in ("rope_parameters", "layer_types"):
        config.pop(key, None)
    with pytest.raises(InputError, match=message):
        ModelConfig.from_hf(json.loads(json.dumps(config | changed)))


@pytest.mark.parametrize("kind", ["qwen3", "gemma2", "gemma3_text", "olmo3", "smollm3", "exaone4", "ministral"])
def test_layers_that_a_config_does_not_list_are_those_of_transformers(kind: str) -> None:
    """Configs from before transformers 5 lack `layer_types`."""
    config = type(tiny_configs.config(kind))(num_hidden_layers=30, sliding_window=7)
    data = config.to_dict()
    expected = data.pop("layer_types")
    ours = ModelConfig.from_hf(data)
    window = config.sliding_window
    assert [ours.window_of(layer) for layer in range(30)] == [
        window if kind == "sliding_attention" else None for kind in expected
    ]


@pytest.mark.parametrize("kind", ["qwen3", "gemma3_text", "olmo3"])
def test_a_longer_context_is_that_of_layers_without_a_window(kind: str) -> None:
    config = ModelConfig.from_hf(tiny_configs.config(kind).to_dict())
    longer = config.extended(4)
    assert longer.rope.factor == 4
    assert longer.local_rope == config.local_rope
    again = ModelConfig.from_hf(longer.to_hf())
    assert (again.rope.factor, again.max_position_embeddings) == (4, 4 * config.max_position_embeddings)
    assert (again.local_rope is None) == (config.local_rope is None)
    assert again.local_rope is None or again.local_rope.factor is None


@pytest.mark.parametrize("kind", ["gemma3_text", "qwen3", "phi3"])
def test_a_config_made_in_python_comes_back_from_its_file(kind: str) -> None:
    config = ModelConfig.from_hf(tiny_configs.config(kind).to_dict())
    local_rope = config.local_rope and config.local_rope.model_copy(update={"rope_theta": 777.0})
    made = config.model_copy(update={"source": {}, "local_rope": local_rope})
    again = ModelConfig.from_hf(json.loads(json.dumps(made.to_hf())))
    assert again.model_dump() == made.model_dump()
