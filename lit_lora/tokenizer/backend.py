"""The vocabulary of a checkpoint folder, in whichever files it comes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tokenizers

from lit_lora.errors import InputError, first_line
from lit_lora.files import read_json, read_text
from lit_lora.tokenizer import sentencepiece, tiktoken

__all__ = ["FAST", "Backend", "has_vocabulary", "needs_conversion", "read_backend"]

FAST = "tokenizer.json"
"""The form that everything reads, and that lit-lora writes."""

_MODEL, _TEKKEN, _ADDED = "tokenizer.model", "tekken.json", "added_tokens.json"
# Files that transformers' classes convert, each in its own way.
_SLOW = ("vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model")
# Classes of transformers that number the pieces of a SentencePiece file in another order.
_RENUMBERED = ("XGLMTokenizer", "XLNetTokenizer", "XLMRobertaTokenizer", "CamembertTokenizer", "MBartTokenizer")


@dataclass(frozen=True)
class Backend:
    """A vocabulary, ready to use."""

    tokenizer: tokenizers.Tokenizer
    named: Mapping[str, str] = field(default_factory=dict)
    """``bos_token`` and the like, as the vocabulary itself says; the configuration files go before it."""
    converted: bool = False
    """Whether it comes from another file than ``tokenizer.json``."""


def has_vocabulary(folder: Path) -> bool:
    """Whether the folder has a vocabulary in any supported form."""
    return (folder / FAST).is_file() or _other_file(folder) is not None


def needs_conversion(folder: Path) -> bool:
    """Whether the vocabulary is in a file that transformers reads only with SentencePiece or tiktoken installed."""
    other = _other_file(folder)
    return not (folder / FAST).is_file() and other is not None and other.name not in _SLOW


def read_backend(folder: Path, config: Mapping[str, Any]) -> Backend:
    """Read ``tokenizer.json``, or else SentencePiece's, tiktoken's, Mistral's or an older transformers' files.

    Args:
        folder: The checkpoint folder.
        config: Contents of ``tokenizer_config.json``.

    Raises:
        InputError: There is no vocabulary, or it cannot be read.
    """
    path = folder / FAST
    if path.is_file():
        try:
            return Backend(tokenizers.Tokenizer.from_str(read_text(path)))
        except InputError:
            raise
        except Exception as error:  # tokenizers raises a bare Exception
            raise InputError(f"{path}: the tokenizers library cannot read it: {error}") from error

    other = _other_file(folder)
    if other is None:
        raise InputError(f"{folder}: no tokenizer.json", hint=_no_vocabulary_hint(folder))
    if other.name in _SLOW or config.get("tokenizer_class") in _RENUMBERED:
        return _by_transformers(other)
    try:
        backend = _reader(other)(other, config)
    except (OSError, ValueError) as error:
        hint = "add tokenizer.json from the model's repository, or of its transformers version"
        raise InputError(f"{other}: {error}", hint=hint) from error
    _add_tokens(backend.tokenizer, folder / _ADDED)
    return backend


def _other_file(folder: Path) -> Path | None:
    """The vocabulary file that takes the place of a missing ``tokenizer.json``."""
    names = [_MODEL, _TEKKEN, *sorted(path.name for path in folder.glob("*.tiktoken")), *_SLOW]
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _reader(path: Path) -> Callable[[Path, Mapping[str, Any]], Backend]:
    if path.name == _TEKKEN:
        return _tekken
    return _ranks if tiktoken.is_ranks(path.read_bytes()) else _sentencepiece


def _tekken(path: Path, config: Mapping[str, Any]) -> Backend:
    return _ranked(tiktoken.parse_tekken(read_json(path)), config)


def _ranks(path: Path, config: Mapping[str, Any]) -> Backend:
    return _ranked(tiktoken.parse_ranks(path.read_bytes()), config)


def _ranked(vocabulary: tiktoken.RankedVocabulary, config: Mapping[str, Any]) -> Backend:
    return Backend(tiktoken.tokenizer_of(vocabulary, config), vocabulary.named, converted=True)


def _sentencepiece(path: Path, config: Mapping[str, Any]) -> Backend:
    model = sentencepiece.parse(path.read_bytes())
    return Backend(sentencepiece.tokenizer_of(model, config), model.named_tokens(), converted=True)


def _add_tokens(tokenizer: tokenizers.Tokenizer, path: Path) -> None:
    """Add the tokens of ``added_tokens.json``, each with its id.

    Raises:
        InputError: One gets another id, because the vocabulary is not the one that they were added to.
    """
    if not path.is_file():
        return
    ids = read_json(path)
    for token in sorted(ids, key=lambda text: int(ids[text])):
        tokenizer.add_tokens([tokenizers.AddedToken(token, normalized=False)])
        if tokenizer.token_to_id(token) != ids[token]:
            raise InputError(
                f"{path}: {token!r} has the id {ids[token]}, but {tokenizer.token_to_id(token)} in this vocabulary",
                hint="the two files are of different models; take both from the model's repository",
            )


def _by_transformers(path: Path) -> Backend:
    """What transformers makes of the folder of an older vocabulary file.

    Raises:
        InputError: transformers cannot read it, or needs a package for it that is not installed.
    """
    import transformers  # noqa: PLC0415  (takes seconds, and only old folders need it)

    folder = path.parent
    try:
        slow = transformers.AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
        tokenizer = tokenizers.Tokenizer.from_str(slow.backend_tokenizer.to_str())
    except Exception as error:  # a dozen formats raise almost anything
        hint = "add tokenizer.json from the model's repository"
        if path.suffix == ".model" or path.name == _MODEL:
            hint += ", or install what transformers needs for it: pip install sentencepiece protobuf"
        raise InputError(f"{path}: transformers cannot read it: {first_line(error)}", hint=hint) from error
    named = {name: str(token) for name, token in slow.special_tokens_map.items() if isinstance(token, str)}
    return Backend(tokenizer, named, converted=True)


def _no_vocabulary_hint(folder: Path) -> str:
    if folder.is_file():
        return "this is a file, expected a checkpoint folder; lit-lora convert makes one from a GGUF or .pth file"
    if not folder.is_dir():
        return "no such folder; lit-lora download fetches a checkpoint"
    if (folder / "adapter").is_dir() or (folder / "adapter_config.json").is_file():
        return "this is a run or an adapter; lit-lora merge makes a checkpoint from it"
    return "a checkpoint folder contains config.json, tokenizer.json and *.safetensors; lit-lora convert makes one"
