"""Builders of tiny checkpoints' parts, the same on every machine, for all tests."""

from __future__ import annotations

import json
from pathlib import Path

import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers, trainers

from lit_lora.model import CausalLM, ModelConfig

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
CHATML_SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")

_TEXT = """\
system user assistant The quick brown fox jumps over the lazy dog. You are a helpful assistant. What is the capital
of France? The capital of France is Paris. My order number 48213 has not arrived, please send me a refund today.
{"product": "laptop", "intent": "refund", "urgency": "high", "order": "48213"} Answer the question in one word: yes
or no. Instruction: write a short poem about the sea and the sky. Response: hello world, hello there, how are you?
"""


def tiny_tokenizer(
    folder: Path,
    *,
    template: str | None = CHATML,
    vocab_size: int = 384,
    specials: tuple[str, ...] = CHATML_SPECIALS,
    bos: str | None = "<|im_start|>",
    eos: str = "<|im_end|>",
    pad: str | None = "<|im_end|>",
) -> Path:
    """Write the files of a byte-level BPE tokenizer of exactly ``vocab_size`` ids to ``folder``.

    The special tokens come first: ids 0, 1, 2 with the defaults, which are ChatML with padding == EOS, as SmolLM2.
    """
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(specials),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator([_TEXT], trainer)
    assert backend.get_vocab_size() == vocab_size, "not enough text to learn so many merges"
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    config = {"bos_token": bos, "eos_token": eos, "pad_token": pad, "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return folder


def gradients_of(model: CausalLM) -> dict[str, torch.Tensor]:
    """Copies of the gradients that are there, by name."""
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def random_model(config: ModelConfig, *, std: float, seed: int = 0) -> CausalLM:
    """A float32 decoder whose matrices are drawn at random; the larger ``std``, the sharper its logits."""
    torch.manual_seed(seed)
    model = CausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=std)
    return model
