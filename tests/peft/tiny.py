"""Tiny random models for the tests of adapters and merging."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from lit_lora import peft
from lit_lora.checkpoint.save import CheckpointWriter
from lit_lora.model import CausalLM, ModelConfig
from lit_lora.peft.core.capabilities import InitializesFromData
from lit_lora.peft.core.passes import Pass

VOCABULARY, WIDTH, LAYERS = 61, 16, 2


def make_model(
    tied: bool = False,
    dtype: torch.dtype = torch.float32,
    seed: int = 1,
    vocabulary: int = VOCABULARY,
    window: int | None = None,
) -> CausalLM:
    torch.manual_seed(seed)
    config = ModelConfig(
        vocab_size=vocabulary,
        hidden_size=WIDTH,
        intermediate_size=24,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=4,
        sliding_window=window,
        attention_bias=True,
        tie_word_embeddings=tied,
        dtype=str(dtype).removeprefix("torch."),
    )
    model = CausalLM(config)
    for name, parameter in model.named_parameters():  # norms of one and biases of zero would hide mistakes
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.2)
        else:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.to(dtype)


def save_base(model: CausalLM, folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(model.config.to_hf()))
    with CheckpointWriter(folder, max_shard_bytes=8_000) as writer:
        for name, parameter in model.named_parameters():
            writer.add(name, parameter)
    return folder


def lora(**settings: object) -> peft.Method:
    return peft.methods()["lora"].model_validate({"name": "lora", **settings})


def adapted(model: CausalLM, config: peft.Method) -> CausalLM:
    peft.freeze(model)
    torch.manual_seed(2)
    put_on(model, config)
    return model


def put_on(model: CausalLM, config: peft.Method, passes: Iterable[Pass] | None = None) -> peft.Method:
    """Apply a method as a run does: with a look at rows where it asks for one."""
    if isinstance(config, InitializesFromData) and config.rows_for_init:
        return config.init_from_data(model, rows(model) if passes is None else passes)
    config.apply(model)
    return config


def rows(model: CausalLM, count: int = 4, seed: int = 7, length: int = 12) -> Iterator[Pass]:
    """Passes of one row each; the second half of each is learned."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        ids = torch.randint(0, model.config.vocab_size, (1, length), generator=generator)
        learned = torch.arange(length) >= length // 2
        learned[-1] = False

        def run(ids: Tensor = ids, learned: Tensor = learned) -> None:
            logits = model.logits(model.hidden_states(ids))[0]
            loss = F.cross_entropy(logits[learned], ids[0].roll(-1)[learned], reduction="sum")
            if loss.requires_grad:
                loss.backward()

        yield Pass(learned, run)


def shake(model: torch.nn.Module, size: float = 0.2, seed: int = 4) -> None:
    """Give every trained parameter some other value, as training would."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in peft.trainable_state(model).values():
            parameter.add_(torch.randn_like(parameter) * size)


def make_adapter(
    base: Path, folder: Path, *, size: float = 0.2, seed: int = 4, model: CausalLM | None = None, **settings: object
) -> Path:
    """A trained-looking adapter for the base in a folder."""
    from lit_lora.checkpoint.load import load_model

    config = lora(**settings)
    model = adapted(model or load_model(base), config)
    shake(model, size, seed)
    return peft.save_adapter(model, config, folder, base=base)


def token_ids(high: int = VOCABULARY) -> torch.Tensor:
    ids = torch.randint(0, high, (2, 9), generator=torch.Generator().manual_seed(3))
    ids[0, 0] = 3
    return ids
