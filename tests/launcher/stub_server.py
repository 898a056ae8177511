"""A model server's read routes with answers of the test's choice, on a socket of its own."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Stub:
    """`answers`: path, or `POST path`, → (status, body). With `key`, without it 401. `seen`: what was asked."""

    answers: dict[str, tuple[int, bytes]]
    key: str | None = None
    missing_bytes: int = 0
    """How many bytes of each answer are announced and never come."""
    seen: list[str] = field(default_factory=list)
    url: str = ""
    stop: threading.Event = field(default_factory=threading.Event)


@contextmanager
def serving(stub: Stub) -> Iterator[Stub]:
    """Serve until the block ends, or until `stub.stop` is set: then every new connection is refused."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.answer(self.path)

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.answer(f"POST {self.path}")

        def answer(self, asked: str) -> None:
            stub.seen.append(asked)
            status, body = stub.answers.get(asked, (404, b'{"error": {"message": "no such route"}}'))
            if stub.key is not None and self.headers.get("Authorization") != f"Bearer {stub.key}":
                status, body = 401, b'{"error": {"message": "no key", "code": "invalid_api_key"}}'
            self.send_response(status)
            self.send_header("Content-Length", str(len(body) + stub.missing_bytes))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    stub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()

    def end() -> None:
        stub.stop.wait()
        server.shutdown()
        server.server_close()

    ending = threading.Thread(target=end, daemon=True)
    ending.start()
    try:
        yield stub
    finally:
        stub.stop.set()
        ending.join(timeout=5)
        thread.join(timeout=5)
