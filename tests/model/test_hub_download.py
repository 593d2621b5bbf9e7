"""A download from a hub, against a small hub of our own on the loopback interface."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest
from support.paths import SRC

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def blob_hash(content):
    """git's, which the hub names small files by."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Hub(BaseHTTPRequestHandler):
    """The three endpoints that a snapshot download asks for: repository, tree, file."""

    files: ClassVar[dict[str, bytes]] = {}
    requested: ClassVar[list[str]] = []

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.answer(with_body=True)

    def do_HEAD(self):
        self.answer(with_body=False)

    def answer(self, *, with_body):
        path = self.path.split("?")[0]
        self.requested.append(path)
        if path.startswith("/api/models/org/tiny/revision/"):
            siblings = [{"rfilename": name} for name in self.files]
            return self.send(
                json.dumps({"id": "org/tiny", "sha": COMMIT, "siblings": siblings}).encode(),
                {},
                with_body,
            )
        if path.startswith("/api/models/org/tiny/tree/"):
            tree = [
                {"type": "file", "path": n, "size": len(c), "oid": blob_hash(c)}
                for n, c in self.files.items()
            ]
            return self.send(json.dumps(tree).encode(), {}, with_body)
        name = path.removeprefix(f"/org/tiny/resolve/{COMMIT}/")
        if name not in self.files:
            self.send_response(404)
            self.send_header("Content-Length", "0")
            return self.end_headers()
        content = self.files[name]
        return self.send(
            content, {"ETag": f'"{blob_hash(content)}"', "X-Repo-Commit": COMMIT}, with_body
        )

    def send(self, content, headers, with_body):
        self.send_response(200)
        for name, value in {
            "Content-Length": str(len(content)),
            "Content-Type": "application/json",
            **headers,
        }.items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(content)


@pytest.fixture
def hub(tiny_llama_dir):
    Hub.files = {p.name: p.read_bytes() for p in Path(tiny_llama_dir).iterdir() if p.is_file()} | {
        "notes.md": b"not needed",
        "pytorch_model.bin": b"x",
    }
    Hub.requested = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
    thread.join()


def fetch(*flags, endpoint, home, offline="0", command="fetch"):
    environment = {
        k: v
        for k, v in os.environ.items()
        if not k.startswith(("HF_", "TRANSFORMERS_", "HTTP", "http"))
    }
    environment |= {
        "PYTHONPATH": str(SRC),
        "HF_HOME": str(home),
        "HF_ENDPOINT": endpoint,
        "HF_HUB_OFFLINE": offline,
        "NO_PROXY": "*",
    }
    words = [sys.executable, "-m", "lorabatch", command, *flags]
    return subprocess.run(
        words, env=environment, capture_output=True, text=True, timeout=120, check=False
    )


def test_fetch_downloads_what_a_model_needs_and_then_works_offline(hub, tmp_path):
    copy = tmp_path / "copy"
    first = fetch("org/tiny", "--to", str(copy), endpoint=hub, home=tmp_path / "home")
    assert first.returncode == 0, first.stderr
    manifest = json.loads((copy / "MANIFEST.json").read_text())
    assert manifest["revision"] == COMMIT and manifest["name"] == "org/tiny"
    assert (copy / "model.safetensors").read_bytes() == Hub.files["model.safetensors"]
    assert (
        manifest["files"]["model.safetensors"]["sha256"]
        == hashlib.sha256(Hub.files["model.safetensors"]).hexdigest()
    )
    assert not (copy / "notes.md").exists() and not (copy / "pytorch_model.bin").exists()

    count = len(Hub.requested)
    again = fetch("org/tiny", endpoint=hub, home=tmp_path / "home", offline="1")
    assert again.returncode == 0, again.stderr
    assert COMMIT in again.stdout
    assert len(Hub.requested) == count, "a cached model asked the hub"


def test_a_name_that_the_hub_does_not_have_is_one_line_and_69(hub, tmp_path):
    result = fetch("org/other", endpoint=hub, home=tmp_path / "home")
    assert result.returncode == 69
    lines = result.stderr.strip().splitlines()
    assert (
        len(lines) == 1 and "org/other" in lines[0] and "lorabatch fetch org/other" in lines[0]
    ), result.stderr


def test_a_cached_model_and_a_copy_are_verified_offline_and_a_changed_byte_is_named(hub, tmp_path):
    home, copy = tmp_path / "home", tmp_path / "copy"
    assert fetch("org/tiny", endpoint=hub, home=home).returncode == 0
    count = len(Hub.requested)
    cached = fetch("org/tiny", "--verify", "--offline", endpoint=hub, home=home)
    assert cached.returncode == 0 and "all as they were fetched" in cached.stdout, cached.stderr
    snapshot = next(home.rglob("snapshots")) / COMMIT
    copy.mkdir()
    (copy / ".lorabatch-partial").touch()  # an earlier copy was interrupted in the middle of a file
    (copy / "config.json").write_bytes((snapshot / "config.json").read_bytes())
    (copy / "model.safetensors").write_bytes(b"half")
    staged = fetch("org/tiny", str(copy), "--verify", endpoint=hub, home=home, command="stage")
    assert staged.returncode == 0 and not any(p.is_symlink() for p in copy.iterdir()), staged.stderr
    assert len(Hub.requested) == count, "stage asked the hub"
    for folder in (copy, snapshot):
        weights = (folder / "model.safetensors").resolve()
        content = bytearray(weights.read_bytes())
        content[len(content) // 2] ^= 1
        weights.chmod(0o644)
        weights.write_bytes(content)
        found = fetch(
            str(copy) if folder == copy else "org/tiny",
            "--verify",
            "--offline",
            endpoint=hub,
            home=home,
        )
        assert (
            found.returncode == 65
            and "model.safetensors" in found.stderr
            and "config.json" not in found.stderr
        )


def test_offline_fetch_of_what_is_not_there_asks_nobody(hub, tmp_path):
    assert fetch("org/tiny", "--offline", endpoint=hub, home=tmp_path / "home").returncode == 69
    assert Hub.requested == []
