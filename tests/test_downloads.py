"""Downloads from a server that fails, drops, stalls and redirects: retried, then refused, no file kept."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import drrn.sets
from drrn.errors import UserError
from drrn.sets import fetch

GOOD = bytes(range(256)) * 64
DIGEST = f"sha256:{hashlib.sha256(GOOD).hexdigest()}"


class Server:
    """Answers on 127.0.0.1 with the items of `answers[path]`, one per request, then always with the last.

    bytes: the body. "drop": half of it. "stall": half of it, then silence. "mute": not even a header. An int: that
    status. ("to", path): a redirection.
    """

    def __init__(self) -> None:
        self.answers: dict[str, list[object]] = {}
        self.asked: list[str] = []
        self.over = threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.asked.append(self.path)
                answers = outer.answers[self.path]
                answer = answers.pop(0) if len(answers) > 1 else answers[0]
                if answer == "mute":
                    outer.over.wait()
                elif isinstance(answer, int):
                    self.send_error(answer)
                elif isinstance(answer, tuple):
                    self.send_response(302)
                    self.send_header("Location", f"{outer.url}{answer[1]}")
                    self.end_headers()
                else:
                    body = GOOD if isinstance(answer, str) else answer
                    self.send_response(200)
                    self.send_header("Content-Length", str(len(body)))
                    self.end_headers()
                    self.wfile.write(body[: len(body) // 2] if isinstance(answer, str) else body)
                    if answer == "stall":
                        outer.over.wait()

            def log_message(self, *_: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Server]:
    monkeypatch.setattr("pooch.core.time.sleep", lambda seconds: None)  # its pauses between attempts
    monkeypatch.setattr(drrn.sets, "TIMEOUT", 0.3)
    monkeypatch.setattr(drrn.sets, "REGISTRY", tmp_path / "registry.txt")
    server = Server()
    yield server
    server.over.set()
    server.http.shutdown()
    server.http.server_close()


def fetched(server: Server, root: Path) -> list[Path]:
    registry = root.parent / "registry.txt"
    registry.write_text(f"Set5/a.png {DIGEST} {server.url}/a.png\n")
    return fetch("Set5", root)


def everything_under(root: Path) -> list[Path]:
    return [path for path in root.rglob("*") if path.is_file()]


BAD = ["drop", "stall", "mute", 404, 500, 503, b"another file", b"", ("to", "/other"), ("to", "/a.png")]


@pytest.mark.parametrize("answer", BAD, ids=str)
def test_what_stays_wrong_is_refused_and_leaves_nothing(answer: object, server: Server, tmp_path: Path) -> None:
    server.answers = {"/a.png": [answer], "/other": [b"another file"]}
    with pytest.raises(UserError) as refusal:
        fetched(server, tmp_path / "data")
    for text in ("Set5/a.png", f"{server.url}/a.png", "Try again", str(tmp_path / "data/Set5/a.png"), DIGEST):
        assert text in str(refusal.value)
    assert everything_under(tmp_path / "data") == []
    assert server.asked.count("/a.png") >= 3  # once, and twice again


@pytest.mark.parametrize("answer", [answer for answer in BAD if answer != ("to", "/a.png")], ids=str)
def test_what_was_wrong_once_is_tried_again(answer: object, server: Server, tmp_path: Path) -> None:
    server.answers = {"/a.png": [answer, GOOD], "/other": [b"another file"]}
    (path,) = fetched(server, tmp_path / "data")
    assert path.read_bytes() == GOOD
    assert everything_under(tmp_path / "data") == [path]
    assert server.asked.count("/a.png") == 2


def test_redirections_are_followed(server: Server, tmp_path: Path) -> None:
    server.answers = {"/a.png": [("to", "/b")], "/b": [("to", "/c")], "/c": [GOOD]}
    (path,) = fetched(server, tmp_path / "data")
    assert path.read_bytes() == GOOD
    assert server.asked == ["/a.png", "/b", "/c"]


def test_no_server_at_all(tmp_path: Path, server: Server) -> None:
    server.http.shutdown()
    server.http.server_close()
    with pytest.raises(UserError, match="could not be fetched"):
        fetched(server, tmp_path / "data")
    assert everything_under(tmp_path / "data") == []
