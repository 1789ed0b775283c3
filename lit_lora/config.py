"""YAML to validated settings: strict, with file and line, every problem at once.

A settings model is declared beside the code it configures, as a :class:`Settings` subclass with a description on
every field. ``load_config`` reads a YAML file into one. YAML is composed to nodes rather than loaded, so that every
value keeps its line; scalars follow YAML 1.2 (``1e-4`` is a number, ``no`` is a word); a repeated key, an alias and
a tag are errors.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
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
from pydantic_core import CoreSchema

from lit_lora import log
from lit_lora.errors import UsageError

__all__ = [
    "Document",
    "OneOf",
    "Settings",
    "did_you_mean",
    "dump_yaml",
    "find_config",
    "load_config",
    "read_config",
    "read_yaml",
    "shipped_configs",
    "validate",
]

Path_ = tuple[str | int, ...]


class Settings(BaseModel):
    """Base of every settings model: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    renamed: ClassVar[Mapping[str, str]] = {}
    """Former names of keys and their present names; a former one is accepted, with a line that says so."""

    @model_validator(mode="before")
    @classmethod
    def _accept_former_names(cls, data: Any) -> Any:
        """The same data under the present names."""
        former = [key for key in cls.renamed if isinstance(data, dict) and key in data]
        for key in former:
            now = cls.renamed[key]
            if now in data:
                raise ValueError(f"{key} is the former name of {now}: give {now} alone")
            log.note(f"config: {key} is now called {now}")
        return {cls.renamed.get(key, key): value for key, value in data.items()} if former else data


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
    """Plain data of one YAML text, and where each value stands in it.

    Args:
        text: The YAML.
        name: What messages call it.

    Raises:
        UsageError: It is not valid YAML. What is wrong inside valid YAML is collected in ``problems``.
    """

    def __init__(self, text: str, name: str) -> None:
        self.name = name
        self.places: dict[Path_, str] = {}
        self.problems: list[str] = []
        try:
            for event in yaml.parse(text, Loader=yaml.SafeLoader):
                if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
                    line = event.start_mark.line + 1 if event.start_mark else 1
                    raise UsageError(f"{name}:{line}: anchors and aliases are not supported, write the value out")
            node = yaml.compose(text, Loader=yaml.SafeLoader)
        except yaml.MarkedYAMLError as error:
            line = error.problem_mark.line + 1 if error.problem_mark else 1
            raise UsageError(f"{name}:{line}: not valid YAML: {error.problem}") from error
        except (yaml.YAMLError, RecursionError) as error:
            raise UsageError(f"{name}: not valid YAML: {str(error).splitlines()[0]}") from error
        self.data = self._value(node, (), 0) if node is not None else {}

    def _value(self, node: yaml.Node, path: Path_, depth: int) -> Any:
        place = f"{self.name}:{node.start_mark.line + 1}"
        self.places.setdefault(path, place)
        if depth > _MAX_DEPTH:
            raise UsageError(f"{place}: nested more than {_MAX_DEPTH} deep")
        if node.tag and not node.tag.startswith("tag:yaml.org,2002:"):
            self.problems.append(f"{place}: YAML tags such as {node.tag} are not supported")
            return None
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path, depth)
        if isinstance(node, yaml.SequenceNode):
            return [self._value(child, (*path, index), depth + 1) for index, child in enumerate(node.value)]
        return _scalar(node.value, plain=getattr(node, "style", None) is None)

    def _mapping(self, node: yaml.MappingNode, path: Path_, depth: int) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            place = f"{self.name}:{key_node.start_mark.line + 1}"
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
            if key is None:
                self.problems.append(f"{place}: a key must be a word")
                continue
            if key in result:
                first = self.places[(*path, key)].rpartition(":")[2]
                self.problems.append(f"{place}: {key!r} is given twice (first on line {first})")
                continue
            self.places[(*path, key)] = place
            result[key] = self._value(value_node, (*path, key), depth + 1)
        return result


def _scalar(text: str, *, plain: bool) -> str | int | float | bool | None:
    if not plain:
        return text
    if text in _NULL:
        return None
    if text in _BOOL:
        return _BOOL[text]
    if _INT.match(text) and len(text) < 20:
        return int(text)
    if _FLOAT.match(text):
        return float(text)
    return text


def read_yaml(path: Path, *, problems: list[str] | None = None) -> Any:
    """Plain data of a YAML file, read strictly.

    Args:
        path: The file.
        problems: Is given what is wrong inside valid YAML, such as a key given twice, instead of raising it.

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
        overrides: Such as ``peft.rank=16``; the value is read as YAML and checked like the file's.

    Raises:
        UsageError: With one line per problem: file, line, what is wrong, what was expected.
    """
    document = read_config(source, overrides)
    return validate(document.data, model, document.places, name=document.name, problems=document.problems)


def read_config(source: str | Path, overrides: Sequence[str] = ()) -> Document:
    """The mapping in a config file, or in a shipped config by name, with ``key.sub=value`` overrides applied.

    Raises:
        UsageError: It is not there, or no YAML mapping.
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
    places: Mapping[Path_, str] | None = None,
    *,
    name: str = "config",
    problems: Iterable[str] = (),
) -> Model:
    """Plain data to ``model``.

    Args:
        data: Mappings, lists and scalars.
        model: The settings model.
        places: Where each value stands, for the messages.
        name: What to call the data where ``places`` does not know.
        problems: Problems found before, reported with the rest.

    Raises:
        UsageError: With one line per problem.
    """
    found = list(problems)
    try:
        result = model.model_validate(data)
    except ValidationError as error:
        found += [_describe(problem, places or {}, name, model) for problem in error.errors()]
        _raise(found)
        raise
    _raise(found)
    return result


def find_config(source: str | Path) -> Path:
    """The path of a config file given as a path or as the name of a shipped one.

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
        hint="lit-lora configs lists the shipped ones",
    )


