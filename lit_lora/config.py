"""YAML to validated settings: strict, with file and line, all problems in one report.

A settings model is declared beside the code that it configures, as a :class:`Settings` subclass with a description on
every field. ``load_config`` reads a YAML file into one. YAML is composed to nodes instead of loaded, so that every
value keeps its line; scalars follow YAML 1.2 (``1e-4`` is a number, ``no`` is text); repeated keys, aliases and tags
are errors.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar, Union

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    Tag,
    ValidationError,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError

from lit_lora import log
from lit_lora.aliases import ALIASES, ANSWERS
from lit_lora.errors import UsageError, first_line

__all__ = [
    "Document",
    "OneOf",
    "Settings",
    "did_you_mean",
    "dump_yaml",
    "find_config",
    "load_config",
    "problem_at",
    "read_config",
    "read_yaml",
    "shipped_configs",
    "validate",
]

KeyPath = tuple[str | int, ...]
"""The keys and list indices that lead to a value."""


class Settings(BaseModel):
    """Base of every settings model: frozen; an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    renamed: ClassVar[Mapping[str, str]] = {}
    """Former key -> present key. A former key is accepted, with a line that names the present one."""

    @model_validator(mode="before")
    @classmethod
    def _accept_former_names(cls, data: Any) -> Any:
        if not isinstance(data, dict) or not cls.renamed.keys() & data.keys():
            return data
        renamed = {}
        for key, value in data.items():
            present = cls.renamed.get(key, key)
            if present != key:
                if present in data:
                    raise ValueError(f"{key} is the former name of {present}; give only {present}")
                log.note(f"config: {key} is now called {present}")
            renamed[present] = value
        return renamed


def problem_at(path: KeyPath, message: str) -> ValidationError:
    """What a validator of a whole section raises to blame the value at ``path`` below the section."""
    problem = PydanticCustomError("value_error", "{message}", {"message": message})
    return ValidationError.from_exception_data("settings", [{"type": problem, "loc": path, "input": None}])


class OneOf:
    """Marks a section whose key ``name`` picks one of several settings models; the first one where it is omitted.

    ``Annotated[Base, OneOf(models)]`` is a ``Base`` to the type checker, and to pydantic the union of ``models``.

    Args:
        models: Name: the settings model, whose field ``name`` has this name as its default.
    """

    def __init__(self, models: Mapping[str, type[Settings]]) -> None:
        self.models = models

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        first = next(iter(self.models))
        if len(self.models) == 1:  # pydantic takes no union of one
            return handler.generate_schema(self.models[first])

        def name_of(section: Any) -> str:
            """The name in plain data, or that of settings which are already validated."""
            name = section.get("name", first) if isinstance(section, dict) else getattr(section, "name", first)
            return str(name)

        tagged = tuple(Annotated[model, Tag(name)] for name, model in self.models.items())
        return handler.generate_schema(Annotated[Union[tagged], Discriminator(name_of)])  # noqa: UP007

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """Without a ``name`` only the first model fits; else ``{lr: 1e-3}`` would fit all, which ``oneOf`` forbids."""
        json_schema = handler(schema)
        for part in json_schema.get("oneOf", [])[1:]:
            part["required"] = ["name"]
        return json_schema


Model = TypeVar("Model", bound=BaseModel)

_NULL = {"", "~", "null", "Null", "NULL"}
_BOOL = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_INT = re.compile(r"[-+]?(0|[1-9][0-9]*(_[0-9]+)*)\Z")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(_[0-9]+)*(\.[0-9]*)?)([eE][-+]?[0-9]+)?\Z")
_MAX_DEPTH = 32


