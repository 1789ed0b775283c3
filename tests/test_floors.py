"""The architecture: what may import what, and what must not be written anywhere."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

import pytest

import lit_lora.model
import lit_lora.peft
import lit_lora.train
from lit_lora.model.families import DecoderNames

ROOT = Path(__file__).resolve().parents[1]
# The folders of the package, and the name of each in it. data/samples and configs hold no code.
FOLDERS = {"lit_lora": "lit_lora", "finetune": "lit_lora.finetune", "scripts": "lit_lora.scripts"}
HEAVY = {"torch", "transformers", "datasets", "safetensors", "numpy", "pyarrow", "matplotlib", "gguf", "tokenizers"}


class Source(NamedTuple):
    """A source file of the package."""

    path: Path
    module: str
    tree: ast.Module

    @property
    def part(self) -> str:
        """The part of the package it belongs to: ``model`` of ``lit_lora.model.rope``."""
        return self.module.split(".")[1] if "." in self.module else ""

    def at(self, node: ast.AST) -> str:
        return f"{self.path.relative_to(ROOT)}:{getattr(node, 'lineno', 1)}"


def sources(*, peers: bool = False) -> list[Source]:
    """The package's, or the benchmark's programs of other environments, which are started by path."""
    found = []
    for folder, package in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            if ("benchmark_peers" in path.parts) != peers:
                continue
            names = [*package.split("."), *path.relative_to(ROOT / folder).with_suffix("").parts]
            module = ".".join(names).removesuffix(".__init__")
            found.append(Source(path, module, ast.parse(path.read_text(encoding="utf-8"))))
    return found


SOURCES = sources()


def imported(node: ast.AST) -> list[str]:
    """The dotted names that a statement imports."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, "imports are absolute"
        return [f"{node.module}.{alias.name}" for alias in node.names]
    return []


def ranks(table: str) -> dict[str, tuple[int, int]]:
    """Of every part: the number of its floor, and its place on it (further left is higher)."""
    found = {}
    for number, names in re.findall(r"^ {4}(\d)  (.+?) {3,}", table, flags=re.MULTILINE):
        groups = names.split(" > ")
        for place, group in enumerate(groups):
            found.update({name: (int(number), len(groups) - place) for name in group.split()})
    return found


RANKS = ranks(lit_lora.__doc__ or "")
# The packages with a table of their own rooms.
ROOMS = {package.__name__: ranks(package.__doc__ or "") for package in (lit_lora.peft, lit_lora.model, lit_lora.train)}


def room(module: str, package: str) -> str:
    """The part of ``package`` that a dotted name lies in, or nothing."""
    return module.removeprefix(f"{package}.").split(".")[0] if module.startswith(f"{package}.") else ""


def wrong_edges(files: list[Source], package: str = "lit_lora", table: dict[str, tuple[int, int]] = RANKS) -> list[str]:
    """Imports within a package that go up or sideways, each with its file and line."""
    wrong = []
    for source in files:
        own = room(source.module, package)
        for node in ast.walk(source.tree) if own else ():
            for name in imported(node):
                target = room(name, package)
                if target in table and target != own and table[target] >= table[own]:
                    way = "up" if table[target] > table[own] else "sideways"
                    wrong.append(f"{source.at(node)}: {own} imports {target}, which is {way}")
    return wrong


@pytest.mark.parametrize("package", ROOMS)
def test_the_rooms_of_a_package_import_downwards_only(package: str) -> None:
    rooms = {room(source.module, package) for source in SOURCES} - {""}
    assert ROOMS[package].keys() == rooms
    assert wrong_edges(SOURCES, package, ROOMS[package]) == []


def test_the_table_of_floors_names_every_part_once() -> None:
    assert RANKS.keys() == {source.part for source in SOURCES} - {""}
    assert [RANKS[part] for part in ("scripts", "cli", "model", "kernels", "errors")] == [
        (5, 2), (5, 1), (1, 2), (1, 1), (0, 1),
    ]  # fmt: skip


def test_imports_go_down_only() -> None:
    assert wrong_edges(SOURCES) == []


@pytest.mark.parametrize(
    ("module", "line", "expected"),
    [
        ("lit_lora.peft.lora.linear", "from lit_lora.model.rope import Rope", []),
        ("lit_lora.peft.lora.linear", "from lit_lora import train", ["peft imports train, which is sideways"]),
        ("lit_lora.peft.lora.linear", "from lit_lora.data.rows import Rows", ["peft imports data, which is sideways"]),
        ("lit_lora.model.rope", "import lit_lora.train.loop", ["model imports train, which is up"]),
        ("lit_lora.kernels.call", "def f():\n from lit_lora.model import x", ["kernels imports model, which is up"]),
        ("lit_lora.finetune.lora", "from lit_lora.cli import main", ["finetune imports cli, which is up"]),
        ("lit_lora.estimate", "from lit_lora.recipe import Run", ["estimate imports recipe, which is up"]),
    ],
)
def test_a_wrong_edge_is_named_with_file_and_line(module: str, line: str, expected: list[str]) -> None:
    source = Source(ROOT / "lit_lora/x.py", module, ast.parse(line))
    number = 2 if "\n" in line else 1
    assert wrong_edges([source]) == [f"lit_lora/x.py:{number}: {text}" for text in expected]


