"""A server under load whose processes are killed one after the other, and what its clients saw of it.

Knows: the server's process, streaming clients, the clock. Refuses to know: whom to kill, and what brings him back.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from ray_nodes import ROOT, command_line, descendants

from engine.config import EngineConfig, ServerConfig

PROMPT, NUM_TOKENS, NUM_STREAMS, STREAM_TOKENS = "ROMEO: What say", 12, 4, 1800
END_SECONDS = 5.0
"""By when a client must know, after a kill."""
READY_SECONDS = 10.0
"""By when the same words must come again, on two quiet cores."""


@dataclass(frozen=True, slots=True)
class Kill:
    """What one kill did. Units: seconds after it."""

    kind: str
    ended: float
    served: float
    num_errors: int


@dataclass
class Server:
    """`python -m engine.server` in a session of its own, with a folder for whatever it leaves behind."""

    config: EngineConfig
    folder: Path
    environ: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        # Everybody is killed far more often here than in any ten minutes of a life.
        config = replace(
            self.config, max_restarts=1 << 20, server=ServerConfig(port=self.port, drain_timeout_seconds=2)
        )
        path = self.folder / "engine.json"
        path.write_text(config.to_json())
        self.temporary = self.folder / "tmp"
        self.temporary.mkdir()
        self.shared_memory = set(os.listdir("/dev/shm"))
        self.log = self.folder / "server.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "engine.server", "--config", str(path)],
                cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                env={**os.environ, **self.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(self.temporary)},
            )  # fmt: skip

    def pids(self, part: str) -> list[int]:
        """Living processes below the server whose command line has `part`, by age."""
        mine = {self.process.pid} | descendants(self.process.pid)
        return sorted(pid for pid in mine if part in command_line(pid))

    def lines(self, **options: object) -> Iterator[str]:
        """Ask for a completion and give the lines of the answer. Raises: OSError, HTTPException."""
        body = {"model": self.config.model, "prompt": PROMPT, "temperature": 0, **options}
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)) as connection:
            connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
            with connection.getresponse() as response:
                for line in response:
                    yield line.decode()

    def words(self) -> str:
        """What it says to the prompt; empty while it says nothing."""
        with contextlib.suppress(OSError, http.client.HTTPException, ValueError, KeyError):
            return str(json.loads("".join(self.lines(max_tokens=NUM_TOKENS)))["choices"][0]["text"])
        return ""

    def wait_until_served(self, words: str, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while (said := self.words()) != words:
            assert not said, f"{said!r}, not {words!r}"
            assert self.process.poll() is None, self.tail()
            assert time.monotonic() < deadline, f"not served within {seconds:g} s\n{self.tail()}"
            time.sleep(0.05)

    def stop(self) -> int:
        """End it as an operator does; returns its exit status."""
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.kill()
            raise

    def kill(self) -> None:
        for pid in self.pids(""):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()

    def leftovers(self) -> list[str]:
        """List what is still there of it: processes of its session, sockets and files, shared memory."""
        found = []
        for entry in os.listdir("/proc"):
            with contextlib.suppress(OSError, ValueError):
                if os.getsid(int(entry)) == self.process.pid:
                    found.append(f"process {entry}: {command_line(int(entry))}")
        found += [f"shared memory {name}" for name in set(os.listdir("/dev/shm")) - self.shared_memory]
        return found + [f"file {path}" for path in self.temporary.rglob("*") if not path.is_dir()]

    def tail(self) -> str:
        return self.log.read_text(errors="replace")[-6000:]


@dataclass
class Stream:
    """A client that reads a long answer to its end, whatever that is."""

    server: Server
    seed: int
    first: threading.Event = field(default_factory=threading.Event)
    ended: float = 0.0
    last: str = ""

    def __post_init__(self) -> None:
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            for line in self.server.lines(max_tokens=STREAM_TOKENS, stream=True, ignore_eos=True, seed=self.seed):
                self.last = line.strip() or self.last
                self.first.set()
        except (OSError, http.client.HTTPException) as error:
            self.last = f"error: {error!r}"
        self.ended = time.monotonic()
        self.first.set()

    @property
    def has_answer(self) -> bool:
        return self.last == "data: [DONE]"

    @property
    def has_error(self) -> bool:
        return "error" in self.last


def strike(
    server: Server, kind: str, kill: Callable[[], None], words: str, source: random.Random, seconds: float
) -> Kill:
    """Kill while streams run; returns once the server says the same words again, within `seconds`.

    Raises: AssertionError when a client is left without an answer or an error in time.
    """
    streams = [Stream(server, seed) for seed in range(NUM_STREAMS)]
    for stream in streams:
        assert stream.first.wait(30), server.tail()
    time.sleep(0.3 * source.random())
    struck = time.monotonic()
    kill()
    for stream in streams:
        stream.thread.join(END_SECONDS + 5)
        assert stream.ended, f"{kind}: a client still waits\n{server.tail()}"
        assert stream.has_answer or stream.has_error, (kind, stream.last)
    ended = max(stream.ended for stream in streams) - struck
    assert ended < END_SECONDS, (kind, ended)
    server.wait_until_served(words, seconds)
    served = time.monotonic() - struck
    print(f"{kind}: clients knew after {ended:.2f} s, served again after {served:.2f} s", flush=True)
    return Kill(kind, ended, served, sum(stream.has_error for stream in streams))
