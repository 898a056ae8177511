"""One loop that keeps one node of a cluster: Ray, on the head also the engine, from the first wait to the last kill.

Knows: the order (head reachable -> Ray -> all nodes -> engine -> ready), the deadlines, and that the engine drains
before Ray goes. Refuses to know: compose, ssh, terminals, Ray's and the engine's insides.

Single-threaded: pipes, signals, child exits and the control socket arrive at one `select`. When a child ends that was
not asked to, the node ends with that cause and a non-zero status, so that whoever restarts nodes sees it. Ranks on
other nodes are the business of the engine's executor; this loop only keeps Ray under them.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import shutil
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import cast

import engine
from launcher.errors import HlaunchError
from launcher.exit_codes import ExitCode
from launcher.supervise import procfs
from launcher.supervise.cluster_view import ViewProcess
from launcher.supervise.control import ControlServer
from launcher.supervise.engine_process import EngineProcess
from launcher.supervise.membership import Membership
from launcher.supervise.node_child import NodeChild
from launcher.supervise.node_engine import EngineStory
from launcher.supervise.node_fabric import look, shown_environment
from launcher.supervise.node_report import NodeReport
from launcher.supervise.node_spec import NodeSpec
from launcher.supervise.ray_process import ray_argv, ray_cause, ray_environment
from launcher.supervise.remains import record_shared_memory
from launcher.supervise.supervisor import STOP_SIGNALS, signal_wakeups

TICK_SECONDS = 0.5
RAY_START_SECONDS = 90.0
ENGINE_GRACE_SECONDS = 5.0
"""What the engine gets beyond its drain timeout."""
RAY_GRACE_SECONDS = 4.0
SHARED_LOOK_SECONDS = 60.0
"""How often what the node's processes hold in /dev/shm is noted; it hardly changes but when an engine starts."""
LOST_SECONDS = 20.0
"""How long our own node may be missing from the cluster before we call it lost."""
NUM_LAST_LINES = 400
"""Ray names what died first, then prints the tails of its logs."""


class _Failure(Exception):
    """The one cause of this node's end."""

    def __init__(self, cause: str, hint: str = "", exit_code: int = ExitCode.ENGINE_FAILED) -> None:
        super().__init__(cause)
        self.cause, self.hint, self.exit_code = cause, hint, exit_code