class Document:
    """The plain data of a YAML text, and the line of each value.

    Args:
        text: The YAML.
        name: Its name in messages.

    Raises:
        UsageError: The text is not valid YAML. Problems within valid YAML are collected in ``problems``.
    """

    def __init__(self, text: str, name: str) -> None:
        self.name = name
        self.places: dict[KeyPath, str] = {}
        """``file:line`` of each value."""
        self.problems: list[str] = []
        try:
            for event in yaml.parse(text, Loader=yaml.SafeLoader):
                if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
                    line = event.start_mark.line + 1 if event.start_mark else 1
                    raise UsageError(f"{name}:{line}: anchors and aliases are not supported; write the value out")
            node = yaml.compose(text, Loader=yaml.SafeLoader)
        except yaml.MarkedYAMLError as error:
            line = error.problem_mark.line + 1 if error.problem_mark else 1
            raise UsageError(f"{name}:{line}: not valid YAML: {error.problem}") from error
        except (yaml.YAMLError, RecursionError) as error:
            raise UsageError(f"{name}: not valid YAML: {first_line(error)}") from error
        self.data = self._value(node, (), 0) if node is not None else {}

    def _value(self, node: yaml.Node, path: KeyPath, depth: int) -> Any:
        place = f"{self.name}:{node.start_mark.line + 1}"
        self.places.setdefault(path, place)
        if depth > _MAX_DEPTH:
            raise UsageError(f"{place}: nested more than {_MAX_DEPTH} levels deep")
        if node.tag and not node.tag.startswith("tag:yaml.org,2002:"):
            self.problems.append(f"{place}: YAML tags such as {node.tag} are not supported")
            return None
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path, depth)
        if isinstance(node, yaml.SequenceNode):
            return [self._value(child, (*path, index), depth + 1) for index, child in enumerate(node.value)]
        return _scalar(node.value, plain=getattr(node, "style", None) is None)

    def _mapping(self, node: yaml.MappingNode, path: KeyPath, depth: int) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            place = f"{self.name}:{key_node.start_mark.line + 1}"
            if not isinstance(key_node, yaml.ScalarNode):
                self.problems.append(f"{place}: expected a plain key, got a list or a mapping")
                continue
            key = key_node.value
            if key in result:
                first = self.places[(*path, key)].rpartition(":")[2]
                self.problems.append(f"{place}: {key!r} is given twice (first on line {first})")
                continue
            self.places[(*path, key)] = place
            result[key] = self._value(value_node, (*path, key), depth + 1)
        return result


def _scalar(text: str, *, plain: bool) -> str | int | float | bool | None:
    """The value of a scalar by the rules of YAML 1.2; one that is not ``plain``, but quoted, is text."""
    if not plain:
        return text
    if text in _NULL:
        return None
    if text in _BOOL:
        return _BOOL[text]
    if _INT.match(text) and len(text) < 20:  # longer ones may exceed 64 bits, and become floats
        return int(text)
    if _FLOAT.match(text):
        return float(text)
    return text


def read_yaml(path: Path, *, problems: list[str] | None = None) -> Any:
    """The plain data of a YAML file.

    Args:
        path: The file.
        problems: Collects problems within valid YAML, such as a repeated key; if omitted, they are raised.

    Raises:
        UsageError: The file is missing, not UTF-8 or not valid YAML.
    """
    document = Document(_read(path), str(path))
    if problems is None:
        _raise(document.problems)
    else:
        problems += document.problems
    return document.data


def load_config(source: str | Path, model: type[Model], overrides: Sequence[str] = ()) -> Model:
    """Read a config file, or a shipped config by name, apply ``key.sub=value`` overrides and validate it.

    Args:
        source: A path to a YAML file, or the name of a shipped config such as ``quickstart``.
        model: The settings model.
        overrides: Changes such as ``peft.rank=16``; the values are read as YAML and validated like the file's.

    Raises:
        UsageError: One line per problem: file, line, what is wrong, what was expected.
    """
    document = read_config(source, overrides)
    return validate(document.data, model, document.places, name=document.name, problems=document.problems)


def read_config(source: str | Path, overrides: Sequence[str] = ()) -> Document:
    """The mapping in a config file, or in a shipped config by name, with ``key.sub=value`` overrides applied.

    Raises:
        UsageError: There is no such file or shipped config, or it is not a YAML mapping.
    """
    path = find_config(source)
    document = Document(_read(path), str(path))
    if not isinstance(document.data, dict):
        raise UsageError(f"{path}:1: expected 'key: value' lines, got {type(document.data).__name__}")
    for override in overrides:
        _apply_override(document, override)
    return document


def validate(
    data: Any,
    model: type[Model],
    places: Mapping[KeyPath, str] | None = None,
    *,
    name: str = "config",
    problems: Iterable[str] = (),
) -> Model:
    """Validate plain data.

    Args:
        data: Mappings, lists and scalars.
        model: The settings model.
        places: ``file:line`` of each value, for messages.
        name: Name of the data in messages about a value without a place.
        problems: Earlier problems, reported with the new ones.

    Raises:
        UsageError: One line per problem.
    """
    all_problems = list(problems)
    try:
        result = model.model_validate(data)
    except ValidationError as error:
        all_problems += [_describe(problem, places or {}, name, model) for problem in error.errors()]
        raise UsageError("\n".join(all_problems)) from error
    _raise(all_problems)
    return result


