"""One rank of a two-rank all-reduce over a declared fabric, as a program of its own.

Knows: torch.distributed, a store over TCP, one JSON line per phase on standard output. Refuses to know: who started it,
any other module of this package; so its source can be piped into a Python that has torch and no hlaunch.

The phases are `import`, `store`, `group`, `all-reduce`, `done`. A rank that is stuck says in which phase, and ends by
itself at its deadline with exit 3: whoever started it over a connection that broke leaves nothing behind.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

IMPORT_SECONDS = 90.0
HANG_EXIT, FAILED_EXIT, NO_TORCH_EXIT = 3, 4, 5
REPEATS = 5


_TELLING = re.compile(
    r" via |NET/[A-Za-z]|Using network|Assigned NET plugin|GPU Direct RDMA|Connected all rings|NCCL WARN|Bootstrap"
)


def say(event: str, **facts: Any) -> None:
    """Write one line; whoever reads it sees it at once."""
    sys.stdout.write(json.dumps({"event": event, **facts}) + "\n")
    sys.stdout.flush()


class Deadline:
    """Ends the process when a phase outlasts it. A thread of its own, because a stuck collective holds the main one."""

    def __init__(self, log: Path | None) -> None:
        self._log = log
        self._phase = ""
        self._timer: threading.Timer | None = None

    def begin(self, phase: str, seconds: float) -> None:
        """Enter a phase; it has `seconds` from now."""
        self.end()
        self._phase = phase
        say(phase)
        self._timer = threading.Timer(seconds, self._expired)
        self._timer.daemon = True
        self._timer.start()

    def end(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _expired(self) -> None:
        say("hang", phase=self._phase, nccl=_net_lines(self._log))
        os._exit(HANG_EXIT)


def run(settings: dict[str, Any]) -> None:
    """Be one rank. Settings: rank, world, host, port, backend, bytes, seconds, environment.

    Rank 0 takes port 0, opens the store and says where; the others are given that port. Exits the process.
    """
    os.environ.update(settings["environment"])
    log = _nccl_log(settings)
    deadline = Deadline(log)
    deadline.begin("import", IMPORT_SECONDS)
    try:
        import torch
        import torch.distributed as dist
    except ImportError as error:
        say("failed", phase="import", message=str(error), nccl=_net_lines(log))
        os._exit(NO_TORCH_EXIT)
    phase = "store"
    seconds = float(settings["seconds"])
    rank, world = int(settings["rank"]), int(settings["world"])
    timeout = timedelta(seconds=seconds)
    try:
        deadline.begin(phase, seconds)
        store_type: Any = dist.TCPStore  # type: ignore[attr-defined]
        store = store_type(
            settings["host"], int(settings["port"]), world, rank == 0, timeout=timeout, wait_for_workers=False
        )
        if rank == 0:
            say("listening", port=store.port)
        phase = "group"
        deadline.begin(phase, seconds)
        dist.init_process_group(settings["backend"], store=store, rank=rank, world_size=world, timeout=timeout)
        phase = "all-reduce"
        deadline.begin(phase, seconds)
        device = torch.device("cuda", 0) if settings["backend"] == "nccl" else torch.device("cpu")
        best, is_right = _all_reduce(torch, dist, device, int(settings["bytes"]), rank, world)
    except (RuntimeError, ValueError, OSError) as error:
        message = (str(error).strip() or type(error).__name__).splitlines()[0]
        # PyTorch says no more than "invalid usage"; the reason is in NCCL's own log.
        say("failed", phase=phase, message=message[:500], nccl=_net_lines(log))
        os._exit(FAILED_EXIT)
    deadline.end()
    say("done", seconds=best, is_right=is_right, bytes=int(settings["bytes"]), nccl=_net_lines(log))
    # Rank 0 holds the store: it waits until the others are done with it.
    _leave(store, rank, world, seconds)


def _all_reduce(torch: Any, dist: Any, device: Any, size_bytes: int, rank: int, world: int) -> tuple[float, bool]:
    """Sum a tensor of float32 a few times; return the best time in seconds, and whether every sum was right."""
    length = max(1, size_bytes // 4)
    pattern = torch.arange(length, dtype=torch.float32, device=device) % 251
    expected = pattern * world + sum(range(1, world + 1))
    best, is_right = float("inf"), True
    for _ in range(REPEATS):
        tensor = pattern + (rank + 1)
        began = time.perf_counter()
        dist.all_reduce(tensor)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - began)
        is_right = is_right and bool(torch.equal(tensor, expected))
    return best, is_right


def _leave(store: Any, rank: int, world: int, seconds: float) -> None:
    try:
        store.add("left", 1)
        until = time.monotonic() + min(5.0, seconds)
        while rank == 0 and store.add("left", 0) < world and time.monotonic() < until:
            time.sleep(0.02)
    except RuntimeError:
        # The other side has gone already; our own result is said.
        pass
    sys.stdout.flush()
    os._exit(0)


def _nccl_log(settings: dict[str, Any]) -> Path | None:
    """Let NCCL log what it connects, to a file of our own; None for other backends."""
    if settings["backend"] != "nccl":
        return None
    path = Path(tempfile.mkdtemp(prefix="hlaunch-probe-")) / "nccl.log"
    os.environ.update({"NCCL_DEBUG": "INFO", "NCCL_DEBUG_SUBSYS": "INIT,NET,GRAPH", "NCCL_DEBUG_FILE": str(path)})
    return path


def _net_lines(log: Path | None) -> list[str]:
    """Return the lines of NCCL's log that say what is used or what is wrong, and remove it."""
    if log is None:
        return []
    lines: list[str] = []
    try:
        if log.exists():
            lines = log.read_text(errors="replace").splitlines()
            log.unlink()
        log.parent.rmdir()
    except OSError:
        return []
    return [line[:300] for line in lines if _TELLING.search(line)][:200]
