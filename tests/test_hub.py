"""Against a real server on this machine that speaks the Hub's protocol, faults included."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
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
            if name.endswith((".safetensors", ".bin", ".gguf")) or name in self.server.hashes:
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
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            start = int(first)
            content = content[: int(last) + 1] if last else content
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
    with pytest.raises(DiskError, match=r"already exists, and its model\.safetensors differs from that of some/model"):
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
    with pytest.raises(InputError, match=rf"model\.safetensors: the server sent a wrong file 3 times \({words}\)"):
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
        ((403, {}), r"access denied \(403\)", "HF_TOKEN"),
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
    with pytest.raises(InputError, match=r"rejected the token in HF_TOKEN \(401\)"):
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
    assert caught.value.hint == "download one of its GGUF files: lit-lora download some/model/model.Q4_0.gguf"


def test_one_file_is_fetched_by_name(server: FakeHub, tmp_path: Path) -> None:
    server.files["model.Q4_0.gguf"] = WEIGHTS
    out = tmp_path / "deep" / "model.gguf"
    hub.fetch_file("some/model", "model.Q4_0.gguf", out, endpoint=server.url)
    assert out.read_bytes() == WEIGHTS
    hub.fetch_file("some/model", "model.Q4_0.gguf", out, endpoint=server.url)
    assert len(server.asked("resolve")) == 1
    out.write_bytes(b"mine")
    with pytest.raises(DiskError, match="already exists, and differs from"):
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
    with pytest.raises(UsageError, match="not the name of a Hub repository"):
        hub.fetch_repo(repo, tmp_path / "out")


@pytest.mark.parametrize("ranges", [True, False])
def test_the_start_of_a_file_is_read_without_the_rest(server: FakeHub, tmp_path: Path, ranges: bool) -> None:
    server.ranges = ranges
    server.files["model.safetensors"] = WEIGHTS * 20
    server.faults["model.safetensors"] = [(503, {})]
    (weights,) = hub.fetch_side_files("some/model", tmp_path, endpoint=server.url)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "tokenizer.json"]
    assert hub.read_start("some/model", weights, 1000) == WEIGHTS[:1000]
    assert hub.read_start("some/model", weights, len(WEIGHTS) * 30) == WEIGHTS * 20
    requested = [headers["Range"] for headers in server.asked("model.safetensors")]
    assert requested == ["bytes=0-999"] * 2 + [f"bytes=0-{len(WEIGHTS) * 30 - 1}"]


def test_a_tokenizer_in_large_file_storage_comes_before_the_weights(server: FakeHub, tmp_path: Path) -> None:
    server.hashes["tokenizer.json"] = hashlib.sha256(FILES["tokenizer.json"]).hexdigest()

    def check(folder: Path) -> None:
        assert (folder / "tokenizer.json").is_file()
        assert not server.asked("model.safetensors")

    fetch(server, tmp_path / "out", check=check)
    assert (tmp_path / "out" / "model.safetensors").is_file()
