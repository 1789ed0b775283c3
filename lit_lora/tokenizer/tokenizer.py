"""Text to ids and back, as the files of the checkpoint say and nothing else: a folder's name means nothing.

Special-token strings inside text are text: ``encode("<|im_end|>")`` gives the pieces of those ten characters. Only
the chat template writes special tokens, through :mod:`lit_lora.tokenizer.chat`. No method adds BOS or EOS by itself;
:func:`lit_lora.tokenizer.encode_text` is the one place that knows the rule for plain text.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from lit_lora.errors import InputError
from lit_lora.files import write_text
from lit_lora.tokenizer.stream import TextStream
from lit_lora.tokenizer.template import ChatTemplate, default_template

__all__ = ["Offsets", "Tokenizer"]

Offsets = list[tuple[int, int]]

_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# Stand-ins for the special tokens that a template wrote, when the text around them also contains such strings as
# text. Plane 15 is private use; each stand-in is as long as its token, so that offsets stay the same.
_STAND_IN, _FILL = 0xF0000, chr(0xFFFFD)


class Tokenizer:
    """A tokenizer with the chat template and the stop rules of its checkpoint.

    Made by :meth:`load`.

    Args:
        backend: The tokenizer of ``tokenizer.json``.
        files: The parsed JSON files beside it, by name, and ``chat_template.jinja`` as text.
        where: The folder, for messages.
    """

    def __init__(self, backend: tokenizers.Tokenizer, files: Mapping[str, Any], where: str) -> None:
        backend.no_truncation()
        backend.no_padding()
        self._files = dict(files)
        self.where = where
        """The folder it came from, for messages."""
        self._backend = backend
        self._named = _named_tokens(self._files, backend)
        _declare_special(backend, self._files, self._named)
        self._post_processor = backend.post_processor
        self.starts_with_bos = self.bos_id is not None and backend.encode("x").ids[:1] == [self.bos_id]
        """Whether plain text gets BOS in front, as the post-processor of ``tokenizer.json`` says."""
        # Post-processing adds nothing that is wanted from here on, and would cut blanks off the offsets.
        backend.post_processor = None
        own = _chat_template(self._files, where)
        self.has_own_template = own is not None
        """Whether the checkpoint brought a chat template; if not, a plain one is used, and saved with the rest."""
        text = own if own is not None else default_template(starts_with_bos=self.starts_with_bos)
        self.template = ChatTemplate(text, self._named, where)
        """The chat template, ready to render."""
        self._literal: tokenizers.Tokenizer | None = None
        self.extended = False
        """Whether tokens were added to those of the checkpoint since it was loaded."""

    def use_template(self, text: str, where: str) -> None:
        """Use another chat template than the checkpoint's, from now on and in what is saved.

        Args:
            text: The Jinja source.
            where: The file it comes from, for messages.

        Raises:
            InputError: It is not a valid template.
        """
        self.template = ChatTemplate(text, self._named, where)
        self.has_own_template = True
        for cached in ("stop_ids", "end_of_turn_id"):  # both follow from the template
            self.__dict__.pop(cached, None)

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """Read ``tokenizer.json`` and, where present, the files that say how it is used.

        Raises:
            InputError: There is no ``tokenizer.json``, or a file is not valid.
        """
        folder = Path(folder)
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise InputError(f"{folder}: no tokenizer.json", hint=_no_tokenizer_hint(folder))
        text = _read_text(path)
        try:
            backend = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # tokenizers raises a bare Exception
            raise InputError(f"{path}: not a tokenizer that the tokenizers library can read: {error}") from error
        files: dict[str, Any] = {name: _read_json(folder / name) for name in _SIDE_FILES if (folder / name).is_file()}
        if (folder / _TEMPLATE_FILE).is_file():
            files[_TEMPLATE_FILE] = _read_text(folder / _TEMPLATE_FILE)
        return cls(backend, files, str(folder))

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Ids of ``text``, without BOS or EOS.

        Args:
            text: Any text.
            special: Whether special-token strings in it are special tokens; by default they are text.
        """
        return self.encode_with_offsets(text, literal=() if special else ((0, len(text)),))[0]

    def encode_with_offsets(self, text: str, *, literal: Iterable[tuple[int, int]] = ()) -> tuple[list[int], Offsets]:
        """Ids of ``text`` and the characters ``text[start:end]`` that each one stands for, in one pass.

        Args:
            text: A rendered conversation: special-token strings in it are special tokens.
            literal: The ``(start, end)`` spans in which they are text.

        Raises:
            InputError: The text contains private-use characters that the two readings need.
        """
        if not any(self.special_pattern.search(text, start, end) for start, end in literal):
            encoding = self._backend.encode(text, add_special_tokens=False)
            return encoding.ids, encoding.offsets
        stand_ins = self._stand_ins
        if any(ord(character) >= _STAND_IN for character in text):
            raise InputError("the text contains both special-token strings and private-use characters U+F0000 and up")
        pieces, done = [], 0
        for start, end in sorted(literal):
            pieces += [self.special_pattern.sub(lambda found: stand_ins[found[0]], text[done:start]), text[start:end]]
            done = end
        pieces.append(self.special_pattern.sub(lambda found: stand_ins[found[0]], text[done:]))
        backend, originals = self._literal_backend()
        encoding = backend.encode("".join(pieces), add_special_tokens=False)
        return [originals.get(token, token) for token in encoding.ids], encoding.offsets

    def encode_many_with_offsets(
        self, texts: Sequence[str], literal: Sequence[Sequence[tuple[int, int]]]
    ) -> list[tuple[list[int], Offsets]]:
        """As :meth:`encode_with_offsets` for each text and its spans, on all cores.

        Raises:
            InputError: A text contains private-use characters that the two readings need.
        """
        plain = [
            not any(self.special_pattern.search(text, start, end) for start, end in spans)
            for text, spans in zip(texts, literal, strict=True)
        ]
        batch = [text for text, is_plain in zip(texts, plain, strict=True) if is_plain]
        encodings = iter(self._backend.encode_batch(batch, add_special_tokens=False))
        return [
            (encoding.ids, encoding.offsets)
            if is_plain and (encoding := next(encodings))
            else self.encode_with_offsets(text, literal=spans)
            for text, spans, is_plain in zip(texts, literal, plain, strict=True)
        ]

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Text of ``ids``; bytes that are not valid UTF-8 become U+FFFD.

        Args:
            ids: Token ids; those outside the vocabulary (padding of the embedding) give nothing.
            skip_special: Leave special tokens out.
        """
        if skip_special:
            ids = [token for token in ids if token not in self._special_ids]
        return self._backend.decode(list(ids), skip_special_tokens=False)

    def token(self, token_id: int) -> str | None:
        """The vocabulary's spelling of one id, or nothing if it has none."""
        return self._backend.id_to_token(token_id)

    def token_id(self, token: str) -> int | None:
        """The id of one vocabulary entry, or nothing if there is none."""
        return self._backend.token_to_id(token)

    def stream(self) -> TextStream:
        """A decoder that takes ids one at a time and gives text as soon as it is certain."""
        return TextStream(self.decode)

    @property
    def bos_id(self) -> int | None:
        """The id of BOS, if the checkpoint names one."""
        return self._named_id("bos_token")

    @property
    def eos_id(self) -> int | None:
        """The id of EOS, if the checkpoint names one."""
        return self._named_id("eos_token")

    @property
    def pad_id(self) -> int | None:
        """The id of padding, if the checkpoint names one. Nothing here masks by it: it may equal EOS."""
        return self._named_id("pad_token")

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """Ids that end an answer: EOS, those of the configuration files, and the template's end of turn."""
        ids = {self.eos_id, self.end_of_turn_id, *_configured_eos(self._files)}
        return frozenset(token for token in ids if token is not None)

    @cached_property
    def end_of_turn_id(self) -> int | None:
        """The special token that the template writes after an assistant's text, if it writes one."""
        found = self.special_pattern.findall(self.template.after_answer)
        return self._backend.token_to_id(found[-1]) if found else None

    @property
    def chat_template(self) -> str | None:
        """The Jinja text of the template in use."""
        return self.template.text

    @property
    def vocab_size(self) -> int:
        """One more than the largest id. The model's embedding may have more rows (padding), never fewer."""
        return 1 + max(self._backend.get_vocab(with_added_tokens=True).values())

    def add_tokens(self, tokens: Sequence[str]) -> list[int]:
        """Add words to the vocabulary (those it has already keep their id) and give their ids.

        They are ordinary words: found in any text, and shown when decoding.

        Raises:
            InputError: A token is empty.
        """
        if not all(tokens):
            raise InputError("a token to add must not be empty")
        known = self._backend.get_vocab(with_added_tokens=True)
        fresh = [token for token in tokens if token not in known]
        self.extended = self.extended or bool(fresh)
        self._backend.add_tokens([tokenizers.AddedToken(token, normalized=False) for token in fresh])
        self._literal = None
        ids = [self._backend.token_to_id(token) for token in tokens]
        return [token for token in ids if token is not None]

    def save(self, folder: Path) -> None:
        """Write the files that :meth:`load` and transformers read, template and stop rules included.

        Raises:
            DiskError: The disk is full or read-only.
        """
        for name, text in self._to_files().items():
            write_text(Path(folder) / name, text)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over everything that decides which ids come out; the same after save and load, wherever it lies."""
        rules = [self._to_json(), self.template.text, self._named, self.starts_with_bos, sorted(self.stop_ids)]
        return hashlib.sha256(json.dumps(rules, sort_keys=True).encode()).hexdigest()

    def _to_files(self) -> dict[str, str]:
        config = {key: value for key, value in self._files.get(_CONFIG, {}).items() if key != "chat_template"}
        config.update(self._named)
        config.setdefault("tokenizer_class", "PreTrainedTokenizerFast")
        others = {name: value for name, value in self._files.items() if name not in (_CONFIG, _TEMPLATE_FILE, _MODEL)}
        return {
            "tokenizer.json": self._to_json(),
            _TEMPLATE_FILE: self.template.text,
            **{
                name: json.dumps(value, indent=2, ensure_ascii=False)
                for name, value in {_CONFIG: config, **others}.items()
            },
        }

    def _to_json(self) -> str:
        self._backend.post_processor = self._post_processor
        try:
            return self._backend.to_str(pretty=True)
        finally:
            self._backend.post_processor = None

    def _named_id(self, name: str) -> int | None:
        return self._backend.token_to_id(self._named[name]) if name in self._named else None

    @cached_property
    def _special(self) -> dict[str, tokenizers.AddedToken]:
        named = set(self._named.values())
        added = self._backend.get_added_tokens_decoder().values()
        return {token.content: token for token in added if token.special or token.content in named}

    @cached_property
    def _special_ids(self) -> frozenset[int]:
        ids = (self._backend.token_to_id(token) for token in self._special)
        return frozenset(token for token in ids if token is not None)

    @cached_property
    def special_pattern(self) -> re.Pattern[str]:
        """Matches the strings that are special tokens where a template writes them."""
        # the longest first: one special token may begin with another
        return re.compile("|".join(map(re.escape, sorted(self._special, key=len, reverse=True))) or r"(?!)")

    @cached_property
    def _stand_ins(self) -> dict[str, str]:
        return {token: chr(_STAND_IN + i).ljust(len(token), _FILL) for i, token in enumerate(sorted(self._special))}

    def _literal_backend(self) -> tuple[tokenizers.Tokenizer, dict[int, int]]:
        """A copy for which special-token strings are text and their stand-ins are special; and its ids' originals."""
        if self._literal is None:
            self._literal = tokenizers.Tokenizer.from_str(self._backend.to_str())
            self._literal.encode_special_tokens = True
            self._literal.add_tokens(
                [
                    tokenizers.AddedToken(
                        stand_in,
                        single_word=self._special[token].single_word,
                        lstrip=self._special[token].lstrip,
                        rstrip=self._special[token].rstrip,
                        normalized=False,
                    )
                    for token, stand_in in self._stand_ins.items()
                ]
            )
        originals = {
            self._literal.token_to_id(stand_in): self._backend.token_to_id(token)
            for token, stand_in in self._stand_ins.items()
        }
        return self._literal, originals  # type: ignore[return-value]  # every one of them has an id


