"""Text to ids and back, decided by the checkpoint's files alone, never by its name.

Special-token strings in text are text: ``encode("<|im_end|>")`` gives the pieces of those ten characters. Only the chat
template writes special tokens, through :mod:`lit_lora.tokenizer.chat`. No method adds BOS or EOS; the rule for plain
text is in :func:`lit_lora.tokenizer.encode_text`.
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

from lit_lora import log
from lit_lora.config import did_you_mean
from lit_lora.errors import InputError, UsageError
from lit_lora.files import disk_errors, read_json, read_text, remove_folder, write_text
from lit_lora.tokenizer.backend import FAST, Backend, read_backend
from lit_lora.tokenizer.stream import TextStream
from lit_lora.tokenizer.template import DATE, ChatTemplate
from lit_lora.tokenizer.template_files import FOLDER, choose_default, read_templates, template_files
from lit_lora.tokenizer.templates import DEFAULT, NAMED, named_template

__all__ = ["Offsets", "Tokenizer"]

Offsets = list[tuple[int, int]]
"""The ``text[start:end]`` of each id."""

_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# Stand-ins for the special tokens that a template wrote, for a text in which a user wrote such strings too. They are
# characters for private use from plane 15, as many as the token has characters, so that offsets stay the same.
_STAND_IN = 0xF0000
_FILL = chr(0xFFFFD)
# What looks like a special token at the end of an answer.
_MARK = re.compile(r"<[^<>\s]+>|\[/?[A-Z_]+\]")
_BY_TEMPLATE = (
    *("end_of_turn_id", "special_pattern", "stop_ids"),
    *("_special", "_special_ids", "_stand_ins", "_tool_template"),
)


class Tokenizer:
    """A tokenizer with the chat template and the stop rules of its checkpoint; see :meth:`load`.

    Args:
        backend: The vocabulary; its truncation, padding and post-processing are switched off.
        files: The parsed JSON files beside it, by name.
        templates: The checkpoint's chat templates by name.
        where: The folder, for error messages.

    Raises:
        InputError: The files are of different models.
    """

    def __init__(self, backend: Backend, files: Mapping[str, Any], templates: Mapping[str, str], where: str) -> None:
        self._backend = backend.tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        self._converted = backend.converted
        self._files = dict(files)
        self._files[_SPECIAL_MAP] = {**backend.named, **self._files.get(_SPECIAL_MAP, {})}
        self.where = where
        """The folder it comes from, for error messages."""
        self._named = _named_tokens(self._files, self._backend)
        _declare_special(self._backend, self._files, self._named, where)
        self._post_processor = self._backend.post_processor
        self.starts_with_bos = self.bos_id is not None and self._backend.encode("x").ids[:1] == [self.bos_id]
        """Whether plain text begins with BOS, as the post-processor of ``tokenizer.json`` decides."""
        # From here on, post-processing is only for saving: it adds special tokens, and trims spaces off the offsets.
        self._backend.post_processor = None

        self._templates = dict(templates)
        self.has_own_template = bool(templates)
        """Whether the checkpoint has a chat template; if not, a plain one is used."""
        self.template_name = DEFAULT
        """What to call the template in use."""
        if templates:
            name, text = choose_default(templates, where)
            self.template_name = "the checkpoint's own" if name == "default" else f"{name!r} of the checkpoint"
        else:
            text = named_template(DEFAULT, starts_with_bos=self.starts_with_bos)
        self.template = ChatTemplate(text, self._named, where)
        self._mark_special()
        self._literal: tokenizers.Tokenizer | None = None
        self.changed = False
        """Whether a model trained with it needs files of its own: tokens were added, or a template was chosen."""

    def adopt_template(self) -> None:
        """Make the plain template of a checkpoint without one its own: what is trained by it is to be saved with it."""
        if not self.has_own_template:
            self.has_own_template = self.changed = True

    def choose_template(self, name: str) -> None:
        """Replace the chat template, also in what :meth:`save` writes.

        Args:
            name: The path of a Jinja file, the name of one of the checkpoint's own templates, or one of ``NAMED``.

        Raises:
            InputError: It is not a valid template, or what ends its answers is not a token of this vocabulary.
            UsageError: There is no such template.
        """
        path = Path(name)
        if path.is_file() or path.suffix == ".jinja" or len(path.parts) > 1:
            self.use_template(read_text(path), name)
        elif name in self._templates:
            self.use_template(self._templates[name], f"{self.where}: {name}")
        elif name in NAMED:
            self.use_template(named_template(name, starts_with_bos=self.starts_with_bos), name)
            self._warn_of_missing_tokens(name)
        else:
            names = [*self._templates, *NAMED]
            known = ", ".join(names)
            raise UsageError(
                f"no chat template {name!r}{did_you_mean(name, names)}, known: {known}",
                hint="give one of them, or the path of a .jinja file",
            )
        self._check_end_of_turn(name)
        self.template_name = name
        self.changed = True

    def use_template(self, text: str, where: str) -> None:
        """Replace the chat template by its source; see :meth:`choose_template`.

        Args:
            text: The Jinja source.
            where: The file it comes from, for error messages.

        Raises:
            InputError: It is not a valid template.
        """
        self.template = ChatTemplate(text, self._named, where)
        self._templates = {"default": text}
        self.has_own_template = True
        self._literal = None
        # All of these depend on what the template writes after an answer.
        for cached in _BY_TEMPLATE:
            self.__dict__.pop(cached, None)
        self._mark_special()

    def _mark_special(self) -> None:
        """Let the library know which tokens are special, so that a user who writes one writes text."""
        self._backend.add_special_tokens(list(self._special))

    def template_for(self, tools: Sequence[Any] | None) -> ChatTemplate:
        """The template of a conversation: with tools, the checkpoint's own for tools if it has one."""
        return self._tool_template if tools else self.template

    @cached_property
    def _tool_template(self) -> ChatTemplate:
        text = self._templates.get("tool_use")
        return self.template if text is None else ChatTemplate(text, self._named, self.where)

    def _warn_of_missing_tokens(self, name: str) -> None:
        missing = [token for token in NAMED[name] if len(self.encode(token, special=True)) > 1]
        if missing:
            counted = ", ".join(f"{token} is {len(self.encode(token))} tokens" for token in missing)
            log.warn(
                f"chat template {name}: {counted} in this vocabulary, so rows are longer than with the model's own"
            )

    def _check_end_of_turn(self, name: str) -> None:
        """Refuse a template whose answers do not end in one token: generation could not stop there.

        Raises:
            InputError: See above.
        """
        mark = _MARK.search(self.template.after_answer)
        if mark and self.end_of_turn_id is None:
            with_eos = [other for other, tokens in NAMED.items() if not tokens]
            raise InputError(
                f"chat template {name}: {mark[0]} ends an answer, which is not a token of {self.where}",
                hint=f"choose one that ends with EOS ({', '.join(with_eos)}), "
                f"or train it as a new token: peft.trainable_tokens='[\"{mark[0]}\"]'",
            )

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """Read the vocabulary and, if present, the configuration files and the chat templates beside it.

        Raises:
            InputError: There is no vocabulary, a file is not valid, or they are of different models.
        """
        folder = Path(folder)
        files: dict[str, Any] = {}
        for name in _SIDE_FILES:
            if (folder / name).is_file():
                files[name] = read_json(folder / name)
        backend = read_backend(folder, files.get(_CONFIG, {}))
        tokenizer = cls(backend, files, read_templates(folder, files.get(_CONFIG, {})), str(folder))
        config = files.get(_MODEL, {})
        text_model = config.get("text_config")
        rows = (text_model if isinstance(text_model, dict) else config).get("vocab_size")
        if type(rows) is int:
            tokenizer.require_fit(rows)
        return tokenizer

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Ids of ``text``, without BOS or EOS.

        Args:
            text: Any text.
            special: Read special-token strings as special tokens instead of text.
        """
        literal = [] if special else [(0, len(text))]
        return self.encode_with_offsets(text, literal=literal)[0]

    def encode_with_offsets(self, text: str, *, literal: Iterable[tuple[int, int]] = ()) -> tuple[list[int], Offsets]:
        """Ids of ``text`` and the span ``text[start:end]`` of each, in one pass.

        Args:
            text: A rendered conversation, in which special-token strings are special tokens.
            literal: The ``(start, end)`` spans in which they are text.

        Raises:
            InputError: The text contains special-token strings of both kinds, and private-use characters as well.
        """
        literal = list(literal)
        if not self._has_special_string(text, literal):
            encoding = self._backend.encode(text, add_special_tokens=False)
            return encoding.ids, encoding.offsets

        # The same strings mean two things in this text. Outside the literal spans, stand-ins take their place; then a
        # backend that knows the stand-ins as special tokens reads everything else as text.
        if any(ord(character) >= _STAND_IN for character in text):
            raise InputError("the text contains both special-token strings and private-use characters U+F0000 and up")
        pieces = []
        position = 0
        for start, end in sorted(literal):
            pieces += [self._with_stand_ins(text[position:start]), text[start:end]]
            position = end
        pieces.append(self._with_stand_ins(text[position:]))
        backend, original_ids = self._literal_backend()
        encoding = backend.encode("".join(pieces), add_special_tokens=False)
        return [original_ids.get(token_id, token_id) for token_id in encoding.ids], encoding.offsets

    def _has_special_string(self, text: str, spans: Iterable[tuple[int, int]]) -> bool:
        return any(self.special_pattern.search(text, start, end) for start, end in spans)

    def _with_stand_ins(self, text: str) -> str:
        return self.special_pattern.sub(lambda match: self._stand_ins[match[0]], text)

    def encode_many_with_offsets(
        self, texts: Sequence[str], literal: Sequence[Sequence[tuple[int, int]]]
    ) -> list[tuple[list[int], Offsets]]:
        """:meth:`encode_with_offsets` for each text and its spans, on all cores.

        Raises:
            InputError: A text contains special-token strings of both kinds, and private-use characters as well.
        """
        # The few texts with such strings in a literal span are encoded one by one, all others in one batch.
        batch: list[str] = []
        encoded: dict[int, tuple[list[int], Offsets]] = {}
        for number, (text, spans) in enumerate(zip(texts, literal, strict=True)):
            if self._has_special_string(text, spans):
                encoded[number] = self.encode_with_offsets(text, literal=spans)
            else:
                batch.append(text)
        encodings = iter(self._backend.encode_batch(batch, add_special_tokens=False))
        for number in range(len(texts)):
            if number not in encoded:
                encoding = next(encodings)
                encoded[number] = (encoding.ids, encoding.offsets)
        return [encoded[number] for number in range(len(texts))]

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Text of ``ids``; bytes that are not valid UTF-8 become U+FFFD.

        Args:
            ids: Token ids; ids outside the vocabulary (padding of the embedding) decode to nothing.
            skip_special: Omit special tokens.
        """
        if skip_special:
            ids = [token_id for token_id in ids if token_id not in self._special_ids]
        return self._backend.decode(list(ids), skip_special_tokens=False)

    def token(self, token_id: int) -> str | None:
        """The vocabulary entry of an id, or None if there is none."""
        return self._backend.id_to_token(token_id)

    def token_id(self, token: str) -> int | None:
        """The id of a vocabulary entry, or None if there is none."""
        return self._backend.token_to_id(token)

    def stream(self) -> TextStream:
        """A decoder that takes ids one by one and returns text once it is certain."""
        return TextStream(self.decode)

    @property
    def bos_id(self) -> int | None:
        """The id of BOS, or None if the checkpoint names none."""
        return self._named_id("bos_token")

    @property
    def eos_id(self) -> int | None:
        """The id of EOS, or None if the checkpoint names none."""
        return self._named_id("eos_token")

    @property
    def pad_id(self) -> int | None:
        """The id of padding, or None if the checkpoint names none. It may equal EOS, so nothing masks by it."""
        return self._named_id("pad_token")

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """Ids that end an answer: EOS, the EOS ids of the configuration files, and the template's end of turn."""
        ids = {self.eos_id, self.end_of_turn_id, *_configured_eos(self._files)}
        return frozenset(token for token in ids if token is not None)

    @cached_property
    def end_of_turn_id(self) -> int | None:
        """The id of the special token that the template writes after an assistant's text, or None if it writes none."""
        end_tokens = self.special_pattern.findall(self.template.after_answer)
        return self._backend.token_to_id(end_tokens[-1]) if end_tokens else None

    @property
    def chat_template(self) -> str | None:
        """The Jinja source of the template in use."""
        return self.template.text

    @property
    def vocab_size(self) -> int:
        """The largest id plus one. The model's embedding may have more rows (padding), never fewer."""
        return 1 + max(self._backend.get_vocab(with_added_tokens=True).values())

    def require_fit(self, rows: int) -> None:
        """Refuse the tokenizer of another model.

        Args:
            rows: Rows of the model's embedding.

        Raises:
            InputError: It has more tokens than the embedding has rows, or it knows none of the ids with which the
                configuration files end a text as a special token.
        """
        hint = "tokenizer.json and config.json are of different models"
        vocabulary = self._backend.get_vocab(with_added_tokens=True)
        beyond = [token for token, token_id in vocabulary.items() if token_id >= rows]
        # A padding token is often added without a row in the embedding. Nothing here computes padding.
        if beyond and beyond != [self._named.get("pad_token")]:
            which = f" ({', '.join(sorted(beyond))} beyond it)" if len(beyond) <= 3 else ""
            raise InputError(
                f"{self.where}: the tokenizer has {self.vocab_size} tokens, the model's embedding {rows}{which}",
                hint=hint,
            )
        ends = {token_id: self.token(token_id) for token_id in _configured_eos(self._files)}
        if ends and not any(token in self._special for token in ends.values()):
            token_id, token = next(iter(ends.items()))
            meaning = "no token" if token is None else f"the ordinary token {token!r}"
            raise InputError(
                f"{self.where}: the model ends a text with id {token_id}, which is {meaning} of the tokenizer",
                hint=hint,
            )

    def add_tokens(self, tokens: Sequence[str]) -> list[int]:
        """Add words to the vocabulary, and return their ids; existing ones keep theirs.

        They are ordinary tokens: recognized in any text, and shown when decoding.

        Raises:
            InputError: A token is empty.
        """
        if not all(tokens):
            raise InputError("a token to add must not be empty")
        vocabulary = self._backend.get_vocab(with_added_tokens=True)
        new_tokens = [token for token in tokens if token not in vocabulary]
        self.changed = self.changed or bool(new_tokens)
        self._backend.add_tokens([tokenizers.AddedToken(token, normalized=False) for token in new_tokens])
        self._literal = None  # a copy from before
        vocabulary = self._backend.get_vocab(with_added_tokens=True)
        return [vocabulary[token] for token in tokens]

    def save(self, folder: Path) -> None:
        """Write the files that :meth:`load` and transformers read, including the template and the stop rules.

        Raises:
            DiskError: The disk is full or read-only.
        """
        folder = Path(folder)
        if self.has_own_template:
            remove_folder(folder / FOLDER)  # another model's
        for name, text in self._to_files().items():
            path = folder / name
            with disk_errors(folder):
                path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, text)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of everything that decides the ids; the same after save and load, whatever the folder."""
        templates = [self.template.text, self.template_for([{}]).text]
        rules = [self._to_json(), templates, self._named, self.starts_with_bos, sorted(self.stop_ids)]
        if self.template.asks_for_date:
            rules.append(DATE)
        return hashlib.sha256(json.dumps(rules, sort_keys=True).encode()).hexdigest()

    def _to_files(self) -> dict[str, str]:
        """The files of :meth:`save`: name -> text."""
        json_files = {name: dict(value) for name, value in self._files.items() if name != _MODEL}  # the model's own
        config = json_files.setdefault(_CONFIG, {})
        config.pop("chat_template", None)  # it has a file of its own
        config.update(self._named)
        config.setdefault("tokenizer_class", _CLASS)
        if self._converted:  # the class that read the original file would read tokenizer.json by rules of its own
            config["tokenizer_class"] = _CLASS
            config.pop("auto_map", None)
        if not json_files[_SPECIAL_MAP]:
            del json_files[_SPECIAL_MAP]

        # Other programs stop at the ids of this file only.
        end_of_turn = self.end_of_turn_id
        if self.has_own_template and end_of_turn is not None and end_of_turn not in _configured_eos(json_files):
            generation = json_files.setdefault(_GENERATION, {})
            eos_ids = _configured_eos(self._files) or [token for token in [self.eos_id] if token is not None]
            stops = list(dict.fromkeys([*eos_ids, end_of_turn]))
            generation["eos_token_id"] = stops if len(stops) > 1 else stops[0]

        files = {FAST: self._to_json()}
        if self.has_own_template:
            files |= template_files(self._templates or {"default": self.template.text})
        for name, value in json_files.items():
            files[name] = json.dumps(value, indent=2, ensure_ascii=False)
        return files

    def _to_json(self) -> str:
        """The text of ``tokenizer.json``, with the post-processor that it came with."""
        self._backend.post_processor = self._post_processor
        try:
            return self._backend.to_str(pretty=True)
        finally:
            self._backend.post_processor = None

    def _named_id(self, name: str) -> int | None:
        return self._backend.token_to_id(self._named[name]) if name in self._named else None

    @cached_property
    def _special(self) -> dict[str, tokenizers.AddedToken]:
        """The special tokens by their strings: those declared so, and what the template ends an answer with."""
        named = set(self._named.values())
        end = self.template.after_answer
        special = {}
        for token in self._backend.get_added_tokens_decoder().values():
            if token.special or token.content in named or (_MARK.fullmatch(token.content) and token.content in end):
                special[token.content] = token
        return special

    @cached_property
    def _special_ids(self) -> frozenset[int]:
        ids = (self._backend.token_to_id(token) for token in self._special)
        return frozenset(token_id for token_id in ids if token_id is not None)

    @cached_property
    def special_pattern(self) -> re.Pattern[str]:
        """Matches the strings of special tokens; nothing if there are none."""
        longest_first = sorted(self._special, key=len, reverse=True)  # one may begin with another
        if not longest_first:
            return re.compile(r"(?!)")
        return re.compile("|".join(map(re.escape, longest_first)))

    @cached_property
    def _stand_ins(self) -> dict[str, str]:
        """Special token -> the string of the same length that stands in for it."""
        stand_ins = {}
        for number, token in enumerate(sorted(self._special)):
            stand_ins[token] = chr(_STAND_IN + number).ljust(len(token), _FILL)
        return stand_ins

    def _literal_backend(self) -> tuple[tokenizers.Tokenizer, dict[int, int]]:
        """A copy that reads special-token strings as text and stand-ins as special tokens, and its ids' originals."""
        if self._literal is None:
            added = []
            for token, stand_in in self._stand_ins.items():
                special = self._special[token]
                added.append(
                    tokenizers.AddedToken(
                        stand_in,
                        single_word=special.single_word,
                        lstrip=special.lstrip,
                        rstrip=special.rstrip,
                        normalized=False,
                    )
                )
            self._literal = tokenizers.Tokenizer.from_str(self._backend.to_str())
            self._literal.encode_special_tokens = True  # the library's name for: as text
            self._literal.add_tokens(added)

        original_ids = {}
        for token, stand_in in self._stand_ins.items():
            original_ids[self._literal.token_to_id(stand_in)] = self._backend.token_to_id(token)
        return self._literal, original_ids  # type: ignore[return-value]  # every one of them has an id


