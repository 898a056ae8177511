"""What every engine process owes its parent: die with it, dump stacks when asked, report phases, say what happens.

Knows: Linux process signals, the log (standard error) and the status pipe's lines. Refuses to know: what the phases do.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import json
import os
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Literal

_PR_SET_PDEATHSIG = 1
_STACKS_SECONDS = 1.0

PhaseState = Literal["begin", "progress", "end"]


def threads_per_rank(num_ranks: int = 1) -> int:
    """Share this process's cores out to ranks on CPUs, one left for the engine and the server."""
    return max(1, (len(os.sched_getaffinity(0)) - 1) // num_ranks)


def die_with_parent(parent_pid: int, sig: int = signal.SIGKILL) -> None:
    """Ask the kernel to send `sig` to this process when its parent dies; exit at once if it is dead already.

    The signal follows the parent's *thread*: parents spawn from one that lives for as long as the child is wanted, such
    as `LastingThread`.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_PDEATHSIG, sig, 0, 0, 0)
    if os.getppid() != parent_pid:
        os._exit(1)


def follow_parent(status_fd: int) -> None:
    """Die with whoever started us, even when it died before this line: then nobody reads the status pipe."""
    die_with_parent(os.getppid())
    poll = select.poll()
    poll.register(status_fd, 0)
    if poll.poll(0):
        os._exit(1)


def signal_name(number: int) -> str:
    """Name a signal: `SIGKILL`, or `signal 40` for one of those that have no name."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


class LastingThread:
    """Runs one piece of work and lives on until `close`: whatever it spawned and dies with its parent dies then.

    Whoever wants children may come from a thread that ends long before them, as those of a thread pool do.
    """

    def __init__(self, work: Callable[[], None], name: str) -> None:
        self._work = work
        self._done: Future[None] = Future()
        self._may_end = threading.Event()
        threading.Thread(target=self._run, name=name, daemon=True).start()

    def wait(self) -> None:
        """Wait for the work to be done. Raises: what the work raised."""
        self._done.result()

    def close(self) -> None:
        """Let the thread end, once its work is done. Idempotent."""
        self._may_end.set()

    def _run(self) -> None:
        try:
            self._work()
        except BaseException as error:  # noqa: BLE001 - it belongs to whoever waits
            self._done.set_exception(error)
        else:
            self._done.set_result(None)
        self._may_end.wait()


class Repeating:
    """Calls `work` at once and then every `seconds`, in a thread of its own, until `stop`.

    What it raises ends nothing, and is said once until it works again.
    """

    def __init__(self, work: Callable[[], None], seconds: float, name: str) -> None:
        self._work = work
        self._seconds = seconds
        self._is_stopped = threading.Event()
        threading.Thread(target=self._run, name=name, daemon=True).start()

    def stop(self) -> None:
        """Begin no more work; what runs ends by itself."""
        self._is_stopped.set()

    def _run(self) -> None:
        # Signals are for the main thread: one that asks for stacks, and wakes a stopped process for them, wants its.
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        is_said = False
        while not self._is_stopped.is_set():
            try:
                self._work()
                is_said = False
            except Exception as error:  # noqa: BLE001 - the thread's border: the next time may go better
                if not is_said and not self._is_stopped.is_set():
                    say_trace(error)
                is_said = True
            self._is_stopped.wait(self._seconds)


def say(line: str) -> None:
    """Write a line to the log at once and in one piece, since ranks share it. Never raises OSError or ValueError.

    A full disk or a reader that is gone costs the line and nothing else: whoever speaks has more important work.
    """
    stream = sys.stderr
    if stream is None:  # descriptor 2 was closed when this process began
        return
    with contextlib.suppress(OSError, ValueError):
        stream.flush()
    try:
        fd = stream.fileno()
    except (OSError, ValueError):  # somebody's buffer, which holds no descriptor
        with contextlib.suppress(OSError, ValueError):
            stream.write(f"{line}\n")
        return
    # Past the stream's own buffer, which would keep what the disk refuses and raise again for ever.
    with contextlib.suppress(OSError):
        os.write(fd, f"{line}\n".encode(errors="backslashreplace"))


def say_trace(error: BaseException) -> None:
    """Write an exception with its stack to the log, as `say` does."""
    say("".join(traceback.format_exception(error)).rstrip("\n"))


def dump_stacks_on_signal() -> None:
    """Write the stacks of all threads to stderr on SIGUSR1 and on a crash."""
    faulthandler.enable(sys.stderr)
    faulthandler.register(signal.SIGUSR1, sys.stderr, all_threads=True)


def ask_for_stacks(pid: int) -> str:
    """Have a process that called `dump_stacks_on_signal` write its stacks, also one that was stopped: that goes on.

    Returns "" once it does, else why it cannot: what the kernel says of it. Takes at most a second.
    """
    return why_no_stacks(pid, time.monotonic() + _STACKS_SECONDS) if wake_for_stacks(pid) else "it has ended"


def wake_for_stacks(pid: int) -> bool:
    """Send what makes a process write its stacks; whether it is still there."""
    try:
        os.kill(pid, signal.SIGUSR1)
        # To a stopped process nothing is delivered before it goes on, and this comes first then.
        os.kill(pid, signal.SIGCONT)
    except ProcessLookupError:
        return False
    return True


def why_no_stacks(pid: int, deadline: float) -> str:
    """Wait until a process that was woken takes the signal; what the kernel says of it if it does not by `deadline`."""
    while _is_pending(pid, signal.SIGUSR1):
        if time.monotonic() > deadline:
            return f"it takes no signal; {_kernel_view(pid)}"
        time.sleep(0.005)
    return ""


def _is_pending(pid: int, number: int) -> bool:
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith(("SigPnd:", "ShdPnd:")) and int(line.split()[1], 16) >> (number - 1) & 1:
                return True
    return False


def _kernel_view(pid: int) -> str:
    """Say in what state a process is, and where in the kernel it waits as far as we may know."""
    folder, said = Path(f"/proc/{pid}"), []
    with contextlib.suppress(OSError, IndexError):
        state = next(line for line in (folder / "status").read_text().splitlines() if line.startswith("State:"))
        said.append(" ".join(state.split()))
    for name in ("wchan", "stack"):
        with contextlib.suppress(OSError):
            if (text := (folder / name).read_text().strip()) not in ("", "0"):
                said.append(f"{name}: {' '.join(text.split())}")
    return "; ".join(said) or "nothing is known of it"


class StatusPipe:
    """One JSON object per line to whoever started us: phases, `ready`, `leaving`, or the `fatal` that explains an exit.

    A reader that is gone is not an error: the process then runs on unobserved (or dies with its parent).
    """

    def __init__(self, fd: int | None) -> None:
        self._fd = fd

    def phase(self, phase: str, state: PhaseState, fraction: float | None = None, detail: str = "") -> None:
        self._write(
            {
                "kind": "phase",
                "phase": phase,
                "state": state,
                "fraction": fraction,
                "detail": detail,
                "at": time.monotonic(),
            }
        )

    def ready(self, url: str, model: str, facts: dict[str, Any]) -> None:
        self._write({"kind": "ready", "url": url, "model": model, "facts": facts, "at": time.monotonic()})

    def leaving(self) -> None:
        """Say that the end that comes is no failure, though nobody here asked for it."""
        self._write({"kind": "leaving"})

    def fatal(self, phase: str, error_type: str, message: str, hint: str, exit_code: int) -> None:
        self._write(
            {
                "kind": "fatal",
                "phase": phase,
                "type": error_type,
                "message": message,
                "hint": hint,
                "exit_code": exit_code,
            }
        )

    def _write(self, record: dict[str, Any]) -> None:
        if self._fd is None:
            return
        line = json.dumps(record).encode() + b"\n"
        with contextlib.suppress(BrokenPipeError, OSError):
            os.write(self._fd, line)