def top_level_imports(tree: ast.Module) -> Iterator[ast.stmt]:
    """Imports that run when the module is imported: none in functions, none for type checkers alone."""
    statements = list(tree.body)
    while statements:
        statement = statements.pop()
        if isinstance(statement, ast.If) and "TYPE_CHECKING" in ast.unparse(statement.test):
            continue
        if isinstance(statement, ast.Import | ast.ImportFrom):
            yield statement
        for field in ("body", "orelse", "handlers", "finalbody"):
            if not isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef):
                statements += getattr(statement, field, [])


def test_no_command_imports_anything_heavy_before_it_runs() -> None:
    heavy_parts = {part for part, (floor, _) in RANKS.items() if 1 <= floor <= 4}
    wrong = [
        f"{source.at(node)}: {name}"
        for source in SOURCES
        if source.part == "cli"
        for node in top_level_imports(source.tree)
        for name in imported(node)
        if name.split(".")[0] in HEAVY or (name.startswith("lit_lora.") and name.split(".")[1] in heavy_parts)
    ]
    assert wrong == []


def test_the_ground_floor_knows_no_torch() -> None:
    ground = {part for part, (floor, _) in RANKS.items() if floor == 0}
    wrong = [
        f"{source.at(node)}: {name}"
        for source in SOURCES
        if source.part in ground
        for node in ast.walk(source.tree)
        for name in imported(node)
        if name.split(".")[0] in HEAVY
    ]
    assert wrong == []


# What opens a checkpoint by what its files say: without an explicit no it asks whether to run their code, and runs it.
OPENERS = {"from_pretrained", "from_config", "pipeline"}


def dangers(source: Source) -> Iterator[str]:
    """Whatever could run code out of a file: unpickling, eval, exec, YAML objects, a shell, remote code."""
    for node in ast.walk(source.tree):
        for name in imported(node):
            if name != "pickle.UnpicklingError" and name.split(".")[0] in {
                "pickle",
                "cPickle",
                "dill",
                "cloudpickle",
                "joblib",
                "marshal",
                "shelve",
            }:
                yield f"{source.at(node)}: import {name}"
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if called in {"eval", "exec", "compile", "os.system", "os.popen", "yaml.load", "yaml.unsafe_load"}:
            yield f"{source.at(node)}: {called}"
        if keywords.get("shell", "False") != "False":
            yield f"{source.at(node)}: shell={keywords['shell']}"
        opens = any(ast.unparse(part).rpartition(".")[2] in OPENERS for part in (node.func, *node.args))
        hides = any(isinstance(part, ast.Constant) and part.value == "trust_remote_code" for part in ast.walk(node))
        if keywords.get("trust_remote_code", None if opens or hides else "False") != "False":
            yield f"{source.at(node)}: {called} without trust_remote_code=False"
        if called in {"torch.save", "np.save", "numpy.save"} or keywords.get("allow_pickle", "False") != "False":
            yield f"{source.at(node)}: {called} writes or reads pickle"
        if called == "torch.load":
            allowed = source.module == "lit_lora.checkpoint.torch_file" and keywords.get("weights_only") == "True"
            if not allowed:
                yield f"{source.at(node)}: torch.load, only checkpoint/torch_file.py may, with weights_only=True"


def test_pain_48_nothing_can_run_code_out_of_a_file() -> None:
    assert [danger for source in (*SOURCES, *sources(peers=True)) for danger in dangers(source)] == []
    (loader,) = [source for source in SOURCES if source.module == "lit_lora.checkpoint.torch_file"]
    calls = [node for node in ast.walk(loader.tree) if isinstance(node, ast.Call)]
    assert [ast.unparse(call.func) for call in calls].count("torch.load") == 1


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from dill import loads",
        "eval(text)",
        "yaml.load(text, Loader=yaml.SafeLoader)",
        "subprocess.run(text, shell=True)",
        "AutoModel.from_pretrained(name)",
        "transformers.AutoModel.from_config(config)",
        "functools.partial(AutoModel.from_pretrained, local_files_only=True)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "AutoModel.from_pretrained(name, trust_remote_code=flag)",
        "AutoModel.from_pretrained(name, trust_remote_code=None)",
        "AutoModel.from_pretrained(name, **{'trust_remote_code': True})",
        "AutoModel.from_pretrained(name, **{'trust_remote_code': False})",
        "load(name, trust_remote_code=flag)",
        "load(name, **{'trust_remote_code': True})",
        "torch.load(path, weights_only=True)",
        "np.load(path, allow_pickle=True)",
        "torch.save(state, path)",
    ],
)
def test_each_danger_would_be_found(code: str) -> None:
    assert len(list(dangers(Source(ROOT / "lit_lora/x.py", "lit_lora.x", ast.parse(code))))) == 1


