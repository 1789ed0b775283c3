"""SentencePiece's ``tokenizer.model`` as a tokenizer of the tokenizers library, with the ids that SentencePiece gives.

The file is a protocol buffer of a few fields, so that it is read here without SentencePiece or protobuf installed.

Source: ``sentencepiece_model.proto`` of SentencePiece; "Encoding" in the Protocol Buffers documentation.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from lit_lora.tokenizer.assembly import begin_and_end, ranked_merges

__all__ = ["BLANK", "Piece", "PieceType", "SentencePieceModel", "parse", "tokenizer_of"]

BLANK = "▁"
"""What SentencePiece writes for a space."""


class PieceType:
    """Values of ``SentencePiece.Type``."""

    NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)


@dataclass(frozen=True)
class Piece:
    """An entry of the vocabulary; its index is its id."""

    text: str
    score: float
    type: int = PieceType.NORMAL


@dataclass(frozen=True)
class SentencePieceModel:
    """What decides the ids of a text."""

    pieces: Sequence[Piece]
    algorithm: str = "unigram"
    byte_fallback: bool = False
    unk_id: int = 0
    bos_id: int = 1
    eos_id: int = 2
    pad_id: int = -1
    charsmap: bytes = b""
    """Table of the Unicode normalization; empty for none."""
    add_dummy_prefix: bool = True
    remove_extra_whitespaces: bool = True

    def named_tokens(self) -> dict[str, str]:
        """``bos_token`` and the like, as far as the vocabulary has them."""
        ids = {"unk_token": self.unk_id, "bos_token": self.bos_id, "eos_token": self.eos_id, "pad_token": self.pad_id}
        return {name: self.pieces[index].text for name, index in ids.items() if 0 <= index < len(self.pieces)}


_ALGORITHMS = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}


def parse(data: bytes) -> SentencePieceModel:
    """Read a ``ModelProto``.

    Raises:
        ValueError: The bytes are no such message, or the model needs what is not supported.
    """
    pieces: list[Piece] = []
    settings: dict[str, Any] = {}
    for field, value in _fields(data):
        if field == 1:
            pieces.append(_piece(_message(value)))
        elif field == 2:
            settings |= _trainer_settings(_message(value))
        elif field == 3:
            settings |= _normalizer_settings(_message(value))
    if not pieces:
        raise ValueError("no vocabulary in it")
    model = SentencePieceModel(pieces, **settings)
    if model.algorithm not in ("unigram", "bpe"):
        raise ValueError(f"its algorithm is {model.algorithm!r}, expected 'unigram' or 'bpe'")
    if model.charsmap and any(piece.type == PieceType.USER_DEFINED for piece in pieces):
        raise ValueError("it normalizes Unicode around user-defined pieces, which the tokenizers library cannot")
    return model


def _piece(fields: Mapping[int, Any]) -> Piece:
    (score,) = struct.unpack("<f", fields.get(2, bytes(4)))
    return Piece(_text(fields[1]), score, fields.get(3, PieceType.NORMAL))


def _trainer_settings(fields: Mapping[int, Any]) -> dict[str, Any]:
    if fields.get(24):
        raise ValueError("it marks spaces at the end of words, which is not supported")
    return {
        "algorithm": _ALGORITHMS.get(fields.get(3, 1), "unknown"),
        "byte_fallback": bool(fields.get(35, 0)),
        "unk_id": _signed(fields.get(40, 0)),
        "bos_id": _signed(fields.get(41, 1)),
        "eos_id": _signed(fields.get(42, 2)),
        "pad_id": _signed(fields.get(43, -1)),
    }


def _normalizer_settings(fields: Mapping[int, Any]) -> dict[str, Any]:
    return {
        "charsmap": bytes(fields.get(2, b"")),
        "add_dummy_prefix": bool(fields.get(3, 1)),
        "remove_extra_whitespaces": bool(fields.get(4, 1)),
    }


def _text(value: Any) -> str:
    return bytes(value).decode("utf-8")


def _signed(value: int) -> int:
    """An int32, which is stored as the 64-bit two's complement."""
    return value - (1 << 64) if value >= 1 << 63 else value


def _message(value: Any) -> dict[int, Any]:
    """A message's fields by number; of a repeated one, the last."""
    if not isinstance(value, bytes):
        raise ValueError("not a SentencePiece model")
    return dict(_fields(value))


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """The fields of a message: numbers as ``int``, everything else as bytes.

    Raises:
        ValueError: The bytes are no message.
    """
    position = 0
    while position < len(data):
        key, position = _varint(data, position)
        field, wire_type = key >> 3, key & 7
        if wire_type == 0:
            value, position = _varint(data, position)
            yield field, value
            continue
        if wire_type == 2:
            length, position = _varint(data, position)
        elif wire_type in (1, 5):
            length = 8 if wire_type == 1 else 4
        else:
            raise ValueError("not a SentencePiece model")
        if position + length > len(data):
            raise ValueError("the file is cut off, or not a SentencePiece model")
        yield field, data[position : position + length]
        position += length


