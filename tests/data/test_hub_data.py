"""Datasets of the Hub, from a server on this machine that speaks its protocol: configurations, splits, revisions."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

from lit_lora.data.hub_data import HubData, parse_hub_data
from lit_lora.data.source import warn_of_name
from lit_lora.errors import UsageError
from tests.data.conftest import question

SHA = "c0ffee" + "0" * 34
REVISIONS = (SHA, "main", "v1")


def _jsonl(*numbers: int) -> bytes:
    return "".join(json.dumps(question(n)) + "\n" for n in numbers).encode()


PLAIN = {
    "README.md": b"# About\n",
    "data/train.jsonl": _jsonl(*range(20)),
    "data/validation.jsonl": _jsonl(*range(20, 25)),
    "data/test.jsonl": _jsonl(*range(25, 28)),
}
CONFIGS = {
    "README.md": b"""---
configs:
- config_name: main
  data_files:
  - {split: train, path: main/a.jsonl}
  - {split: test, path: main/b.jsonl}
- config_name: socratic
  data_files:
  - {split: train, path: socratic/a.jsonl}
---
""",
    "main/a.jsonl": _jsonl(1, 2, 3),
    "main/b.jsonl": _jsonl(4),
    "socratic/a.jsonl": _jsonl(5, 6),
}
REPOSITORIES = {"own/plain": PLAIN, "own/configs": CONFIGS}


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    fetched: list[str]

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        for repo, files in REPOSITORIES.items():
            if path.startswith(f"/api/datasets/{repo}"):
                return self._api(repo, files, path.removeprefix(f"/api/datasets/{repo}"))
            revision, _, name = path.removeprefix(f"/datasets/{repo}/resolve/").partition("/")
            if revision in REVISIONS:
                return self._file(files, name)
        return self._reply(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET

    def do_POST(self) -> None:
        """Information on some paths."""
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        repo = "/".join(urlsplit(self.path).path.split("/")[3:5])
        try:
            paths = json.loads(body)["paths"]
        except ValueError:
            paths = [unquote(part.partition("=")[2]) for part in body.split("&") if part.startswith("paths=")]
        entries = [entry for path in paths for entry in _tree(REPOSITORIES[repo]) if entry["path"] == path]
        self._reply(200, json.dumps(entries).encode())

    def _api(self, repo: str, files: dict[str, bytes], rest: str) -> None:
        if rest.startswith("/tree/"):
            below = rest.removeprefix(f"/tree/{SHA}").strip("/")
            prefix = f"{below}/" if below else ""
            entries = [entry for entry in _tree(files) if entry["path"].startswith(prefix)]
            if below and not entries:
                return self._reply(404, b"{}", {"X-Error-Code": "EntryNotFound"})
            return self._reply(200, json.dumps(entries).encode())
        if rest.removeprefix("/revision/") not in ("", *REVISIONS):
            return self._reply(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        siblings = [{"rfilename": name} for name in files]
        about = {"id": repo, "sha": SHA, "siblings": siblings, "private": False, "tags": [], "downloads": 0, "likes": 0}
        return self._reply(200, json.dumps(about).encode())

    def _file(self, files: dict[str, bytes], name: str) -> None:
        if name not in files:
            return self._reply(404, b"", {"X-Error-Code": "EntryNotFound"})
        if self.command == "GET":
            self.fetched.append(name)
        digest = hashlib.sha1(files[name]).hexdigest()
        return self._reply(200, files[name], {"ETag": f'"{digest}"', "X-Repo-Commit": SHA, "Accept-Ranges": "bytes"})

    def _reply(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _tree(files: dict[str, bytes]) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = []
    for name in sorted({str(parent) for file in files for parent in Path(file).parents} - {"."}):
        entries.append({"type": "directory", "path": name, "oid": "0" * 40, "size": 0})
    for name, content in files.items():
        oid = hashlib.sha1(content).hexdigest()
        entries.append({"type": "file", "path": name, "oid": oid, "size": len(content)})
    return entries


ASKED = [
    "hub:own/plain@train",
    "hub:own/plain",
    "hub:own/plain@test#v1",
    "hub:own/plain@main",
    "hub:own/plain#nowhere",
    "hub:own/configs",
    "hub:own/configs:mian",
    "hub:own/configs:socratic",
    "hub:own/nothing",
    "hub:own/plain",
]
LOCATE = """
import json, sys
from pathlib import Path
import pyarrow.parquet as pq
from lit_lora.data.source import locate
from lit_lora.errors import InputError

cache = Path(sys.argv[1])
for path in sys.argv[2:]:
    outcome = {}
    try:
        source = locate(path, cache)
        for role in ("train", "validation", "test"):
            files = getattr(source, role)
            outcome[role] = {file.name: pq.read_metadata(file).num_rows for file in files}
    except InputError as error:
        outcome = {"error": str(error), "hint": error.hint}
    print("outcome " + json.dumps(outcome), flush=True)