_CONFIG = "tokenizer_config.json"
_SPECIAL_MAP = "special_tokens_map.json"
_GENERATION = "generation_config.json"
_MODEL = "config.json"
_TEMPLATE_FILE = "chat_template.jinja"
_SIDE_FILES = (_CONFIG, _SPECIAL_MAP, _GENERATION, _MODEL)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start})") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise InputError(f"{path}:{error.lineno}: not valid JSON: {error.msg}") from error
    if not isinstance(data, dict):
        raise InputError(f"{path}: expected a JSON object, got {type(data).__name__}")
    return data


def _no_tokenizer_hint(folder: Path) -> str:
    if folder.is_file():
        return "that is a file, expected a checkpoint folder; lit-lora convert makes one of a GGUF or .pth file"
    if not folder.is_dir():
        return "there is no such folder; lit-lora download fetches a checkpoint"
    if (folder / "adapter").is_dir() or (folder / "adapter_config.json").is_file():
        return "that is a run or an adapter; lit-lora merge makes a checkpoint of it"
    if (folder / "tokenizer.model").is_file():
        return "tokenizer.model alone is not read; take tokenizer.json from the model's repository"
    return "a checkpoint folder holds config.json, tokenizer.json and *.safetensors; lit-lora convert makes one"


def _content(token: Any) -> str | None:
    """The text of a token, given as a word or as a mapping with its flags."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) and token else None


def _named_tokens(files: Mapping[str, Any], backend: tokenizers.Tokenizer) -> dict[str, str]:
    """``bos_token`` and the like, from the first file that says."""
    named = {}
    for name in _NAMED:
        token = _content(files.get(_CONFIG, {}).get(name)) or _content(files.get(_SPECIAL_MAP, {}).get(name))
        for file in (_GENERATION, _MODEL):
            if token is None and name in ("bos_token", "eos_token"):
                token_id = files.get(file, {}).get(f"{name}_id")
                token_id = token_id[0] if isinstance(token_id, list) and token_id else token_id
                token = backend.id_to_token(token_id) if type(token_id) is int and token_id >= 0 else None
        if token is not None:
            named[name] = token
    return named


def _declare_special(backend: tokenizers.Tokenizer, files: Mapping[str, Any], named: Mapping[str, str]) -> None:
    """Make special those tokens that ``tokenizer_config.json`` calls so and ``tokenizer.json`` does not know yet."""
    config = files.get(_CONFIG, {})
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    listed = [*named.values()]
    for key in ("additional_special_tokens", "extra_special_tokens"):
        extra = config.get(key) or files.get(_SPECIAL_MAP, {}).get(key) or []
        listed += [_content(token) for token in (extra.values() if isinstance(extra, dict) else extra)]  # type: ignore[misc]
    for _, token in sorted((config.get("added_tokens_decoder") or {}).items(), key=lambda item: int(item[0])):
        if isinstance(token, dict) and token.get("content") not in known:
            flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
            added = tokenizers.AddedToken(token["content"], **{key: token[key] for key in flags if key in token})
            (backend.add_special_tokens if token.get("special") else backend.add_tokens)([added])
            known.add(token["content"])
    fresh = [token for token in dict.fromkeys(listed) if token and token not in known]
    backend.add_special_tokens([tokenizers.AddedToken(token, special=True, normalized=False) for token in fresh])


def _chat_template(files: Mapping[str, Any], where: str) -> str | None:
    """The template's text: from its own file, else from ``tokenizer_config.json`` (one text, or a list of named ones).

    Raises:
        InputError: It has another form.
    """
    if _TEMPLATE_FILE in files:
        return str(files[_TEMPLATE_FILE])
    given = files.get(_CONFIG, {}).get("chat_template")
    if given is None or isinstance(given, str):
        return given
    try:
        templates = {entry["name"]: entry["template"] for entry in given}
        return str(templates["default"] if "default" in templates else next(iter(templates.values())))
    except (TypeError, KeyError, StopIteration) as error:
        raise InputError(
            f"{where}/{_CONFIG}: chat_template: expected text or a list of {{name, template}}, got something else"
        ) from error


def _configured_eos(files: Mapping[str, Any]) -> list[int]:
    """Every EOS id that the model's configuration files name."""
    found: list[int] = []
    for file in (_GENERATION, _MODEL):
        given = files.get(file, {}).get("eos_token_id")
        found += [token for token in (given if isinstance(given, list) else [given]) if type(token) is int]
    return found