_CONFIG = "tokenizer_config.json"
_SPECIAL_MAP = "special_tokens_map.json"
_GENERATION = "generation_config.json"
_MODEL = "config.json"
_SIDE_FILES = (_CONFIG, _SPECIAL_MAP, _GENERATION, _MODEL)
_TOKEN_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
_CLASS = "PreTrainedTokenizerFast"
"""transformers' class that takes ``tokenizer.json`` as it is."""


def _content(token: Any) -> str | None:
    """The text of a token that is written as a string, or as a mapping with its flags."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) and token else None


def _named_tokens(files: Mapping[str, Any], backend: tokenizers.Tokenizer) -> dict[str, str]:
    """``bos_token`` and the like, each from the first file that names it."""
    named = {}
    for name in _NAMED:
        token = _content(files.get(_CONFIG, {}).get(name)) or _content(files.get(_SPECIAL_MAP, {}).get(name))
        if token is None and name in ("bos_token", "eos_token"):
            token = _token_by_id(files, f"{name}_id", backend)
        if token is not None:
            named[name] = token
    return named


def _token_by_id(files: Mapping[str, Any], key: str, backend: tokenizers.Tokenizer) -> str | None:
    """The token whose id is in ``generation_config.json`` or ``config.json``; of several ids, the first."""
    for file in (_GENERATION, _MODEL):
        token_ids = _ids_in(files, file, key)
        if token_ids and token_ids[0] >= 0:
            token = backend.id_to_token(token_ids[0])
            if token is not None:
                return token
    return None


def _ids_in(files: Mapping[str, Any], file: str, key: str) -> list[int]:
    """The ids under a key that holds one id or a list of them; anything else is ignored."""
    value = files.get(file, {}).get(key)
    values = value if isinstance(value, list) else [value]
    return [token_id for token_id in values if type(token_id) is int]


def _configured_eos(files: Mapping[str, Any]) -> list[int]:
    """Every EOS id in the model's configuration files."""
    return _ids_in(files, _GENERATION, "eos_token_id") + _ids_in(files, _MODEL, "eos_token_id")


