"""Tokenizers of every style: byte-level BPE, and two that mark blanks as SentencePiece does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from lit_lora.tokenizer import Tokenizer
from tests.tiny import tiny_tokenizer
from tests.tokenizer.templates import SPECIALS, STYLES

MakeTokenizer = Callable[..., Path]
WORDS = ["▁hello", "▁world", "▁Paris", "▁the", "▁is", "é"]


@pytest.fixture
def make(tmp_path: Path) -> MakeTokenizer:
    """Write a tokenizer folder for a style: ``make("llama3", kind="bytes", bos=True)``."""

    def build(style: str = "chatml", *, kind: str = "bytes", bos: bool = False, name: str = "checkpoint") -> Path:
        chosen = STYLES[style]
        folder = tmp_path / name
        tiny_tokenizer(
            folder, template=chosen.template, specials=SPECIALS, bos=chosen.bos, eos=chosen.eos, pad=chosen.eos
        )
        if kind != "bytes":
            _sentencepiece(kind).save(str(folder / "tokenizer.json"))
        if bos:
            backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
            backend.post_processor = processors.TemplateProcessing(
                single=f"{chosen.bos} $A", special_tokens=[(chosen.bos, backend.token_to_id(chosen.bos))]
            )
            backend.save(str(folder / "tokenizer.json"))
        return folder

    return build


@pytest.fixture(scope="session")
def chatml(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """The tiny ChatML tokenizer, loaded once; not to be changed."""
    return Tokenizer.load(tiny_tokenizer(tmp_path_factory.mktemp("chatml")))


def change_json(path: Path, **values: object) -> None:
    """Set keys of a JSON file; ``None`` removes one."""
    data = json.loads(path.read_text()) if path.exists() else {}
    data.update(values)
    path.write_text(json.dumps({key: value for key, value in data.items() if value is not None}))


def _sentencepiece(kind: str) -> tokenizers.Tokenizer:
    """A BPE with byte fallback, with blanks as ``▁``: by a normalizer (Llama 2) or by Metaspace (newer conversions)."""
    characters = sorted(
        set("".join(WORDS) + "▁abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:?!\n'{}\"")
    )
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys([*SPECIALS, *byte_tokens, *characters]))}
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        for end in range(2, len(word) + 1):
            left, right = word[: end - 1], word[end - 1]
            if left + right not in vocabulary:
                vocabulary[left + right] = len(vocabulary)
                merges.append((left, right))
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, fuse_unk=True))
    if kind == "prepend":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(list(SPECIALS))
    return backend
