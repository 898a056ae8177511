"""Ends: clients that leave, engines that fail, servers that drain."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from fake_engine import Script, scripted
from server_support import CHAT, SERVER, TOKENIZER, RunningServer, running, wait_for

from engine.async_engine import EngineState, EngineUnavailable
from engine.core.request import EngineRequest

WORDS = [[i] for i in TOKENIZER.encode("all the world is a stage, and all the men and women merely players ")]
BODY = {"model": "tiny-oss", "prompt": "hello", "max_tokens": 500}
CHAT_BODY = {"model": "tiny-oss", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 500}
ROOT = Path(__file__).resolve().parents[2]


def post_raw(server: RunningServer, path: str, body: dict[str, Any]) -> socket.socket:
    data = json.dumps(body).encode()
    sock = server.connect()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    sock.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
    return sock


@pytest.mark.parametrize("is_streaming", [True, False], ids=["stream", "whole"])
@pytest.mark.parametrize("moment", ["queued", "running"])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_a_client_that_leaves_aborts_its_sequences(is_streaming: bool, moment: str, path: str) -> None:
    write = scripted(WORDS * 20, delay_seconds=0.02, first_delay_seconds=30.0 if moment == "queued" else 0.0)
    with running(write) as server:
        body = (BODY if path == "/v1/completions" else CHAT_BODY) | {"stream": is_streaming, "n": 2}
        sock = post_raw(server, path, body)
        assert wait_for(lambda: len(server.engine.live) == 2)
        if moment == "running":
            assert wait_for(lambda: server.engine.num_tokens > 3)
        left_at = time.monotonic()
        sock.close()
        assert wait_for(lambda: not server.engine.live)
        assert time.monotonic() - left_at < 1.0
        assert len(server.engine.aborted) == 2
        assert wait_for(lambda: not server.app.lifecycle.num_running)
        assert server.app.metrics.num_disconnects == 1
        assert server.app.metrics.of_engine(0).finished["abort"] == 2


def test_disconnects_at_random_moments_leave_nothing_behind() -> None:
    rng = random.Random(20)
    with running(scripted(WORDS * 4, delay_seconds=0.002)) as server:
        for _ in range(150):
            is_chat = rng.random() < 0.5
            body = (CHAT_BODY if is_chat else BODY) | {"stream": rng.random() < 0.5, "n": rng.choice([1, 1, 3])}
            sock = post_raw(server, "/v1/chat/completions" if is_chat else "/v1/completions", body)
            time.sleep(rng.random() * 0.02)
            if rng.random() < 0.3:
                # A reset instead of an orderly end.
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
            sock.close()
        assert wait_for(lambda: not server.engine.live)
        assert wait_for(lambda: not server.app.lifecycle.num_running)
        with server.http() as client:
            assert client.post("/v1/completions", json=BODY | {"max_tokens": 3}).status_code == 200
        assert server.stop()


def test_a_stop_string_aborts_the_engine_request() -> None:
    with running(scripted(WORDS * 20, delay_seconds=0.005)) as server, server.http() as client:
        answer = client.post("/v1/completions", json=BODY | {"stop": "stage"}).json()
        assert answer["choices"][0]["text"] == "all the world is a "
        assert answer["choices"][0]["finish_reason"] == "stop"
        assert wait_for(lambda: not server.engine.live)
        assert len(server.engine.aborted) == 1


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        ("queue_full: too many", 503, "overloaded"),
        ("never_fits: needs 900 blocks", 400, "invalid_value"),
        ("engine_dead: the engine process ended", 500, "engine_dead"),
        ("the model produced logits that are not finite", 500, "numerical_error"),
        ("RuntimeError: CUDA error at /opt/x.py line 3", 500, "internal_error"),
    ],
)
def test_engine_errors_before_and_after_the_first_token(error: str, status: int, code: str) -> None:
    with running() as server, server.http() as client:
        server.engine.write = lambda _: Script([], error=error)
        for options in ({}, {"stream": True}):
            answer = client.post("/v1/completions", json=BODY | options)
            assert answer.status_code == status
            assert answer.json()["error"]["code"] == code
            assert "/opt" not in answer.text
            if status == 503:
                assert 1 <= int(answer.headers["retry-after"]) <= 60
                assert answer.headers["x-should-retry"] == "true"
        server.engine.write = lambda _: Script(WORDS[:5], error=error)
        assert client.post("/v1/completions", json=BODY).status_code == status
        text = client.post("/v1/completions", json=BODY | {"stream": True}).text
        assert json.loads(text.strip().rsplit("data: ", 1)[1])["error"]["code"] == code
        assert "[DONE]" not in text
        with openai.OpenAI(base_url=server.url + "/v1", api_key="x", max_retries=0) as sdk:
            stream = sdk.chat.completions.create(
                model="tiny-oss", messages=[{"role": "user", "content": "hi"}], stream=True
            )
            with pytest.raises(openai.APIError):
                list(stream)
        assert not server.engine.live


def test_one_failing_choice_ends_the_others() -> None:
    def write(request: EngineRequest) -> Script:
        if request.request_id.endswith("-1"):
            return Script(WORDS[:2], error="numerical_error: x")
        return Script(WORDS * 20, delay_seconds=0.02)

    with running(write) as server, server.http() as client:
        assert client.post("/v1/completions", json=BODY | {"n": 3}).json()["error"]["code"] == "numerical_error"
        assert wait_for(lambda: not server.engine.live)
        assert len(server.engine.aborted) == 2


def test_states_are_the_engines() -> None:
    with running() as server, server.http() as client:
        engine = server.engine
        engine.num_engines = 2
        cases = [
            (EngineState.STARTING, 503, 503, "loading"),
            (EngineState.READY, 200, 200, None),
            (EngineState.DEGRADED, 200, 200, None),
            (EngineState.DRAINING, 503, 503, "draining"),
            (EngineState.STOPPED, 503, 503, "draining"),
            (EngineState.FAILED, 503, 500, "engine_dead"),
        ]
        for state, ready, answer_status, code in cases:
            engine.state, engine.load_fraction = state, 0.42
            for path in ("/ready", "/health"):
                found = client.get(path)
                assert found.status_code == ready
                assert found.json()["status"] == state.value
                if state is EngineState.STARTING:
                    assert found.json()["progress_percent"] == 42
                if state is EngineState.DEGRADED:
                    assert found.json()["engines"] == ["ready", "failed"]
            assert client.get("/live").status_code == 200
            answer = client.post("/v1/completions", json=BODY | {"max_tokens": 2})
            assert answer.status_code == answer_status
            if code is not None:
                assert answer.json()["error"]["code"] == code
            if answer_status == 503:
                assert 1 <= int(answer.headers["retry-after"]) <= 60
        engine.state = EngineState.READY
        engine.refusal = EngineUnavailable("overloaded", "internal words")
        answer = client.post("/v1/completions", json=BODY)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "overloaded")
        assert "internal words" not in answer.text


def test_refusal_in_the_middle_of_n_frees_the_first_ones() -> None:
    with running(scripted(WORDS, delay_seconds=0.05)) as server, server.http() as client:

        def write(request: EngineRequest) -> Script:
            if request.request_id.endswith("-2"):
                raise EngineUnavailable("overloaded", "full")
            return Script(WORDS, delay_seconds=0.05)

        server.engine.write = write
        assert client.post("/v1/completions", json=BODY | {"n": 4}).status_code == 503
        assert wait_for(lambda: not server.engine.live)
        assert len(server.engine.aborted) == 2
        assert server.app.lifecycle.num_running == 0


def test_drain_finishes_what_runs_and_refuses_the_rest() -> None:
    with running(scripted(WORDS, delay_seconds=0.03)) as server:
        answers: list[httpx.Response] = []

        def work(options: dict[str, Any]) -> None:
            with server.http() as client:
                answers.append(client.post("/v1/completions", json=BODY | {"max_tokens": len(WORDS)} | options))

        threads = [threading.Thread(target=work, args=({"stream": i % 2 == 0},)) for i in range(6)]
        for thread in threads:
            thread.start()
        assert wait_for(lambda: len(server.engine.live) == 6)
        server.call(server.app.begin_drain)
        with server.http() as client:
            assert client.get("/ready").status_code == 503
            assert client.get("/ready").json()["status"] == "draining"
            assert client.get("/live").status_code == 200
            refused = client.post("/v1/completions", json=BODY)
            assert refused.status_code == 503
            assert refused.json()["error"]["code"] == "draining"
            assert refused.headers["x-should-retry"] == "true"
            assert 1 <= int(refused.headers["retry-after"]) <= 60
        for thread in threads:
            thread.join(10)
        assert [answer.status_code for answer in answers] == [200] * 6
        assert all("[DONE]" in answer.text or "choices" in answer.json() for answer in answers)
        assert server.stop()
        with pytest.raises(OSError, match="refused"):
            server.connect()


def test_drain_ends_the_rest_with_an_error_event() -> None:
    config = replace(SERVER, drain_timeout_seconds=0.3)
    with running(scripted(WORDS * 50, delay_seconds=0.05), server=config) as server:
        texts: dict[bool, httpx.Response] = {}

        def work(is_streaming: bool) -> None:
            with server.http() as client:
                texts[is_streaming] = client.post("/v1/completions", json=BODY | {"stream": is_streaming})

        threads = [threading.Thread(target=work, args=(flag,)) for flag in (True, False)]
        for thread in threads:
            thread.start()
        assert wait_for(lambda: len(server.engine.live) == 2 and server.engine.num_tokens > 4)
        started = time.monotonic()
        assert server.stop() is False
        assert time.monotonic() - started < 3
        for thread in threads:
            thread.join(5)
        assert json.loads(texts[True].text.strip().rsplit("data: ", 1)[1])["error"]["code"] == "draining"
        assert "[DONE]" not in texts[True].text
        assert texts[False].status_code == 503
        assert not server.engine.live


CHILD = """
import asyncio, sys
sys.path.insert(0, sys.argv[1])
import uvloop
from server_support import SERVER, TOKENIZER, CHAT
from fake_engine import FakeEngine, scripted
from dataclasses import replace
from engine.config import EngineConfig
from engine.server import create_app, serve
words = [[i] for i in TOKENIZER.encode("all the world ")] * 100
async def main():
    server = replace(SERVER, drain_timeout_seconds=float(sys.argv[2]))
    engine = FakeEngine(scripted(words, delay_seconds=0.02))
    app = create_app(EngineConfig(model="tiny-oss", server=server), engine, TOKENIZER, CHAT)
    return await serve(app, server, lambda url: print(url, flush=True))
