"""The engine as a child: started with a status pipe, in a session of its own, ended without remains.

Knows: spawning, signals, exit causes. Refuses to know: what the records on the pipe mean and when to stop.

Why a session: a terminal's Ctrl-C must reach the launcher alone, and every descendant must be findable at the end.
Why the status pipe's read end stays open here: the engine takes its closing as our death. The engine asks the kernel to
die with its parent *thread*, so `start` belongs on the main thread.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence

from launcher.errors import EngineFailed
from launcher.supervise import procfs
from launcher.supervise.procfs import ProcessIdentity


class EngineProcess:
    """A running engine. `status_fd` and `output_fd` are non-blocking read ends, owned by this object."""

    def __init__(
        self, process: subprocess.Popen[bytes], identity: ProcessIdentity, status_fd: int, output_fd: int
    ) -> None:
        self._process = process
        self._oom_kills_before = procfs.oom_kills()
        self._cgroup_oom_kills_before = procfs.cgroup_oom_kills()
        self.identity = identity
        self.status_fd = status_fd
        self.output_fd = output_fd

    @classmethod
    def start(
        cls, argv: Sequence[str], environment: Mapping[str, str], working_folder: str, *, what: str = "engine"
    ) -> EngineProcess:
        """Spawn the engine, or another child of which only the output is heard (`what` names it in messages).

        Raises: EngineFailed when the program cannot be executed.
        """
        status_read, status_write = os.pipe()
        output_read, output_write = os.pipe()
        try:
            process = subprocess.Popen(
                [*argv, "--status-fd", str(status_write)] if what == "engine" else list(argv),
                stdin=subprocess.DEVNULL,
                stdout=output_write,
                stderr=output_write,
                env=dict(environment),
                cwd=working_folder,
                pass_fds=(status_write,) if what == "engine" else (),
                start_new_session=True,
            )
        except OSError as error:
            os.close(status_read)
            os.close(output_read)
            raise EngineFailed(f"the {what} cannot be started: {argv[0]}: {error.strerror}") from error
        finally:
            os.close(status_write)
            os.close(output_write)
        for fd in (status_read, output_read):
            os.set_blocking(fd, False)
        identity = ProcessIdentity.of(process.pid)
        if identity is None:  # Only a reaped child is absent, and nobody has reaped it yet.
            identity = ProcessIdentity(process.pid, 0, procfs.boot_id())
        return cls(process, identity, status_read, output_read)

    @property
    def pid(self) -> int:
        return self._process.pid

    def poll(self) -> int | None:
        """Return the exit status as `subprocess` gives it, None while it runs. Reaps."""
        return self._process.poll()

    def send(self, sig: signal.Signals) -> None:
        """Signal the engine's main process; its own children are its business."""
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(sig)

    def send_all(self, sig: signal.Signals) -> None:
        """Signal every process of the engine's session."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, sig)

    def kill_all(self) -> None:
        """Kill the engine and whatever it started, also what moved to another process group. Reaps the engine."""
        self.send_all(signal.SIGKILL)
        procfs.kill_session(self.identity)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=5)

    def close(self) -> None:
        """Close the pipes."""
        os.close(self.status_fd)
        os.close(self.output_fd)

    def describe_exit(self, status: int) -> str:
        """Say how it ended: `exited with status 3`, `was killed by SIGKILL (out of memory)`."""
        if status >= 0:
            return f"exited with status {status}"
        try:
            name = signal.Signals(-status).name
        except ValueError:
            name = f"signal {-status}"
        if status == -signal.SIGKILL:
            if procfs.cgroup_oom_kills() > self._cgroup_oom_kills_before:
                return "was killed by the kernel: out of memory in its container (SIGKILL)"
            if procfs.oom_kills() > self._oom_kills_before:
                return "was killed by the kernel: out of memory (SIGKILL)"
        return f"was killed by {name}"