def _declare_special(
    backend: tokenizers.Tokenizer, files: Mapping[str, Any], named: Mapping[str, str], where: str
) -> None:
    """Add the tokens that only the configuration files declare, which ``tokenizer.json`` may lack.

    Raises:
        InputError: A file gives a token another id than the vocabulary can.
    """
    config = files.get(_CONFIG, {})
    present = {token.content for token in backend.get_added_tokens_decoder().values()}
    hint = "the two files are of different models; take both from the model's repository"

    # added_tokens_decoder maps ids to tokens: in the order of the ids, each gets its own.
    decoder = config.get("added_tokens_decoder") or {}
    for token_id in sorted(decoder, key=int):
        token = decoder[token_id]
        if not isinstance(token, dict) or not isinstance(token.get("content"), str):
            continue
        if token["content"] in present:
            known_id = backend.token_to_id(token["content"])
            if known_id != int(token_id):
                log.warn(
                    f"{where}/{_CONFIG}: {token['content']!r} has the id {token_id}, but {known_id} in the vocabulary, "
                    f"which is used: {hint}"
                )
            continue
        flags = {key: token[key] for key in _TOKEN_FLAGS if key in token}
        added = tokenizers.AddedToken(token["content"], **flags)
        if token.get("special"):
            backend.add_special_tokens([added])
        else:
            backend.add_tokens([added])
        present.add(token["content"])
        if backend.token_to_id(token["content"]) != int(token_id):
            raise InputError(
                f"{where}/{_CONFIG}: {token['content']!r} has the id {token_id}, "
                f"but {backend.token_to_id(token['content'])} in the vocabulary",
                hint=hint,
            )

    for name in ("bos_token", "eos_token"):
        if name in named and backend.token_to_id(named[name]) is None:
            log.warn(
                f"{where}: {name} {named[name]!r} is not in the vocabulary; it gets an id that the model never learned"
            )
    listed: list[str | None] = list(named.values())
    for key in ("additional_special_tokens", "extra_special_tokens"):
        extra = config.get(key) or files.get(_SPECIAL_MAP, {}).get(key) or []
        listed += [_content(token) for token in (extra.values() if isinstance(extra, dict) else extra)]
    missing = [token for token in dict.fromkeys(listed) if token and token not in present]
    backend.add_special_tokens([tokenizers.AddedToken(token, special=True, normalized=False) for token in missing])