is_clean = uvloop.run(main())
print("torch" in sys.modules, flush=True)
sys.exit(0 if is_clean else 9)
"""


@pytest.mark.parametrize("case", ["clean", "timeout", "second signal"])
def test_signals(case: str) -> None:
    drain = {"clean": "20", "timeout": "0.3", "second signal": "20"}[case]
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(Path(__file__).parent), drain],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        num_tokens = 20 if case == "clean" else 400
        body = BODY | {"max_tokens": num_tokens, "stream": True}
        with (
            httpx.Client(base_url=url, trust_env=False, timeout=10) as client,
            client.stream("POST", "/v1/completions", json=body) as stream,
        ):
            lines = stream.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM if case != "second signal" else signal.SIGINT)
            time.sleep(0.1)
            with httpx.Client(base_url=url, trust_env=False) as other:
                assert other.get("/ready").status_code == 503
            if case == "second signal":
                process.send_signal(signal.SIGTERM)
            text = "\n".join(lines)
        assert ("[DONE]" in text) == (case == "clean")
        assert ('"code":"draining"' in text) == (case != "clean")
        assert process.wait(10) == (0 if case == "clean" else 9)
        assert process.stdout.read().strip() == "False"
    finally:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def test_silent_streams_are_kept_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.server.stream.EventStream.__init__.__defaults__", (0.2,))
    ids = [*TOKENIZER.encode("late"), CHAT.ids.return_]
    with running(scripted([ids], first_delay_seconds=0.9)) as server, server.http() as client:
        text = client.post("/v1/completions", json=BODY | {"stream": True}).text
    assert text.startswith(": ping\n\n: ping\n\n")
    assert text.endswith("data: [DONE]\n\n")
    assert '"late"' in text


def test_wide_stream_interval_sends_the_first_token_at_once() -> None:
    config = replace(SERVER, stream_interval=5)
    with running(scripted(WORDS), server=config) as server, server.http() as client:
        text = client.post("/v1/completions", json=BODY | {"max_tokens": 14, "stream": True}).text
    chunks = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    texts = [chunk["choices"][0]["text"] for chunk in chunks]
    assert len(texts) == 4
    assert texts[0] == TOKENIZER.decode(WORDS[0])
    assert "".join(texts) == TOKENIZER.decode([i for word in WORDS[:14] for i in word])