"""


@dataclass(frozen=True)
class Outcome:
    """What came of a path, and which files were downloaded for it."""

    found: dict[str, Any]
    fetched: list[str]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[Outcome]:
    """What comes of each of ``ASKED``, one after the other, in a process that knows no other Hub."""
    folder = tmp_path_factory.mktemp("hub")
    fetched: list[str] = []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"fetched": fetched}))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    environment = {
        **os.environ,
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(folder / "hf"),
        "HF_HUB_OFFLINE": "0",
        "HF_DATASETS_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_TOKEN": "",
    }
    command = [sys.executable, "-c", LOCATE, str(folder / "cache"), *ASKED]
    outcomes = []
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            kind, _, outcome = line.partition(" ")
            if kind == "outcome":
                data_files = [name for name in fetched if name.endswith(".jsonl")]
                outcomes.append(Outcome(json.loads(outcome), data_files))
                fetched.clear()
    server.shutdown()
    thread.join()
    server.server_close()
    assert process.returncode == 0
    assert sorted(path.name for path in (folder / "cache" / "hub").iterdir()) == [
        "own-configs--socratic",
        "own-plain",
        "own-plain--@train",
        "own-plain--v1--@test",
    ]
    return outcomes


def _of(outcomes: list[Outcome], path: str) -> Outcome:
    return outcomes[ASKED.index(path)]


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("hub:a/b", HubData("a/b")),
        ("hub:b", HubData("b")),
        ("hub:a/b:c-1.0", HubData("a/b", "c-1.0")),
        ("hub:a/b@train_sft", HubData("a/b", None, "train_sft")),
        ("hub:a/b:c@test#v1.0", HubData("a/b", "c", "test", "v1.0")),
        ("hub:a/b#refs/convert/parquet", HubData("a/b", None, None, "refs/convert/parquet")),
        ("rows.jsonl", None),
    ],
)
def test_a_path_names_configuration_split_and_revision(path: str, expected: HubData | None) -> None:
    assert parse_hub_data(path) == expected


@pytest.mark.parametrize("path", ["hub:", "hub:a/b/c", "hub:a/b:", "hub:a/b#v1@train", "hub:../x"])
def test_a_malformed_path_is_an_error(path: str) -> None:
    with pytest.raises(UsageError, match="expected hub:OWNER/NAME, "):
        parse_hub_data(path)


def test_the_splits_are_used_as_files_of_a_folder_are(outcomes: list[Outcome]) -> None:
    outcome = _of(outcomes, "hub:own/plain")
    assert outcome.found == {
        "train": {"train.parquet": 20},
        "validation": {"validation.parquet": 5},
        "test": {"test.parquet": 3},
    }
    again = outcomes[-1]
    assert (again.found, again.fetched) == (outcome.found, [])


def test_only_the_split_that_is_named_is_downloaded(outcomes: list[Outcome]) -> None:
    nothing: dict[str, int] = {}
    outcome = _of(outcomes, "hub:own/plain@train")
    assert outcome.fetched == ["data/train.jsonl"]
    assert outcome.found == {"train": {"train.parquet": 20}, "validation": nothing, "test": nothing}
    test = _of(outcomes, "hub:own/plain@test#v1").found
    assert test == {"train": {"test.parquet": 3}, "validation": nothing, "test": nothing}


def test_a_split_that_does_not_exist_names_those_that_do(outcomes: list[Outcome]) -> None:
    outcome = _of(outcomes, "hub:own/plain@main")  # how a revision used to be written
    assert outcome.found == {
        "error": "hub:own/plain: no split 'main', it has: train, validation, test",
        "hint": "a split: hub:own/plain@train; a branch, tag or commit: hub:own/plain#main",
    }
    assert outcome.fetched == []


def test_one_of_several_configurations_must_be_named(outcomes: list[Outcome]) -> None:
    assert _of(outcomes, "hub:own/configs").found == {
        "error": "hub:own/configs: several configurations: main, socratic",
        "hint": "name one: hub:own/configs:main",
    }
    unknown = _of(outcomes, "hub:own/configs:mian").found
    assert unknown["error"] == "hub:own/configs: no configuration 'mian', it has: main, socratic"
    outcome = _of(outcomes, "hub:own/configs:socratic")
    assert outcome.found["train"] == {"train.parquet": 2}
    assert outcome.fetched == ["socratic/a.jsonl"]


@pytest.mark.parametrize("path", ["hub:own/nothing", "hub:own/plain#nowhere"])
def test_what_the_hub_does_not_have_is_an_error_with_a_way_out(outcomes: list[Outcome], path: str) -> None:
    found = _of(outcomes, path).found
    assert found["error"].startswith(f"{path.partition('#')[0]}: cannot be downloaded: ")
    assert "give its path instead" in found["hint"]


@pytest.mark.parametrize(("path", "is_warned"), [("hub:a/b@test", True), ("hub:a/b@train", False), ("hub:a/b", False)])
def test_a_split_named_as_test_data_is_warned_about(
    path: str, is_warned: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    warn_of_name(path)
    assert (f"{path}: named as test data, but it is trained on" in capsys.readouterr().err) == is_warned
