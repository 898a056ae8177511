"""A child process that takes one JSON request and answers in JSON lines: how the launcher uses torch and numpy.

Knows: the pipes, the last words of a child that died, how it is ended. Refuses to know: what is asked and answered.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from launcher.errors import EngineFailed

_LAST_LINES = 12
_END_SECONDS = 10.0
_ROOT = Path(__file__).resolve().parents[2]


def run_child(module: str, request: Mapping[str, Any], environ: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    """Run `python -m MODULE` with the request on stdin and yield each JSON object of its stdout.

    Other lines of its stdout and all of its stderr are kept for the error. Leaving the iterator early ends the child.
    Raises: EngineFailed with the child's last words when it dies without having said why (an `error` object).
    """
    last: deque[str] = deque(maxlen=_LAST_LINES)
    process = subprocess.Popen(
        [sys.executable, "-m", module],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        errors="replace",
        env=_environment(environ),
    )
    listener = threading.Thread(target=_keep_last, args=(process.stderr, last), daemon=True)
    listener.start()
    has_said_why = False
    try:
        if process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(json.dumps(request))
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
        for line in process.stdout or ():
            event = _event(line)
            if event is None:
                last.append(line.rstrip())
                continue
            has_said_why = has_said_why or event["event"] == "error"
            yield event
        code = process.wait()
        listener.join(timeout=_END_SECONDS)
    finally:
        _end(process)
    if code != 0 and not has_said_why:
        raise EngineFailed(_verdict(module, code), details=[line for line in last if line.strip()])


def _environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Let the child find our packages, wherever it is started and however we were installed."""
    path = environ.get("PYTHONPATH")
    return {**environ, "PYTHONPATH": f"{_ROOT}:{path}" if path else str(_ROOT), "PYTHONUNBUFFERED": "1"}


def _event(line: str) -> dict[str, Any] | None:
    if not line.startswith("{"):
        return None
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return event if isinstance(event, dict) and "event" in event else None


def _keep_last(stream: Any, last: deque[str]) -> None:
    for line in stream:
        last.append(line.rstrip())


def _verdict(module: str, code: int) -> str:
    if code == -9:
        return f"{module} was killed (signal 9): most often the machine ran out of memory"
    return f"{module} was ended by signal {-code}" if code < 0 else f"{module} failed with exit status {code}"


def _end(process: subprocess.Popen[str]) -> None:
    """End a child that still runs: politely, then not."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(timeout=_END_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    for stream in (process.stdout, process.stderr):
        if stream is not None:
            stream.close()
