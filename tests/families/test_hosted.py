"""Models of transformers behind our protocol, against transformers itself, live, and PEFT."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lit_lora import IGNORE_INDEX
from lit_lora.cli import main
from lit_lora.data.batches import MicroBatch
from lit_lora.errors import InputError, UsageError
from lit_lora.estimate import on_paper
from lit_lora.estimate.rehearsal import MicroBatchShape, rehearse
from lit_lora.generate import ChatSession, PrefixCache, Sampling, generate
from lit_lora.hf import HostedConfig, HostedLM, build, choose, config_from_hf
from lit_lora.hf.selftest import Sample, problem_with
from lit_lora.model import LanguageModel
from lit_lora.open.decoder import open_model
from lit_lora.peft import freeze
from lit_lora.peft.adapters.bottleneck import HoulsbyConfig
from lit_lora.peft.core.modules import own_modules
from lit_lora.peft.lora.config import LoRAConfig
from lit_lora.peft.prompts.prefix import PrefixConfig
from lit_lora.peft.prompts.prompt import PromptConfig
from lit_lora.peft.selective.ia3 import IA3Config
from lit_lora.recipe.plan import left_out_rows
from lit_lora.train.loss import backward
from tests.families import tiny_configs
from tests.tiny import tiny_tokenizer

WAYS = {
    "gpt2": "own attention",
    "gpt2#scaled": "own attention",
    "gpt_neo": "position ids",
    "gpt_neox": "own attention",
    "gptj": "position ids",
    "falcon": "padded rows",
    "falcon#new": "padded rows",
    "falcon#alibi": "padded rows",
    "mpt": "padded rows",
    "bloom": "padded rows",
    "opt": "own attention",
    "phi": "own attention",
    "cohere2": "own attention",
    "deepseek_v3": "own attention",
    "gpt_oss": "own attention",
    "qwen3_5_text": "padded rows",
    "gemma3n_text": "own attention",
    "gemma4_text": "own attention",
    "lfm2": "padded rows",
    "mamba": "padded rows",
}
"""How each computes packed documents: the fastest way that is right."""

NOT_BY_PEFT = {
    "deepseek_v3": ["mlp.*"],  # it adapts all experts when asked for the projections of a shared one
    "mamba": ["out_proj"],  # it refuses this layer, whose weight kernels of another package read
}
"""Modules that our LoRA adapts and PEFT's does not."""

LENGTHS = [11, 7, 14]  # past every window of 5
SHARED = 3


def theirs_of(key: str) -> Any:
    """transformers' tiny model of ``key``."""
    torch.manual_seed(0)  # some parts start from random values
    return tiny_configs.build(key)


def host(key: str) -> HostedLM:
    """The tiny model of ``key``, hosted."""
    net = theirs_of(key)
    config = config_from_hf(net.config.to_dict())
    assert isinstance(config, HostedConfig)
    model = HostedLM(config, net)
    choose(model)
    return model


def documents(lengths: list[int] = LENGTHS, shared: int = SHARED) -> list[Tensor]:
    """Token ids of documents that begin alike."""
    generator = torch.Generator().manual_seed(1)
    first, *others = (torch.randint(3, tiny_configs.VOCABULARY, (length,), generator=generator) for length in lengths)
    return [first, *(torch.cat([first[:shared], other[shared:]]) for other in others)]


def packed(rows: list[Tensor], shared: int) -> Tensor:
    """(1, T) the documents end to end, with what they share once."""
    return torch.cat([rows[0], *(row[shared:] for row in rows[1:])])[None]


