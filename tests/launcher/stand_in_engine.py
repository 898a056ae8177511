"""A stand-in for the engine process: speaks the status protocol, then does what its first argument says.

Modes: ok, slow, hang, silent, die, kill, fatal, late-death, stubborn, noisy. SIGUSR2 is the death of its core, and the
next one that it serves again. It watches its parent as the engine does.
"""

from __future__ import annotations

import argparse
import ctypes
import faulthandler
import json
import os
import select
import signal
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread


class Handler(BaseHTTPRequestHandler):
    status = 200

    def do_GET(self) -> None:
        self.send_response(self.status)
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, *_: object) -> None:
        return


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("mode")
    parser.add_argument("--status-fd", type=int, required=True)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--grandchild", action="store_true")
    options = parser.parse_args()
    parent = os.getppid()
    ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        return 1
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    print("stand-in: hello", flush=True)

    def say(**record: object) -> None:
        os.write(options.status_fd, json.dumps(record).encode() + b"\n")

    def phase(name: str, state: str, fraction: float | None = None, detail: str = "") -> None:
        say(kind="phase", phase=name, state=state, fraction=fraction, detail=detail, at=time.monotonic())

    if options.grandchild:
        # A descendant that nobody asked to die: the launcher has to find it.
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    if options.mode == "silent":
        time.sleep(600)
    phase("import", "begin", None, "torch")
    phase("import", "end")
    phase("load", "begin", 0.0)
    phase("load", "progress", 0.5, "half")
    if options.mode == "hang":
        time.sleep(600)
    if options.mode == "die":
        print("stand-in: about to die", flush=True)
        return 3
    if options.mode == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if options.mode == "fatal":
        print("Traceback: something long", flush=True)
        say(
            kind="fatal",
            phase="load",
            type="CheckpointError",
            message="model.safetensors: lm_head.weight: expected [4, 4], found [4, 3]",
            hint="download it again",
            exit_code=6,
        )
        return 6
    if options.mode == "slow":
        time.sleep(1.0)
    phase("load", "end", 1.0, "4 MiB of weights")
    server = HTTPServer(("127.0.0.1", options.port), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    stops: list[int] = []
    signal.signal(signal.SIGTERM, lambda *_: stops.append(1))

    def turn(*_: object) -> None:
        Handler.status = 503 if Handler.status == 200 else 200
        if Handler.status == 503:
            phase("restart", "begin", None, "the core was killed by SIGKILL; it is started again in 1 s")
        else:
            phase("restart", "end", None, "serves again")

    signal.signal(signal.SIGUSR2, turn)
    port = server.server_address[1]
    say(kind="ready", url=f"http://127.0.0.1:{port}", model="m", facts={"max_model_len": 2048}, at=time.monotonic())
    return serve(options.mode, stops, options.status_fd)


def serve(mode: str, stops: list[int], status_fd: int) -> int:
    began = time.monotonic()
    if mode == "noisy":
        for number in range(2000):
            print(f"line {number:05} " + "x" * 80)
        print("\x1b]0;title\x07 escape", flush=True)
    while True:
        poller = select.poll()
        poller.register(status_fd, select.POLLERR)
        if poller.poll(50):
            return 9
        if mode == "late-death" and time.monotonic() - began > 0.3:
            print("stand-in: the core is gone", flush=True)
            os.kill(os.getpid(), signal.SIGSEGV)
        if stops and mode == "stubborn":
            if len(stops) > 1:
                return 4
        elif stops:
            time.sleep(0.2)
            print("stand-in: drained", flush=True)
            return 0


if __name__ == "__main__":
    sys.exit(main())