class NodeSupervisor:
    """Runs one node to its end. `run` blocks and belongs on the main thread. `say` takes one line for the log."""

    def __init__(
        self, spec: NodeSpec, environ: Mapping[str, str], engine_config: Path | None, say: Callable[[str], None]
    ) -> None:
        self._spec = spec
        self._environ = ray_environment(spec, environ) if spec.ray is not None else dict(environ)
        self._engine_config = engine_config
        self._say = say
        self._folder = Path(spec.run_folder)
        self._working_folder = str(Path(engine.__file__).parent.parent)
        self.report = NodeReport(spec)
        self._selector = selectors.DefaultSelector()
        self._view: ViewProcess | None = None
        self._members = Membership(spec.peers, spec.ip, self._tell)
        self._ray: NodeChild | None = None
        self._engine: NodeChild | None = None
        self._ray_lines: deque[str] = deque(maxlen=NUM_LAST_LINES)
        self._story = EngineStory(self.report, self._tell)
        self._num_signals = 0
        self._next_look = 0.0
        self._stage = self._await_head if spec.ray is not None and not spec.is_head else self._start_ray
        self._deadline = time.monotonic() + spec.join_timeout_seconds

    def run(self) -> int:
        """Start everything, stay, end everything; return the exit code. The cause is in `report`."""
        self._control = ControlServer(self._folder, self.report.to_data)
        self.report.read_previous(self._folder)
        if (own := procfs.ProcessIdentity.of(os.getpid())) is not None:
            self.report.processes["node"] = own
        self._control.attach(self._selector)
        try:
            with signal_wakeups() as wakeups:
                self._selector.register(wakeups, selectors.EVENT_READ)
                try:
                    self._prepare()
                    self._loop(wakeups)
                except _Failure as failure:
                    self._fail(failure.cause, failure.hint, failure.exit_code)
                except HlaunchError as error:
                    self._fail(error.message, error.hint, error.exit_code)
                finally:
                    self._end(wakeups)
        finally:
            self.report.write_end(self._folder)
            self._control.publish()
            self._control.close()
            self._selector.close()
        return self.report.exit_code or ExitCode.OK

    # Start.

    def _prepare(self) -> None:
        spec = self._spec
        self._look()
        if spec.ray is None:
            return
        # A session of an earlier run holds nothing that lives; Ray would only pile the next one beside it.
        shutil.rmtree(spec.ray_folder, ignore_errors=True)
        token = Path(spec.token_file)
        try:
            if not token.read_text(encoding="utf-8").strip():
                raise _Failure(f"the Ray token {token} is empty", "hlaunch up makes it", ExitCode.PREFLIGHT)
        except OSError as error:
            raise _Failure(
                f"the Ray token {token} cannot be read: {error.strerror}",
                "mode 0600, owned by the user that this node runs as (HLAUNCH_UID)",
                ExitCode.PREFLIGHT,
            ) from error
        self._view = ViewProcess(spec, self._environ, self._working_folder)
        self._selector.register(self._view.fd, selectors.EVENT_READ)
        if not spec.is_head:
            self.report.begin("head", f"waiting for {spec.head.name} at {spec.head_address}")

    def _look(self) -> None:
        """Fill in what only this host knows of its fabric; one that is not here ends the node before a hang can."""
        spec = self._spec
        if spec.fabric is None:
            return
        own = look(spec.fabric.cluster(spec.cluster, spec.node, spec.role, spec.ip, spec.gpus), self._environ)
        self._environ |= own.environment
        self.report.versions = {**own.versions, "model": spec.model_digest(self._environ)}
        self.report.environment = shown_environment(self._environ)
        for line in own.said:
            self._say(f"node: {line}")

    def _await_head(self) -> None:
        """Workers: no Ray before the head answers and takes our token."""
        view = self._members.view
        if view.error == "refused":
            raise _Failure(view.message, "copy the head's ray_token here; all nodes share one", ExitCode.PREFLIGHT)
        if not view.error and view.is_alive(self._spec.head.ip):
            self.report.end("head", f"{self._spec.head.name} at {self._spec.head_address}")
            self._stage = self._start_ray
            self._start_ray()
        elif time.monotonic() > self._deadline:
            raise _Failure(
                f"the head {self._spec.head.name} ({self._spec.head_address}) did not answer within "
                f"{self._spec.join_timeout_seconds:g} s: {view.message or 'it has not joined its own cluster'}",
                "is it up, and does a firewall let the port through? hlaunch doctor",
                ExitCode.NOT_READY,
            )

    def _start_ray(self) -> None:
        spec = self._spec
        if spec.ray is None:
            self._start_engine()
            return
        self.report.begin("ray", "starting")
        self._members.begin_to_join()
        process = EngineProcess.start(ray_argv(spec), self._environ, self._working_folder, what="Ray")
        self.report.processes["ray"] = process.identity
        self._ray = NodeChild(process, self._selector, {process.output_fd: self._on_ray_line})
        self._deadline = time.monotonic() + RAY_START_SECONDS
        self._stage = self._await_ray
        self._say(f"node: {' '.join(ray_argv(spec))}")

    def _await_ray(self) -> None:
        spec = self._spec
        if self._members.has_joined:
            self.report.end("ray", f"{spec.ip} joined")
            if spec.is_head:
                self.report.begin("nodes")
                self._deadline = time.monotonic() + spec.join_timeout_seconds
                self._stage = self._await_nodes
                self._await_nodes()
            else:
                self._serve()
        elif time.monotonic() > self._deadline:
            raise _Failure(
                f"Ray did not bring {spec.ip} into the cluster within {RAY_START_SECONDS:g} s: "
                f"{self._members.view.message or 'no word from it'}",
                "see the ray lines of the log",
                ExitCode.NOT_READY,
            )

    def _await_nodes(self) -> None:
        """Head: every declared node is alive under its address, with the GPUs it was declared with."""
        spec, members = self._spec, self._members
        num_here, num_nodes = members.num_here, len(spec.peers)
        if members.is_complete:
            self.report.end("nodes", f"{num_here} of {num_nodes}")
            self._start_engine()
            return
        awaited = members.awaited()
        self.report.progress("nodes", num_here / num_nodes, f"{num_here} of {num_nodes}; waiting: {awaited}")
        if time.monotonic() > self._deadline:
            strangers = members.view.strangers(spec.peers)
            raise _Failure(
                f"{num_here} of {num_nodes} nodes joined within {spec.join_timeout_seconds:g} s; not there: "
                + "; ".join([awaited, *members.reasons()]),
                f"undeclared nodes are there: {', '.join(strangers)}; wrong ip?" if strangers else "hlaunch logs NAME",
                ExitCode.NOT_READY,
            )

    def _start_engine(self) -> None:
        if not self._spec.is_head or self._engine_config is None:
            self._serve()
            return
        argv = (sys.executable, "-m", "engine.server", "--config", str(self._engine_config))
        process = EngineProcess.start(argv, self._environ, self._working_folder)
        self.report.processes["engine"] = process.identity
        hears = {process.status_fd: self._on_engine_record, process.output_fd: self._on_engine_line}
        self._engine = NodeChild(process, self._selector, hears)
        self._deadline = time.monotonic() + self._spec.ready_timeout_seconds
        self._stage = self._await_engine

    def _await_engine(self) -> None:
        if time.monotonic() > self._deadline and self._engine is not None:
            self._engine.process.send_all(signal.SIGUSR1)
            time.sleep(0.5)
            raise _Failure(
                f"the engine was not ready after {self._spec.ready_timeout_seconds:g} s",
                "its stacks are in the log; a longer deadline: --set ready.timeout=30m",
                ExitCode.NOT_READY,
            )

    def _serve(self) -> None:
        self.report.mark_ready()
        self._stage = self._watch_cluster
        self._say("node: ready")

    def _watch_cluster(self) -> None:
        """Name who comes and goes; end only when this node itself is lost."""
        spec, members = self._spec, self._members
        has_view = spec.ray is not None and not members.view.error
        if spec.is_head:
            is_short = has_view and members.num_here < len(spec.peers)
            state = "degraded" if is_short else "ready"
            self.report.state = self._story.restarting_state if self._story.is_restarting else state
        if spec.ray is not None and time.monotonic() >= self._next_look and not self._story.is_restarting:
            record_shared_memory(self._folder)
            self._next_look = time.monotonic() + SHARED_LOOK_SECONDS
        if not has_view:
            return
        if members.seconds_lost(time.monotonic()) > LOST_SECONDS:
            words = members.view.last_words(spec.ip) or "it is no longer listed"
            raise _Failure(f"the cluster lost this node: {words}")

    # The loop.

    def _loop(self, wakeups: socket.socket) -> None:
        while self._num_signals == 0:
            self._step(wakeups, TICK_SECONDS)
            if self._num_signals:
                return
            self._check_children()
            self._stage()
            self._control.publish()

    def _step(self, wakeups: socket.socket, seconds: float) -> None:
        for key, mask in self._selector.select(seconds):
            if key.data is self._control:
                self._control.on_event(cast(socket.socket, key.fileobj), mask)
            elif key.fileobj is wakeups:
                numbers = wakeups.recv(4096)
                self._num_signals += sum(1 for number in numbers if number in STOP_SIGNALS)
            elif self._view is not None and key.fd == self._view.fd:
                self._read_view()
            elif isinstance(key.data, NodeChild):
                key.data.on_event(key.fd)

    def _read_view(self) -> None:
        assert self._view is not None
        views, is_there = self._view.read()
        for view in views:
            if self._members.take(view):
                self.report.nodes = self._members.to_data()
        if not is_there:
            self._selector.unregister(self._view.fd)
            self._view.close()
            self._view = None
            if self._num_signals == 0 and self.report.cause == "":
                raise _Failure("the Ray view ended", "is Ray installed here? pip install 'hlaunch[ray]'")

    def _tell(self, text: str) -> None:
        self.report.event(text)
        self._say(f"node: {text}")

    def _on_engine_record(self, line: bytes) -> None:
        was_restarting = self._story.is_restarting
        self._story.take(line)
        if was_restarting:
            self._next_look = 0.0
        if self._story.is_ready and self._stage == self._await_engine:
            self._serve()

    def _on_engine_line(self, line: bytes) -> None:
        self._say(f"engine: {line.decode('utf-8', errors='replace')}")

    def _on_ray_line(self, line: bytes) -> None:
        text = line.decode("utf-8", errors="replace")
        self._ray_lines.append(text)
        self._say(f"ray: {text}")

    def _check_children(self) -> None:
        """A child that is gone ends the node, with the child's own words where it left some."""
        if self._engine is not None and (status := self._engine.process.poll()) is not None:
            self._engine.drain()
            fatal = self._story.fatal
            if fatal is not None:
                raise _Failure(f"engine failed: {fatal.message}", fatal.hint, fatal.exit_code)
            raise _Failure(f"the engine {self._engine.process.describe_exit(status)}")
        deadline = self._story.fatal_deadline
        if deadline is not None and time.monotonic() > deadline and self._engine is not None:
            self._engine.process.send_all(signal.SIGKILL)
        if self._ray is not None and (status := self._ray.process.poll()) is not None:
            self._ray.drain()
            cause = ray_cause(self._ray_lines, self._ray.process.describe_exit(status))
            code = ExitCode.PREFLIGHT if cause.is_permanent else ExitCode.ENGINE_FAILED
            raise _Failure(cause.text, "the ray lines of the log say more", code)

    # The end.

    def _fail(self, cause: str, hint: str, exit_code: int) -> None:
        self.report.state, self.report.cause, self.report.hint = "failed", cause, hint
        self.report.exit_code = int(exit_code)
        self._control.publish()

    def _end(self, wakeups: socket.socket) -> None:
        """Engine first (it drains), then Ray, then whatever is left of either; a second signal shortens all of it."""
        if self.report.cause == "":
            self.report.state = "stopping"
            self._control.publish()
        was_asked = self.report.cause == ""
        drain = self._spec.drain_timeout_seconds if was_asked else 0.0
        if self._engine is not None:
            self._stop(self._engine, wakeups, drain + ENGINE_GRACE_SECONDS)
        if self._ray is not None:
            self._stop(self._ray, wakeups, RAY_GRACE_SECONDS)
        if self._view is not None:
            with contextlib.suppress(KeyError, ValueError):
                self._selector.unregister(self._view.fd)
            self._view.close()
            self._view = None
        if was_asked:
            self.report.state, self.report.exit_code = "stopped", int(ExitCode.OK)
            # After a failure Ray's own logs are the evidence, so they stay for one run.
            if self._spec.ray is not None:
                shutil.rmtree(self._spec.ray_folder, ignore_errors=True)

    def _stop(self, child: NodeChild, wakeups: socket.socket, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        began_with = self._num_signals
        if child.process.poll() is None:
            child.process.send(signal.SIGTERM)
        while child.process.poll() is None and time.monotonic() < deadline:
            with contextlib.suppress(_Failure):
                self._step(wakeups, min(0.1, TICK_SECONDS))
            if self._num_signals > max(began_with, 1):
                break
        child.end()
