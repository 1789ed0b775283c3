"""Chat templates that come with lit-lora: one file and one line in ``NAMED`` each."""

from __future__ import annotations

from pathlib import Path

__all__ = ["DEFAULT", "NAMED", "named_template"]

NAMED: dict[str, tuple[str, ...]] = {
    "alpaca": (),
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "command-r": ("<|START_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>", "<|END_OF_TURN_TOKEN|>"),
    "deepseek": ("<｜User｜>", "<｜Assistant｜>"),
    "gemma": ("<start_of_turn>", "<end_of_turn>"),
    "granite": ("<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>"),
    "llama-2": (),
    "llama-3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "mistral": (),
    "phi-3": ("<|user|>", "<|assistant|>", "<|end|>"),
    "phi-4": ("<|im_start|>", "<|im_sep|>", "<|im_end|>"),
    "plain": (),
    "qwen": ("<|im_start|>", "<|im_end|>"),
    "tulu": (),
    "vicuna": (),
    "zephyr": (),
}
"""Name -> what the template's family writes as one token. Those without tokens end an answer with EOS, and write their
other marks as plain text."""

DEFAULT = "plain"
"""The template of a checkpoint without one."""


def named_template(name: str, *, starts_with_bos: bool) -> str:
    """The source of a template of ``NAMED``.

    Args:
        name: Its name.
        starts_with_bos: Whether the tokenizer puts BOS before plain text. Then conversations begin with it too, also
            by a template whose family has none.
    """
    text = (Path(__file__).parent / f"{name}.jinja").read_text(encoding="utf-8")
    needs_bos = starts_with_bos and "bos_token" not in text
    return "{{- bos_token }}" + text if needs_bos else text