def find_config(source: str | Path) -> Path:
    """The path of a config, given as a path or as the name of a shipped one.

    Raises:
        UsageError: There is no such file or name.
    """
    path = Path(source)
    if path.is_file():
        return path
    shipped = shipped_configs()
    if str(source) in shipped:
        return shipped[str(source)]
    raise UsageError(
        f"{source}: no such file, and no shipped config of that name{did_you_mean(str(source), shipped)}",
        hint="lit-lora configs lists the shipped configs",
    )


def shipped_configs() -> dict[str, Path]:
    """Name of each shipped config (its path below ``configs/`` without ``.yaml``) -> its file."""
    root = Path(str(resources.files("lit_lora.configs")))
    return {str(path.relative_to(root).with_suffix("")): path for path in sorted(root.rglob("*.yaml"))}


def dump_yaml(settings: BaseModel) -> str:
    """YAML text from which ``load_config`` reads equal settings."""
    data = json.loads(settings.model_dump_json())
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


class _Dumper(yaml.SafeDumper):
    """Quotes texts such as ``1e3``, which PyYAML's own rules, those of YAML 1.1, take for text even without quotes."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    is_safe_unquoted = text.isprintable() and _scalar(text, plain=True) == text
    # Of PyYAML's styles, only double quotes keep line breaks other than \n.
    style = None if is_safe_unquoted else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)


def did_you_mean(word: str, candidates: Iterable[str]) -> str:
    """`` (did you mean 'x'?)`` if a candidate is similar, else an empty string."""
    similar = difflib.get_close_matches(word, list(candidates), n=1, cutoff=0.6)
    return f" (did you mean {similar[0]!r}?)" if similar else ""


def _apply_override(document: Document, override: str) -> None:
    """Set one value of the document; a malformed override is added to its problems."""
    key, sign, text = override.partition("=")
    if not sign or not all(key.split(".")):
        document.problems.append(f"{override!r}: expected key=value, such as train.max_steps=20")
        return
    if not text.strip():
        document.problems.append(f"{override!r}: expected a value, such as {key}=null for none")
        return
    value = Document(text, f"{override!r}")
    document.problems += value.problems

    path = tuple(key.split("."))
    section: Any = document.data
    for depth, name in enumerate(path[:-1], 1):
        if not isinstance(section, dict) or not isinstance(section.setdefault(name, {}), dict):
            document.problems.append(f"{override!r}: {'.'.join(path[:depth])} is not a section")
            return
        section = section[name]
    section[path[-1]] = value.data

    # From now on, messages about this value and all below it name the override instead of a line.
    for other in list(document.places):
        if other[: len(path)] == path:
            del document.places[other]
    for depth in range(1, len(path)):  # sections that the file does not have
        document.places.setdefault(path[:depth], f"{override!r}")
    document.places[path] = f"{override!r}"


_PLAIN = {
    "model_type": "expected a section, such as {key: value}",
    "path_type": "expected a path",
}
"""Replacements for pydantic's messages that would name our classes."""


def _describe(problem: Any, places: Mapping[KeyPath, str], name: str, model: type[BaseModel]) -> str:
    """One of pydantic's problems as ``file:line: key: what is wrong, expected what``."""
    pydantic_path = tuple(problem["loc"])
    path: KeyPath = ()
    for part in pydantic_path:  # contains the tags of unions, which are no keys of the file
        if (*path, part) in places or part == pydantic_path[-1]:
            path = (*path, part)
    if problem["type"] == "union_tag_invalid":  # pydantic blames the section
        path = (*path, "name")
    where = _nearest_place(path, places, name)
    if problem["type"] == "value_error":
        where += _overrides_within(path, places)
    key = ".".join(str(part) for part in path)

    if problem["type"] == "extra_forbidden":
        fields = _fields(model, pydantic_path[:-1])
        suggestion = _our_key(str(pydantic_path[-1]), path[:-1], model)
        suggestion = suggestion or did_you_mean(str(pydantic_path[-1]), fields) or f", known: {', '.join(fields)}"
        return f"{where}: unknown key {key!r}{suggestion}{_replace_section(path, places, where)}"
    if problem["type"] == "missing":
        return f"{where}: {key!r} is missing"
    if problem["type"] == "union_tag_invalid":
        names = re.findall(r"'([^']+)'", str(problem["ctx"]["expected_tags"]))
        tag = str(problem["ctx"]["tag"])
        return f"{where}: {key}: unknown name {tag!r}{did_you_mean(tag, names)}, known: {', '.join(names)}"

    message = _PLAIN.get(problem["type"], problem["msg"])
    message = message.removeprefix("Value error, ").removeprefix("Assertion failed, ")
    if problem["type"] == "value_error":  # raised by a validator of ours, which says what it got
        return f"{where}: {key}: {message}" if key else f"{where}: {message}"
    value = json.dumps(problem["input"], default=str)
    if len(value) > 80:
        value = f"{value[:77]}..."
    return f"{where}: {key}: {message[:1].lower()}{message[1:]}, got {value}"