def shipped_configs() -> dict[str, Path]:
    """Names of the shipped configs (path below ``configs/`` without ``.yaml``) and where they lie."""
    root = Path(str(resources.files("lit_lora.configs")))
    return {str(path.relative_to(root).with_suffix("")): path for path in sorted(root.rglob("*.yaml"))}


def dump_yaml(settings: BaseModel) -> str:
    """YAML text that ``load_config`` reads back to equal settings."""
    data = json.loads(settings.model_dump_json())
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


class _Dumper(yaml.SafeDumper):
    """Writes texts such as ``1e3`` in quotes: PyYAML's own rules, which are YAML 1.1's, take them for words."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    # PyYAML's other styles lose line breaks that are not \n.
    style = None if text.isprintable() and _scalar(text, plain=True) == text else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`` (did you mean 'x'?)`` when a known word is near, else nothing."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" (did you mean {near[0]!r}?)" if near else ""


def _apply_override(document: Document, override: str) -> None:
    key, sign, text = override.partition("=")
    if not sign or not all(key.split(".")):
        document.problems.append(f"{override!r}: expected key=value, such as train.max_steps=20")
        return
    if not text.strip():
        document.problems.append(f"{override!r}: expected a value, such as {key}=null for none")
        return
    value = Document(text, f"{override!r}")
    document.problems += value.problems
    place: Any = document.data
    *parents, last = key.split(".")
    for depth, parent in enumerate(parents):
        if not isinstance(place, dict) or not isinstance(place.setdefault(parent, {}), dict):
            document.problems.append(f"{override!r}: {'.'.join(parents[: depth + 1])} is not a section")
            return
        place = place[parent]
    place[last] = value.data
    path = tuple(key.split("."))
    for known in [known for known in document.places if known[: len(path)] == path]:
        del document.places[known]
    for depth in range(1, len(path)):  # a section that the file does not have
        document.places.setdefault(path[:depth], f"{override!r}")
    document.places[path] = f"{override!r}"


_PLAIN = {
    "model_type": "expected a section, such as {key: value}",
    "path_type": "expected a path",
}
"""What pydantic says of a type in words that name classes of ours."""


def _describe(problem: Any, places: Mapping[Path_, str], name: str, model: type[BaseModel]) -> str:
    """One pydantic problem as ``file:line: key: what is wrong, expected what``."""
    raw = tuple(problem["loc"])
    path: Path_ = ()
    for part in raw:  # pydantic puts a union's tag into the path; the file has no such key
        if (*path, part) in places or part == raw[-1]:
            path = (*path, part)
    where = next((places[path[:cut]] for cut in range(len(path), -1, -1) if path[:cut] in places), name)
    key = ".".join(str(part) for part in path)
    if problem["type"] == "extra_forbidden":
        known = _fields(model, raw[:-1])
        meant = did_you_mean(str(raw[-1]), known) or ", known: " + ", ".join(known)
        return f"{where}: unknown key {key!r}{meant}{_other_section(path, places, where)}"
    if problem["type"] == "missing":
        return f"{where}: {key!r} is missing"
    message = (
        _PLAIN.get(problem["type"], problem["msg"]).removeprefix("Value error, ").removeprefix("Assertion failed, ")
    )
    if problem["type"] in ("value_error", "union_tag_invalid"):
        tags = re.findall(r"'([^']+)'", str(problem.get("ctx", {}).get("expected_tags", "")))
        if tags:
            given = str(problem["ctx"]["tag"])
            return f"{where}: {key}.name: unknown name {given!r}{did_you_mean(given, tags)}, known: {', '.join(tags)}"
        return f"{where}: {key + ': ' if key else ''}{message}"
    given = problem["input"]
    shown = json.dumps(given, default=str)
    return (
        f"{where}: {key}: {message[:1].lower()}{message[1:]}, got {shown if len(shown) <= 80 else shown[:77] + '...'}"
    )


def _other_section(path: Path_, places: Mapping[Path_, str], where: str) -> str:
    """What to type where an override picks another method and the file's options are those of its former one."""
    override = places.get((*path[:-1], "name"), "").strip("'")
    section, sign, name = override.partition(".name=")
    return f"; '{section}={{name: {name}}}' replaces the whole section" if sign and not where.startswith("'") else ""


def _fields(model: type[BaseModel], path: Path_) -> list[str]:
    """Field names that are known at ``path`` of the model's JSON schema."""
    schema = model.model_json_schema()
    definitions = schema.get("$defs", {})

    def branches(node: dict[str, Any]) -> list[dict[str, Any]]:
        if "$ref" in node:
            return branches(definitions[node["$ref"].rpartition("/")[2]])
        inner = [branch for key in ("anyOf", "oneOf", "allOf") for branch in node.get(key, [])]
        return [leaf for branch in inner for leaf in branches(branch)] if inner else [node]

    nodes = branches(schema)
    for part in path:
        deeper: list[dict[str, Any]] = []
        for node in nodes:
            if part in node.get("properties", {}):
                deeper += branches(node["properties"][part])
            elif node.get("properties", {}).get("name", {}).get("const") == part:
                deeper.append(node)
            elif isinstance(part, int) and "items" in node:
                deeper += branches(node["items"])
        nodes = deeper
    return [field for node in nodes for field in node.get("properties", {})]


def _read(path: Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8 text (byte {error.start}), save it as UTF-8") from error
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from error


def _raise(problems: list[str]) -> None:
    if problems:
        raise UsageError("\n".join(problems))
