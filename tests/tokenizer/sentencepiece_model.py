"""SentencePiece models, written byte by byte: no other package is needed to make or read one."""

from __future__ import annotations

import struct
from collections.abc import Sequence

from lit_lora.tokenizer.sentencepiece import Piece, PieceType

__all__ = ["sentencepiece_model", "vocabulary"]


def varint(number: int) -> bytes:
    number &= (1 << 64) - 1
    encoded = b""
    while number >= 0x80:
        encoded += bytes([number & 0x7F | 0x80])
        number >>= 7
    return encoded + bytes([number])


def field(number: int, value: int | bytes | float) -> bytes:
    """A field of a protocol buffer."""
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    if isinstance(value, bytes):
        return varint(number << 3 | 2) + varint(len(value)) + value
    return varint(number << 3) + varint(value)


def sentencepiece_model(
    pieces: Sequence[Piece],
    *,
    algorithm: int = 2,
    byte_fallback: bool = True,
    add_dummy_prefix: bool = True,
    remove_extra_whitespaces: bool = False,
    charsmap: bytes = b"",
    pad_id: int = -1,
) -> bytes:
    """The bytes of a ``tokenizer.model``."""
    data = b""
    for piece in pieces:
        data += field(1, field(1, piece.text.encode()) + field(2, piece.score) + field(3, piece.type))
    data += field(2, field(3, algorithm) + field(35, int(byte_fallback)) + field(43, pad_id))
    normalizer = field(2, charsmap) + field(3, int(add_dummy_prefix)) + field(4, int(remove_extra_whitespaces))
    return data + field(3, normalizer)


def vocabulary(*, byte_pieces: bool = True, user_defined: Sequence[str] = ()) -> list[Piece]:
    """Llama's layout: unknown, BOS, EOS, bytes, then pieces from the best score to the worst."""
    pieces = [Piece("<unk>", 0.0, PieceType.UNKNOWN), Piece("<s>", 0.0, PieceType.CONTROL)]
    pieces.append(Piece("</s>", 0.0, PieceType.CONTROL))
    pieces += [Piece(text, 0.0, PieceType.USER_DEFINED) for text in user_defined]
    if byte_pieces:
        pieces += [Piece(f"<0x{byte:02X}>", 0.0, PieceType.BYTE) for byte in range(256)]
    joined = ["▁h", "el", "lo", "ello", "▁hello", "or", "ld", "▁w", "orld", "▁world", "is", "▁is", "▁▁"]
    letters = list("▁helowrdaistx<>/\nnv")
    scored = [*joined, *letters]
    return pieces + [Piece(text, -1.0 - number) for number, text in enumerate(scored)]