def _varint(data: bytes, position: int) -> tuple[int, int]:
    """The number at ``position``, seven bits per byte, and the position after it."""
    number = 0
    for shift in range(0, 70, 7):
        if position >= len(data):
            raise ValueError("the file is cut off, or not a SentencePiece model")
        byte = data[position]
        position += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number, position
    raise ValueError("not a SentencePiece model")


def tokenizer_of(model: SentencePieceModel, config: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer that gives SentencePiece's ids.

    Args:
        model: From :func:`parse`.
        config: Contents of ``tokenizer_config.json``: ``add_bos_token``, ``add_eos_token`` and ``legacy``.

    Raises:
        ValueError: The tokenizers library refuses the vocabulary.
    """
    try:
        tokenizer = Tokenizer(_bpe(model) if model.algorithm == "bpe" else _unigram(model))
    except Exception as error:  # the library raises plain Exception
        raise ValueError(f"the tokenizers library refuses its vocabulary: {error}") from error

    user_defined = [piece.text for piece in model.pieces if piece.type == PieceType.USER_DEFINED]
    # SentencePiece puts its space before a whole text. Where special tokens split one, transformers writes it before
    # each part (legacy), or only before the first.
    first_only = config.get("legacy") is False
    steps = _normalization(model)
    if model.add_dummy_prefix and not first_only:
        steps.append(_dummy_prefix(user_defined))
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", BLANK)])
    if model.add_dummy_prefix and first_only:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(BLANK, prepend_scheme="first", split=False)
    decoder = [decoders.Replace(BLANK, " "), decoders.ByteFallback(), decoders.Fuse()]
    if model.add_dummy_prefix:
        decoder.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(decoder)

    control = [piece.text for piece in model.pieces if piece.type in (PieceType.CONTROL, PieceType.UNKNOWN)]
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in control])
    # They are matched in the normalized text, where Gemma's runs of spaces are runs of BLANK.
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=True) for text in user_defined])
    tokenizer.post_processor = _post_processor(model, config)
    return tokenizer


def _bpe(model: SentencePieceModel) -> models.BPE:
    vocabulary = {piece.text: index for index, piece in enumerate(model.pieces)}
    normal = {text: index for text, index in vocabulary.items() if model.pieces[index].type == PieceType.NORMAL}
    return models.BPE(
        vocab=vocabulary,
        merges=ranked_merges({text: -model.pieces[index].score for text, index in normal.items()}, normal),
        unk_token=model.pieces[model.unk_id].text,
        fuse_unk=True,
        byte_fallback=model.byte_fallback,
    )


def _unigram(model: SentencePieceModel) -> models.Unigram:
    # A control token's score is 0, the best there is, and the library would read its text as the token.
    lowest = min(piece.score for piece in model.pieces) - 100.0
    scores = [(piece.text, piece.score if piece.type == PieceType.NORMAL else lowest) for piece in model.pieces]
    return models.Unigram(scores, unk_id=model.unk_id, byte_fallback=model.byte_fallback)


def _normalization(model: SentencePieceModel) -> list[Any]:
    steps: list[Any] = [normalizers.Precompiled(model.charsmap)] if model.charsmap else []
    if model.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    return steps


def _dummy_prefix(user_defined: Sequence[str]) -> Any:
    """What puts the space before a text."""
    if not user_defined:
        return normalizers.Prepend(BLANK)
    # The library normalizes the user-defined pieces themselves in the same way, which have to stay as they are.
    pieces = "|".join(map(re.escape, user_defined))
    return normalizers.Replace(Regex(rf"\A(?!(?:{pieces})\z)"), BLANK)


def _post_processor(model: SentencePieceModel, config: Mapping[str, Any]) -> Any:
    """What puts BOS before a text, unless ``tokenizer_config.json`` says otherwise, and EOS after it where it says so.

    The file does not know: it is the rule of Llama, Mistral and Gemma.
    """
    named = model.named_tokens()
    bos = named.get("bos_token") if config.get("add_bos_token", True) else None
    eos = named.get("eos_token") if config.get("add_eos_token", False) else None
    return begin_and_end(bos, eos, {piece.text: index for index, piece in enumerate(model.pieces)})