def error(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference, relative to the largest value."""
    return float((ours - theirs).detach().abs().max() / theirs.detach().abs().max())


@pytest.mark.parametrize("key", WAYS)
@torch.no_grad()
def test_packed_documents_have_the_logits_of_transformers_for_each_alone(key: str) -> None:
    model = host(key)
    assert model.way == WAYS[key]
    assert isinstance(model, LanguageModel)
    theirs = theirs_of(key)
    rows = documents()
    alone = [theirs(input_ids=row[None], use_cache=False).logits[0] for row in rows]

    ours = model.logits(model.hidden_states(packed(rows, 0), lengths=LENGTHS))[0]
    assert error(ours, torch.cat(alone)) < 1e-4
    shared = model.hidden_states(packed(rows, SHARED), lengths=LENGTHS, shared_prefix=SHARED)
    expected = torch.cat([alone[0], *(logits[SHARED:] for logits in alone[1:])])
    assert error(model.logits(shared)[0], expected) < 1e-4


@pytest.mark.parametrize("key", WAYS)
@torch.no_grad()
def test_generation_continues_as_transformers_does_without_a_cache(key: str) -> None:
    model = host(key)
    theirs = theirs_of(key)
    prompts = [row.tolist() for row in documents([9, 4, 12], shared=2)]
    sampling = Sampling(temperature=0, max_new_tokens=6)

    expected = []
    for prompt in prompts:
        ids = list(prompt)
        for _ in range(6):
            ids.append(int(theirs(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        expected.append(ids[len(prompt) :])
    steps = list(generate(model, prompts, sampling))
    assert [list(answer) for answer in zip(*steps, strict=True)] == expected

    # A chat: the second prompt continues the first and its answer, and then differs from it.
    chat = PrefixCache()
    list(generate(model, [prompts[0]], sampling, prefix_cache=chat))
    longer = [*prompts[0], *expected[0][:3], 5, 6, 7]
    continued = [step[0] for step in generate(model, [longer], sampling, prefix_cache=chat)]
    assert continued == [step[0] for step in generate(model, [longer], sampling)]


def batch(rows: list[Tensor], shared: int = 0) -> MicroBatch:
    """A micro-batch with targets from the fourth token of each document on."""
    labels = []
    for row in rows:
        following = torch.cat([row[1:], row.new_full((1,), IGNORE_INDEX)])
        following[:SHARED] = IGNORE_INDEX
        labels.append(following)
    lengths = [len(row) for row in rows]
    return MicroBatch(packed(rows, shared), packed(labels, shared), lengths, list(range(len(rows))), shared)


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def randomize(model: nn.Module) -> None:
    """Give trainable parameters values that make every gradient count."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in trained(model).values():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


def gradients(model: HostedLM, micro_batch: MicroBatch) -> dict[str, Tensor]:
    for parameter in model.parameters():
        parameter.grad = None
    backward(model, micro_batch, 1.0)
    return {name: parameter.grad for name, parameter in trained(model).items() if parameter.grad is not None}


@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed")
@pytest.mark.parametrize("key", WAYS)
def test_lora_has_the_loss_and_the_gradients_of_peft_on_one_document_at_a_time(key: str) -> None:
    import peft

    model = host(key)
    freeze(model)
    LoRAConfig(rank=1, alpha=2.0, exclude_modules=NOT_BY_PEFT.get(key, [])).apply(model)
    randomize(model)
    model.train()
    targets = list(own_modules(model))
    assert targets

    net = theirs_of(key)
    settings = peft.LoraConfig(target_modules=targets, r=1, lora_alpha=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Conv1D's fan_in_fan_out
        theirs = peft.get_peft_model(net, settings)
    ours = trained(model)
    for name, parameter in theirs.named_parameters():
        if parameter.requires_grad:
            our_name = name.removeprefix("base_model.model.").replace(".default.weight", "")
            parameter.data.copy_(ours[our_name].data)

    rows = documents()
    their_loss = torch.zeros(())
    theirs.eval()
    for row, micro_batch in ((row, batch([row])) for row in rows):
        logits = theirs(input_ids=row[None], use_cache=False).logits[0]
        their_loss = their_loss + F.cross_entropy(logits, micro_batch.labels[0], reduction="sum")
    their_loss.backward()

    for shared in (0, SHARED):
        for parameter in ours.values():
            parameter.grad = None
        loss = backward(model, batch(rows, shared), 1.0)
        assert float(loss) == pytest.approx(float(their_loss.detach()), rel=1e-5)
        for name, parameter in theirs.named_parameters():
            if parameter.requires_grad and parameter.grad is not None:
                our_gradient = ours[name.removeprefix("base_model.model.").replace(".default.weight", "")].grad
                assert our_gradient is not None, name
                norm = parameter.grad.norm().clamp(min=1e-3)
                assert float((our_gradient - parameter.grad).norm() / norm) < 1e-4, name


PARTLY_TRAINED = {
    "bottleneck": HoulsbyConfig(bottleneck=4),
    "ia3": IA3Config(),
    "prefix": PrefixConfig(num_virtual_tokens=2, init="random"),
    "prompt": PromptConfig(num_virtual_tokens=2),
}


@pytest.mark.parametrize(
    ("key", "method"),
    [
        *((key, method) for key in ("gpt2", "gpt_neox", "opt", "cohere2") for method in PARTLY_TRAINED),
        ("gpt_oss", "prefix"),  # IA3 and bottlenecks find no MLP that is no mixture of experts
        ("gpt_oss", "prompt"),
    ],
)
def test_other_methods_have_the_same_gradients_packed_and_alone_and_generate_with_the_cache(
    key: str, method: str
) -> None:
    model = host(key)
    freeze(model)
    PARTLY_TRAINED[method].apply(model)
    randomize(model)
    rows = documents()
    together = gradients(model, batch(rows, SHARED))
    assert together
    alone: dict[str, Tensor] = {}
    for row in rows:
        for name, gradient in gradients(model, batch([row])).items():
            alone[name] = alone.get(name, torch.zeros_like(gradient)) + gradient
    for name, gradient in alone.items():
        assert error(together[name], gradient) < 1e-4, name

    prompt = rows[0][:6].tolist()
    steps = list(generate(model, [prompt, prompt[:3]], Sampling(temperature=0, max_new_tokens=4)))
    ids = [*prompt, *(step[0] for step in steps)]
    with torch.no_grad():
        logits = model.logits(model.hidden_states(torch.tensor([ids])))[0]
    assert logits[5:-1].argmax(-1).tolist() == ids[6:]


@pytest.mark.parametrize("key", ["mpt", "gemma3n_text", "qwen3_5_text"])
def test_methods_that_put_tokens_before_documents_are_refused_where_attention_is_not_ours(key: str) -> None:
    model = host(key)
    if model.way == "own attention":  # Gemma 3n looks up every token in every layer
        PromptConfig(num_virtual_tokens=2).apply(model)
        with pytest.raises(UsageError, match="virtual tokens"):
            backward(model, batch(documents()), 1.0)
    else:
        with pytest.raises(UsageError, match="puts tokens before every document"):
            PromptConfig(num_virtual_tokens=2).apply(model)


@pytest.mark.parametrize("key", ["gpt2", "falcon", "gemma3n_text", "gemma4_text#shared", "qwen3_5_text", "mamba"])
def test_checkpointed_activations_give_the_same_gradients(key: str) -> None:
    model = host(key)
    freeze(model)
    LoRAConfig(rank=1).apply(model)
    randomize(model)
    model.train()
    expected = gradients(model, batch(documents(), SHARED))
    model.checkpoint_activations("full")
    assert_same(gradients(model, batch(documents(), SHARED)), expected)
    if key == "mamba":
        with pytest.raises(UsageError, match="has none that is known"):
            model.checkpoint_activations("selective")
        return
    model.checkpoint_activations("selective")
    assert_same(gradients(model, batch(documents(), SHARED)), expected)


def assert_same(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert ours.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.equal(ours[name], gradient), name


def test_the_dropout_of_the_base_stays_off_in_training() -> None:
    model = host("gpt2")
    assert model.net.config.resid_pdrop > 0
    model.train()
    assert model.training
    ids = documents()[0][None]
    with torch.no_grad():
        assert torch.equal(model.hidden_states(ids), model.hidden_states(ids))


def test_a_layer_whose_weight_the_model_reads_itself_is_not_wrapped() -> None:
    model = host("mamba")
    assert "backbone.layers.0.mixer.dt_proj" in model.not_wrappable
    freeze(model)
    with pytest.raises(UsageError, match=r"reads the weight of backbone\.layers\.0\.mixer\.dt_proj itself"):
        LoRAConfig(rank=1, target_modules=["dt_proj"]).apply(model)
    LoRAConfig(rank=1).apply(model)
    assert not [name for name in own_modules(model) if name.endswith("dt_proj")]


GEMMA3N_GATES = ["correction_coefs", "prediction_coefs", "modality_router"]


@pytest.mark.parametrize(
    ("key", "rank", "left_out"),
    [
        ("mamba", 1, "dt_proj (read by the model itself)"),
        ("qwen3_5_text", 8, "in_proj_b (too narrow), in_proj_a (too narrow)"),
        (
            "gemma3n_text",
            8,
            "correction_coefs (too narrow), prediction_coefs (too narrow), modality_router (too narrow)",
        ),
    ],
)
def test_all_linear_leaves_out_what_is_too_narrow_for_the_rank_and_the_plan_says_so(key, rank, left_out) -> None:
    model = host(key)
    freeze(model)
    method = LoRAConfig(rank=rank)
    method.apply(model)
    assert left_out_rows(model, method) == [["left out by all-linear", left_out]]


def test_a_rank_too_large_for_a_projection_is_refused_still() -> None:
    model = host("qwen3_5_text")
    freeze(model)
    with pytest.raises(UsageError, match=r"peft.rank: 17 is too large for .*k_proj \(16×32\), expected at most 16"):
        LoRAConfig(rank=17).apply(model)


def test_the_test_of_opening_sees_what_leaks() -> None:
    model = host("gpt_oss")
    sample = Sample.of(model)
    model.attend_by("own attention")
    with torch.no_grad():
        assert problem_with(model, sample) is None
        model.attend_by("position ids")  # transformers' own packing, which ignores where documents begin on a CPU
        assert "differ from those alone" in str(problem_with(model, sample))


@pytest.mark.parametrize(
    ("config", "message", "hint"),
    [
        ({"model_type": "no_such"}, "neither lit-lora nor the installed transformers implements it", "newer"),
        ({"model_type": "gpt3", "auto_map": {"AutoConfig": "x.Y"}}, "never runs", "transformers implements"),
        ({"model_type": "bert"}, "not a decoder", "recipe: classify"),
        ({"model_type": "t5"}, "not a decoder", "recipe: classify"),
        ({"model_type": "vit"}, "not a decoder", "recipe: classify"),
        ({}, "model_type is missing", None),
    ],
)
def test_what_is_no_decoder_is_refused_in_one_line(config: dict[str, Any], message: str, hint: str | None) -> None:
    with pytest.raises(InputError, match=message) as refused:
        config_from_hf(config)
    assert "\n" not in str(refused.value)
    assert hint is None or hint in str(refused.value.hint)


@pytest.mark.parametrize("key", ["gpt2", "falcon#alibi", "gpt_oss", "qwen3_5_text"])
def test_a_step_can_be_rehearsed_without_values(key: str) -> None:
    model = build(config_from_hf(tiny_configs.config(key).to_dict()))
    choose(model)
    assert model.way == WAYS[key]
    freeze(model)
    LoRAConfig(rank=1).apply(model)
    shape = MicroBatchShape([9, 7, 12], targets=8, shared_prefix=2)
    peak = rehearse(on_paper(model), shape, fused="cpu")
    assert peak.operations > 0
    model.checkpoint_activations("full")
    assert 0 < rehearse(on_paper(model), shape, fused="cpu").activations < peak.activations


def test_a_run_on_gpt2_learns_and_chats(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = tmp_path / "base"
    tiny_configs.save("gpt2", base)
    tiny_tokenizer(base)
    rows = [{"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "there"}]}] * 4
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = tmp_path / "run"
    config = {
        "recipe": "lora",
        "model": {"path": str(base), "dtype": "fp32", "device": "cpu"},
        "data": {"path": str(tmp_path / "rows.jsonl"), "validation": 0.25},
        "train": {"max_steps": 30, "batch_size": 3},
        "optimizer": {"lr": 0.02},
        "out": str(run),
    }
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    with contextlib.suppress(SystemExit):
        main(["finetune", "--config", str(tmp_path / "config.yaml")])
    printed = " ".join("".join(capsys.readouterr()).split())
    assert "GPT2LMHeadModel of transformers" in printed
    assert (run / "adapter" / "adapter_config.json").is_file(), printed

    opened = open_model(run, dtype="fp32", device="cpu")
    assert "own attention" in opened.description
    session = ChatSession(opened.model, opened.tokenizer, Sampling(temperature=0, max_new_tokens=8))
    assert "".join(session.ask("hello")) == "there"


def test_rows_longer_than_the_positions_are_refused_before_training(tmp_path, capsys) -> None:
    base = tmp_path / "base"
    tiny_configs.save("gpt2", base)
    tiny_tokenizer(base)
    rows = [{"prompt": "?", "completion": "a" * 200}, {"prompt": "?", "completion": "b"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "recipe": "lora",
        "model": {"path": str(base), "dtype": "fp32", "device": "cpu"},
        "data": {"path": str(tmp_path / "rows.jsonl")},
        "out": str(tmp_path / "run"),
    }
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    with pytest.raises(SystemExit) as exit_:
        main(["finetune", "--config", str(tmp_path / "config.yaml"), "--dry-run"])
    assert exit_.value.code == 2
    printed = " ".join(capsys.readouterr().err.split())
    assert "more than the model's context of 128 (too long: 1 training row) hint: data.max_seq_length=128" in printed
