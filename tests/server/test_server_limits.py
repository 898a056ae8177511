"""Sizes, timers and connections: what a client may send, and what it may not take too long over."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest
from fake_engine import scripted
from server_support import SERVER, TOKENIZER, RunningServer, running, wait_for

TIGHT = replace(
    SERVER,
    max_body_bytes=20_000,
    max_header_bytes=4_000,
    max_headers=20,
    header_timeout_seconds=0.4,
    body_timeout_seconds=0.4,
    keep_alive_seconds=0.5,
    max_connections=24,
)
POST = b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
HELLO = {"model": "tiny-oss", "prompt": "hello", "max_tokens": 2}


@pytest.fixture(scope="module")
def tight() -> Iterator[RunningServer]:
    with running(server=TIGHT) as server:
        yield server


def read_all(sock: socket.socket) -> bytes:
    data = b""
    try:
        while part := sock.recv(65536):
            data += part
    except ConnectionResetError:
        pass
    return data


def exchange(server: RunningServer, data: bytes, *, shut: bool = False) -> tuple[int, dict[str, str], bytes]:
    """Send raw bytes, read to the end of the connection, return status, headers and body."""
    with server.connect() as sock:
        sock.sendall(data)
        if shut:
            sock.shutdown(socket.SHUT_WR)
        raw = read_all(sock)
    return parse(raw)


def parse(raw: bytes) -> tuple[int, dict[str, str], bytes]:
    head, _, body = raw.partition(b"\r\n\r\n")
    lines = head.decode("latin-1").split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines[1:] if ": " in line)
    return int(lines[0].split(" ")[1]), headers, body


def check_error(answer: tuple[int, dict[str, str], bytes], status: int, code: str) -> None:
    found, headers, body = answer
    assert found == status
    error = json.loads(body)["error"]
    assert error["code"] == code
    assert set(error) == {"message", "type", "param", "code"}
    assert headers["x-request-id"]
    assert headers["content-type"] == "application/json"
    assert headers["connection"] == "close"


def test_header_of_many_bytes_in_one_piece(tight: RunningServer) -> None:
    check_error(
        exchange(tight, b"GET /live HTTP/1.1\r\nHost: localhost\r\nX-A: " + b"a" * 5000 + b"\r\n\r\n"),
        431,
        "headers_too_large",
    )


def test_header_that_never_ends(tight: RunningServer) -> None:
    with tight.connect() as sock:
        sock.sendall(b"GET /live HTTP/1.1\r\nHost: localhost\r\nX-A: ")
        for _ in range(10):
            sock.sendall(b"a" * 1000)
            time.sleep(0.005)
        check_error(parse(read_all(sock)), 431, "headers_too_large")


def test_too_many_headers(tight: RunningServer) -> None:
    fields = b"".join(b"X-%d: 1\r\n" % i for i in range(30))
    check_error(
        exchange(tight, b"GET /live HTTP/1.1\r\nHost: localhost\r\n" + fields + b"\r\n"), 431, "headers_too_large"
    )


def test_long_path(tight: RunningServer) -> None:
    check_error(
        exchange(tight, b"GET /" + b"a" * 5000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n"), 431, "headers_too_large"
    )


def test_silent_half_header_and_half_body_connections(tight: RunningServer) -> None:
    beginnings = [
        b"",
        b"GET /live HT",
        b"GET /live HTTP/1.1\r\nHost: localhost\r\nX-",
        POST + b'Content-Length: 99\r\n\r\n{"m',
        POST + b"Transfer-Encoding: chunked\r\n\r\n5\r\n{",
    ]
    started = time.monotonic()
    socks = []
    for beginning in beginnings:
        sock = tight.connect()
        sock.sendall(beginning)
        socks.append(sock)
    with tight.http() as client:
        # Meanwhile a normal request is served.
        assert client.get("/live").status_code == 200
        assert time.monotonic() - started < 0.4
    for sock in socks:
        with sock:
            check_error(parse(read_all(sock)), 408, "request_timeout")
    assert time.monotonic() - started < 3


def test_slow_handler_is_not_cut_by_the_read_timers() -> None:
    write = scripted([[i] for i in TOKENIZER.encode("slow answer")], first_delay_seconds=1.0)
    with running(write, server=TIGHT) as server, server.http() as client:
        assert client.post("/v1/completions", json=HELLO).status_code == 200


def test_keep_alive_serves_again_and_then_closes(tight: RunningServer) -> None:
    with tight.connect() as sock:
        for _ in range(2):
            sock.sendall(b"GET /live HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert b"200 OK" in sock.recv(65536)
            time.sleep(0.05)
        started = time.monotonic()
        assert sock.recv(10) == b""
        assert 0.2 < time.monotonic() - started < 2


def test_second_request_on_a_connection_has_its_own_header_timer(tight: RunningServer) -> None:
    with tight.connect() as sock:
        sock.sendall(b"GET /live HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert b"200 OK" in sock.recv(65536)
        sock.sendall(b"GET /li")
        check_error(parse(read_all(sock)), 408, "request_timeout")


def test_body_limit_declared_and_chunked(tight: RunningServer) -> None:
    big = json.dumps(HELLO | {"prompt": "x" * 30_000}).encode()
    with tight.http() as client:
        declared = client.post("/v1/completions", content=big, headers={"content-type": "application/json"})
        chunked = client.post(
            "/v1/completions",
            content=iter([big[i : i + 4096] for i in range(0, len(big), 4096)]),
            headers={"content-type": "application/json"},
        )
    for answer in (declared, chunked):
        assert answer.status_code == 413
        assert answer.json()["error"]["code"] == "request_too_large"
    absurd = POST + b"Content-Length: 9999999999999999999\r\n\r\n{"
    assert exchange(tight, absurd)[0] in (400, 413)


def test_a_connection_answered_before_its_body_is_not_kept_forever(tight: RunningServer) -> None:
    with tight.connect() as sock:
        sock.sendall(b"POST /nope HTTP/1.1\r\nHost: localhost\r\nContent-Length: 4\r\n\r\nab")
        assert b"404 Not Found" in sock.recv(65536)
        sock.sendall(b"cd")
        started = time.monotonic()
        read_all(sock)
        assert time.monotonic() - started < 2
    with tight.connect() as sock:
        sock.sendall(b"POST /nope HTTP/1.1\r\nHost: localhost\r\nContent-Length: 4\r\n\r\nab")
        assert b"404 Not Found" in sock.recv(65536)
        assert read_all(sock) == b""


def test_missing_host_and_malformed_http(tight: RunningServer) -> None:
    status, _, body = exchange(tight, b"GET /v1/models HTTP/1.1\r\nConnection: close\r\n\r\n")
    assert status == 400
    assert json.loads(body)["error"]["code"] == "invalid_value"
    for junk in (
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 tls\r\n\r\n",
        b"GET /\xff\xfe HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET / HTTP/9.9\r\nHost: a\r\n\r\n",
        b"FOO BAR\r\n\r\n",
        b"POST /tokenize HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST /tokenize HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n",
    ):
        check_error(exchange(tight, junk), 400, "invalid_http")
    check_error(exchange(tight, b"CONNECT a:1 HTTP/1.1\r\nHost: a\r\n\r\n"), 405, "method_not_allowed")


def test_upgrade_offers_are_ignored(tight: RunningServer) -> None:
    body = json.dumps({"prompt": "hello"}).encode()
    head = (
        b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n"
        b"HTTP2-Settings: AAMAAABkAAQAAP__\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
    )
    for pieces in ([head + body], [head, body]):
        with tight.connect() as sock:
            for piece in pieces:
                sock.sendall(piece)
                time.sleep(0.05)
            status, _, answer = parse(sock.recv(65536))
            assert status == 200
            assert json.loads(answer)["count"] >= 1


def test_pipelined_requests_answer_in_order(tight: RunningServer) -> None:
    with tight.connect() as sock:
        sock.sendall(
            b"".join(b"GET %s HTTP/1.1\r\nHost: a\r\n\r\n" % path for path in (b"/live", b"/nope", b"/version"))
        )
        time.sleep(0.2)
        raw = sock.recv(65536)
    assert [answer[:4].strip() for answer in raw.split(b"HTTP/1.1")[1:]] == [b"200", b"404", b"200"]


def test_connection_limit_refuses_with_503() -> None:
    server_config = replace(SERVER, max_connections=4)
    with running(server=server_config) as server:
        socks = [server.connect() for _ in range(4)]
        assert wait_for(lambda: server.call(lambda: True))
        with server.connect() as extra:
            status, headers, body = parse(read_all(extra))
        assert status == 503
        assert json.loads(body)["error"]["code"] == "overloaded"
        assert headers["retry-after"] == "1"
        for sock in socks:
            sock.close()
        assert wait_for(lambda: _is_live(server))


def _is_live(server: RunningServer) -> bool:
    with server.http() as client:
        return client.get("/live").status_code == 200


def test_slow_reader_is_paused_then_aborted() -> None:
    ids = TOKENIZER.encode("an answer that nobody reads, ")
    write = scripted([[ids[i % len(ids)]] for i in range(60_000)])
    with running(write, stall_seconds=0.3) as server:
        server.engine.max_model_len = 200_000
        body = json.dumps(HELLO | {"max_tokens": 60_000, "stream": True}).encode()
        with server.connect(receive_buffer=4096) as sock:
            sock.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                b"Content-Length: %d\r\n\r\n" % len(body) + body
            )
            assert sock.recv(100)
            # Others are served meanwhile, and the stalled stream is aborted, not the engine's other work.
            with server.http() as client:
                assert client.get("/live").status_code == 200
            assert wait_for(lambda: not server.app.lifecycle.num_running, 10)
        assert wait_for(lambda: not server.engine.live)
        assert server.app.metrics.num_disconnects == 1


def test_wall_time_limit() -> None:
    write = scripted([[i] for i in TOKENIZER.encode("too slow")], delay_seconds=0.2)
    with running(write, server=replace(SERVER, request_timeout_seconds=0.5)) as server, server.http() as client:
        answer = client.post("/v1/completions", json=HELLO | {"max_tokens": 100})
        assert answer.status_code == 500
        assert answer.json()["error"]["code"] == "request_timeout"
        assert answer.headers["x-should-retry"] == "false"
        with client.stream("POST", "/v1/completions", json=HELLO | {"max_tokens": 100, "stream": True}) as stream:
            text = stream.read().decode()
        assert '"code":"request_timeout"' in text
        assert "[DONE]" not in text
        assert wait_for(lambda: not server.engine.live)


LONG = "many more words than any context holds. " * 75_000
CHAT_LONG = {"model": "tiny-oss", "messages": [{"role": "user", "content": LONG}]}
OVERSIZED = {
    "/v1/completions": ({"model": "tiny-oss", "prompt": LONG, "max_tokens": 7}, "prompt"),
    "/v1/chat/completions": (CHAT_LONG | {"max_completion_tokens": 7}, "messages"),
    "/v1/responses": ({"model": "tiny-oss", "input": LONG, "max_output_tokens": 7}, "input"),
    "/v1/messages": (CHAT_LONG | {"max_tokens": 7}, None),
    "/v1/messages/count_tokens": (CHAT_LONG, "messages"),
    "/v1/responses/input_tokens": ({"model": "tiny-oss", "input": LONG}, "input"),
    "/tokenize": ({"prompt": LONG}, "prompt"),
}


@pytest.mark.parametrize("route", OVERSIZED)
def test_an_oversized_prompt_is_refused_before_it_is_tokenized(
    route: str, shared_server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    body, param = OVERSIZED[route]
    num_chars = 0
    encode = TOKENIZER.encode

    def counted(text: str) -> list[int]:
        nonlocal num_chars
        num_chars += len(text)
        return encode(text)

    monkeypatch.setattr(TOKENIZER, "encode", counted)
    limit = shared_server.engine.max_model_len
    with shared_server.http() as client:
        answer = client.post(route, json=body)
    assert answer.status_code == 400, answer.text
    text = answer.json()["error"]["message"]
    assert num_chars < len(LONG) // 10
    if param is None:
        assert text == f"prompt is too long: more than {limit} tokens > {limit} maximum"
    elif "max" in str(body.keys()):
        assert f"you requested more than {limit + 7} tokens (more than {limit} in the messages, 7 in the" in text
        assert answer.json()["error"]["code"] == "context_length_exceeded"
    else:
        assert text == f"{param}: more than {4 * limit} tokens; this server counts no further."


def test_a_prompt_that_is_somewhat_too_long_is_counted(shared_server: RunningServer) -> None:
    prompt = LONG[:40_000]
    limit, num_tokens = shared_server.engine.max_model_len, len(TOKENIZER.encode(prompt))
    assert num_tokens > limit
    with shared_server.http() as client:
        text = client.post("/v1/completions", json=HELLO | {"prompt": prompt}).json()["error"]["message"]
        counted = client.post("/tokenize", json={"prompt": prompt}).json()["count"]
    assert f"you requested {num_tokens + 2} tokens ({num_tokens} in the messages, 2 in the completion)" in text
    assert counted == num_tokens