def _nearest_place(path: KeyPath, places: Mapping[KeyPath, str], name: str) -> str:
    """The place of a value, or of the innermost section around it that has one, or ``name``."""
    for length in range(len(path), -1, -1):
        if path[:length] in places:
            return places[path[:length]]
    return name


def _overrides_within(section: KeyPath, places: Mapping[KeyPath, str]) -> str:
    """`` with 'train.epochs=2'``: the overrides in a section whose values do not fit together."""
    overrides = [place for path, place in places.items() if path and path[:-1] == section and _is_override(place)]
    return f" with {', '.join(overrides)}" if section and overrides else ""


def _is_override(place: str) -> bool:
    """Whether a place names an override, which is quoted, instead of a line of the file."""
    return place.startswith(("'", '"'))


def _replace_section(path: KeyPath, places: Mapping[KeyPath, str], where: str) -> str:
    """What to type if an override chose another method, and the file's options belong to the former one."""
    override = places.get((*path[:-1], "name"), "").strip("'")
    section, sign, name = override.partition(".name=")
    return f"; '{section}={{name: {name}}}' replaces the whole section" if sign and not _is_override(where) else ""


def _our_key(key: str, section: KeyPath, model: type[BaseModel]) -> str:
    """Where ``key``, unknown in ``section``, belongs: it may be of another section, or what another tool calls it.

    Returns:
        The end of the message; empty if the model has nothing of that name.
    """
    sections = _fields(model, ())
    if "train" not in sections:  # settings of something other than a run
        return ""
    if key in sections:
        return f": it belongs at the top level, {key}"
    for other in sections:
        is_ambiguous = key in ("name", "path")  # several sections have them
        if (other,) != section and not is_ambiguous and key in _fields(model, (other,)):
            return f": it belongs in the section {other}, {other}.{key}"
    for target, aliases in ALIASES.items():
        *path, name = target.split(".")
        if key in aliases and name in _fields(model, tuple(path)):
            return f": it is called {target} here"
    for keys, answer in ANSWERS.items():
        if key in keys:
            return f": {answer}"
    return ""


@cache
def _json_schema(model: type[BaseModel]) -> dict[str, Any]:
    """Takes tens of milliseconds, and one message asks for the fields of every section."""
    return model.model_json_schema()


def _fields(model: type[BaseModel], path: KeyPath) -> list[str]:
    """The fields at ``path`` of the model, found in its JSON schema."""
    schema = _json_schema(model)
    definitions = schema.get("$defs", {})

    def branches(node: dict[str, Any]) -> list[dict[str, Any]]:
        """The object schemas that a node may stand for, with references and unions resolved."""
        if "$ref" in node:
            return branches(definitions[node["$ref"].rpartition("/")[2]])
        members = [*node.get("anyOf", []), *node.get("oneOf", []), *node.get("allOf", [])]
        if not members:
            return [node]
        resolved = []
        for member in members:
            resolved += branches(member)
        return resolved

    nodes = branches(schema)
    for part in path:
        children: list[dict[str, Any]] = []
        for node in nodes:
            properties = node.get("properties", {})
            if part in properties:
                children += branches(properties[part])
            elif properties.get("name", {}).get("const") == part:  # the tag of a union selects one of its members
                children.append(node)
            elif isinstance(part, int) and "items" in node:
                children += branches(node["items"])
        # Where no property has this name, it is the tag of a union of which one member has properties.
        nodes = children or nodes
    return [field for node in nodes for field in node.get("properties", {})]


def _read(path: Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from error


def _raise(problems: Sequence[str]) -> None:
    """Report all problems in one error, if there are any."""
    if problems:
        raise UsageError("\n".join(problems))