def test_torch_load_without_weights_only_would_be_found_even_where_it_may_be_called() -> None:
    code = ast.parse("torch.load(path, weights_only=flag)")
    assert list(dangers(Source(ROOT / "lit_lora/x.py", "lit_lora.checkpoint.torch_file", code)))


def defined(tree: ast.Module) -> set[str]:
    """Public names that a module defines."""
    names = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)}
    for node in tree.body:
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return {name for name in names if not name.startswith("_")}


def public(tree: ast.Module) -> list[str] | None:
    """``__all__``, if the module has one."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            names: list[str] = ast.literal_eval(node.value)
            return names
    return None


def test_every_module_that_defines_something_says_what_is_public() -> None:
    modules = [source for source in SOURCES if defined(source.tree)]
    assert [str(source.path.relative_to(ROOT)) for source in modules if public(source.tree) is None] == []


def test_the_label_that_is_ignored_is_written_in_one_place() -> None:
    places = [source.at(node) for source in SOURCES for node in ast.walk(source.tree) if ast.unparse(node) == "-100"]
    assert len(places) == 1
    assert places[0].startswith("lit_lora/__init__.py")


def test_only_public_names_are_imported_by_other_modules() -> None:
    trees = {source.module: source.tree for source in SOURCES}
    wrong = []
    for source in SOURCES:
        for node in ast.walk(source.tree):
            if not isinstance(node, ast.ImportFrom) or node.module not in trees:
                continue
            known = public(trees[node.module]) or []
            for alias in node.names:
                if alias.name not in known and f"{node.module}.{alias.name}" not in trees:
                    wrong.append(f"{source.at(node)}: {alias.name} is not in the __all__ of {node.module}")
    assert wrong == []


def test_no_file_is_named_for_what_has_no_name() -> None:
    banned = {"utils.py", "util.py", "helpers.py", "common.py", "misc.py", "manager.py", "handler.py"}
    assert [str(source.path) for source in SOURCES if source.path.name in banned] == []


def test_neither_the_model_nor_the_loop_knows_a_method() -> None:
    wrong = [
        f"{source.path.relative_to(ROOT)}:{number}: {line.strip()}"
        for source in SOURCES
        if source.part in ("model", "train")
        for number, line in enumerate(source.path.read_text(encoding="utf-8").splitlines(), 1)
        if "lora" in re.sub(r"lit[-_]lora", "", line, flags=re.IGNORECASE).lower()
    ]
    assert wrong == []


def test_a_recipe_reads_top_to_bottom_without_loops() -> None:
    loops = (ast.For, ast.While, ast.AsyncFor)
    wrong = [
        source.at(node)
        for source in SOURCES
        if source.part == "finetune"
        for node in ast.walk(source.tree)
        if isinstance(node, loops)
    ]
    assert wrong == []


# Files that hold names of a model's parts beside the families' tables, and why.
NAMED_BY_OTHERS = {
    "lit_lora/checkpoint/litgpt.py": "LitGPT calls its head as a Llama does",
    "lit_lora/hf/experts.py": "all experts of transformers have one set of names",
    "lit_lora/gguf/families.py": "tensors of all families that transformers has, ours or not",
}


def part_names(tree: ast.AST) -> Iterator[ast.AST]:
    """Where a name of a Llama's part is written: an attribute, or a text without spaces, which is no message."""
    defaults = [(getattr(DecoderNames(), field.name) or "").rpartition(".")[2] for field in fields(DecoderNames)]
    words = [name for name in defaults if "_" in name]  # mlp, norm and layers are words too
    pattern = re.compile(rf"\b({'|'.join(words)})\b|\bmodel\.layers\b")
    for node in ast.walk(tree):
        text = node.attr if isinstance(node, ast.Attribute) else node.value if isinstance(node, ast.Constant) else None
        if isinstance(text, str) and " " not in text and pattern.search(text):
            yield node


def test_names_of_a_models_parts_are_written_in_the_tables_of_families_only() -> None:
    places = [
        source.at(node)
        for source in SOURCES
        if not source.module.startswith("lit_lora.model.families")
        for node in part_names(source.tree)
    ]
    assert {place.partition(":")[0] for place in places} == NAMED_BY_OTHERS.keys(), places


@pytest.mark.parametrize(
    "code",
    ["model.lm_head(x)", "find(model, 'embed_tokens')", "f'model.layers.{index}'", "['k_proj', 'mlp']", "'a.q_proj.b'"],
)
def test_a_name_of_a_part_would_be_found(code: str) -> None:
    assert len(list(part_names(ast.parse(code)))) == 1
    assert not list(part_names(ast.parse("error('such as lm_head'); lm_head_bias = model.logits(x)")))


def test_functions_stay_short() -> None:
    sizes = sorted(
        (node.end_lineno or node.lineno) - node.lineno + 1
        for source in SOURCES
        for node in ast.walk(source.tree)
        if isinstance(node, ast.FunctionDef)
    )
    assert sizes[int(0.95 * len(sizes))] <= 50
