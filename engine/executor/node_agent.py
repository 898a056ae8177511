"""A node beside the head's: `python -m engine.executor.node_agent --config engine.json [--status-fd N]`.

It joins the head, runs a node host for each engine that orders one, and comes back when the head is lost, until a
deadline; it ends when the head says so, or on a signal. Refuses to know: ranks, plans, HTTP. Its configuration is this
node's own: of it the model's folder, the number of threads and the nodes count, the rest is the head's.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from engine.comm.board import PHASES
from engine.comm.node_messages import (
    Ended,
    Hello,
    NodeFacts,
    NodeKind,
    Order,
    Refusal,
    Welcome,
    decode,
    encode,
    own_facts,
)
from engine.comm.secure_link import LinkLost, LinkRefused, NodeLinkError, SecureLink, connect
from engine.config import ConfigError, EngineConfig, resolve_model_folder
from engine.executor.multiproc_watch import describe_end
from engine.executor.node_host import HostTask
from engine.model_digest import digest_of
from engine.node_secret import SECRET_FILE_VARIABLE, SecretError, read_secret
from engine.process import StatusPipe, dump_stacks_on_signal, follow_parent, say, say_trace

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_REGISTRY_INVALID = 3
EXIT_PREFLIGHT = 5
EXIT_NOT_READY = 8
HOST_COMMAND = (sys.executable, "-m", "engine.executor.node_host")
RETRY_SECONDS = 1.0
HOST_GRACE_SECONDS = 8.0
"""What a host whose engine has ended gets to end its ranks before it is killed; it gives them five."""
_TICK_SECONDS = 0.2


class _Leaving(BaseException):
    """A signal came while the head was being reached."""


class NodeEnd(Exception):
    """The one cause of this node's end."""

    def __init__(self, phase: str, message: str, hint: str = "", exit_code: int = EXIT_FAILED) -> None:
        super().__init__(message)
        self.phase = phase
        self.message = message
        self.hint = hint
        self.exit_code = exit_code


@dataclass(slots=True)
class _Host:
    """A node host that runs here. `phase` is that of its slowest rank."""

    order: Order
    process: subprocess.Popen[bytes]
    status_fd: int
    phase: str = "spawn"
    unread: bytearray = field(default_factory=bytearray)
    kill_at: float | None = None


class NodeAgent:
    """One node's part in somebody else's engines. `run` blocks until it is over."""

    def __init__(self, config: EngineConfig, secret: bytes, status: StatusPipe, facts: NodeFacts) -> None:
        self._config = config
        self._nodes = config.nodes
        self._name = config.nodes.names[config.nodes.rank]
        self._secret = secret
        self._status = status
        self._facts = facts
        self._hosts: dict[int, _Host] = {}
        self._engines: tuple[int, ...] = ()
        self._model = ""
        self._is_ready = False
        self._phase = ""
        self._is_leaving = False
        self._is_joining = False

    def leave(self) -> None:
        """End soon, from a signal's handler: a head that does not answer is waited for no longer."""
        self._is_leaving = True
        if self._is_joining:
            raise _Leaving

    def run(self) -> None:
        """Join, serve, join again. Raises: NodeEnd unless the head ended it, or a signal did."""
        head = f"{self._nodes.head_host}:{self._nodes.head_port}"
        deadline = time.monotonic() + self._nodes.join_timeout_seconds
        self._enter("join", f"{self._name}, head {head}")
        try:
            while not self._is_leaving:
                try:
                    link = self._join()
                except _Leaving:
                    return
                except LinkRefused as error:
                    raise _refused(error, head) from error
                except LinkLost as error:
                    if time.monotonic() > deadline:
                        seconds = self._nodes.join_timeout_seconds
                        raise NodeEnd(
                            "join",
                            f"the head did not take this node in within {seconds:g} s: {error}",
                            f"is `hlaunch up … --node-rank 0 --head-addr {head}` running, and the port open?",
                            EXIT_NOT_READY,
                        ) from error
                    self._status.phase("join", "progress", None, str(error))
                    self._pause(RETRY_SECONDS)
                    continue
                joined = time.monotonic()
                try:
                    if self._serve(link):
                        return
                finally:
                    self._end_hosts()
                    link.dispose()
                if time.monotonic() - joined < RETRY_SECONDS:
                    self._pause(RETRY_SECONDS)  # whatever ends it at once would do so again
                deadline = time.monotonic() + self._nodes.join_timeout_seconds
                self._enter("join", f"{self._name}, head {head}, again")
        finally:
            self._end_hosts()

    def _join(self) -> SecureLink:
        self._is_joining = True
        try:
            return self._come_in()
        finally:
            self._is_joining = False

    def _come_in(self) -> SecureLink:
        nodes = self._nodes
        link = connect(nodes.head_host, nodes.head_port, self._secret, bind=self._own_address)
        try:
            link.allow_silence(nodes.silence_seconds)
            link.start_heartbeat()
            link.send(NodeKind.HELLO, encode(Hello(self._name, "", self._facts)))
            frame = link.receive(nodes.silence_seconds)
            if frame is None:
                raise LinkLost("the head says nothing")
            kind, body = frame
            if kind == NodeKind.REFUSED:
                refusal = decode(body, Refusal)
                if refusal.is_final:
                    raise _HeadRefuses(refusal)
                raise LinkLost(f"the head does not take this node: {refusal.message}")
            if kind != NodeKind.WELCOME:
                raise LinkLost(f"the head answers with a message of kind {kind}")
            welcome = decode(body, Welcome)
        except BaseException:
            link.dispose()
            raise
        self._engines, self._model = welcome.engines, welcome.model
        what = f"engine{'s' * (len(self._engines) != 1)} {', '.join(map(str, self._engines))}"
        self._enter("wait", f"for {what} of {self._model}", ended=f"from {link.address}, head {link.peer}")
        return link

    @property
    def _own_address(self) -> str:
        """This node's declared address, if it has one: where it comes from, and what its ranks bind."""
        addresses = self._nodes.addresses
        return addresses[self._nodes.rank] if len(addresses) > self._nodes.rank else ""

    def _serve(self, link: SecureLink) -> bool:
        """Do what the head orders until the link ends. Returns whether it is over for good."""
        while True:
            if self._is_leaving:
                with contextlib.suppress(NodeLinkError):
                    link.send(NodeKind.GOODBYE)
                return True
            try:
                frame = link.receive(_TICK_SECONDS)
                self._look_after(link)
                if frame is not None and self._obey(link, *frame):
                    return True
            except NodeLinkError as error:
                _say(f"lost the head: {error}; this node's ranks end")
                return False

    def _obey(self, link: SecureLink, kind: int, body: bytes) -> bool:
        """Do what the head says; whether it is over for good. Raises: NodeLinkError, also for what no head says."""
        if kind == NodeKind.ORDER:
            self._start_host(link, decode(body, Order))
        elif kind == NodeKind.CANCEL:
            self._cancel(decode(body, Order))
        elif kind == NodeKind.GOODBYE:
            _say("the head has ended")
            self._status.leaving()
            return True
        return False

    # Hosts.

    def _start_host(self, link: SecureLink, order: Order) -> None:
        if (old := self._hosts.pop(order.engine, None)) is not None:
            # It may be stopped or hang, and its memory is needed.
            _end(old)
        read_end, write_end = os.pipe()
        os.set_blocking(read_end, False)
        task = HostTask(
            host=self._nodes.head_host,
            port=self._nodes.head_port,
            secret=self._secret,
            node=self._name,
            order_id=order.order_id,
            model=self._config.model,
            address=self._own_address,
            cpu_threads=self._config.cpu_threads,
            load_format=self._config.load_format,
        )
        try:
            process = subprocess.Popen(
                [*HOST_COMMAND, "--status-fd", str(write_end)], stdin=subprocess.PIPE, pass_fds=(write_end,)
            )
        except OSError as error:  # no process, no memory: the head's engine waits for this host
            os.close(read_end)
            how = f"its node host cannot be started: {error.strerror}"
            _say(f"engine {order.engine}: {how}")
            return link.send(NodeKind.ENDED, encode(Ended(order.order_id, how)))
        finally:
            os.close(write_end)
        with contextlib.suppress(BrokenPipeError):
            assert process.stdin is not None
            process.stdin.write(msgspec.json.encode(task))
            process.stdin.close()
        self._hosts[order.engine] = _Host(order, process, read_end)
        _say(f"engine {order.engine} starts its ranks here")
        return None

    def _cancel(self, order: Order) -> None:
        host = self._hosts.get(order.engine)
        if host is not None and host.order.order_id == order.order_id and host.kill_at is None:
            host.kill_at = time.monotonic() + HOST_GRACE_SECONDS

    def _look_after(self, link: SecureLink) -> None:
        """Notice hosts that ended, hear how far the others are."""
        for engine, host in list(self._hosts.items()):
            code = host.process.poll()
            _hear(host)
            if code is None:
                if host.kill_at is not None and time.monotonic() > host.kill_at:
                    host.process.kill()
                continue
            del self._hosts[engine]
            os.close(host.status_fd)
            _say(f"engine {engine}: its node host here {describe_end(code)}")
            if host.kill_at is None and code:
                how = f"its node host {describe_end(code)}"
                link.send(NodeKind.ENDED, encode(Ended(host.order.order_id, how)))
        self._tell_phase()

    def _tell_phase(self) -> None:
        """Report what the slowest engine's ranks here do; ready once all serve."""
        if not self._hosts or len(self._hosts) < len(self._engines):
            if self._phase not in ("join", "wait"):
                self._enter("wait", "for the head's engine to be started again")
            return
        slowest = min((host.phase for host in self._hosts.values()), key=PHASES.index)
        if slowest == self._phase:
            return
        self._enter(slowest)
        if slowest == "serve":
            _say(f"serves {self._model} for {self._nodes.head_host}")
            if not self._is_ready:
                self._is_ready = True
                self._status.ready("", self._model, {"node": self._name, "engines": len(self._engines)})

    def _end_hosts(self) -> None:
        for host in self._hosts.values():
            _end(host)
        self._hosts.clear()

    def _enter(self, phase: str, detail: str = "", *, ended: str = "") -> None:
        if self._phase:
            self._status.phase(self._phase, "end", None, ended)
        self._phase = phase
        self._status.phase(phase, "begin", None, detail)

    def _pause(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while not self._is_leaving and time.monotonic() < until:
            time.sleep(min(_TICK_SECONDS, seconds))


class _HeadRefuses(LinkRefused):
    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.message)
        self.hint = refusal.hint


def _refused(error: LinkRefused, head: str) -> NodeEnd:
    if isinstance(error, _HeadRefuses):
        return NodeEnd("join", f"the head does not take this node: {error}", error.hint, EXIT_PREFLIGHT)
    hint = f"the same {SECRET_FILE_VARIABLE} (its content) on all nodes, and --head-addr {head} must be the head's"
    return NodeEnd("join", str(error), hint, EXIT_PREFLIGHT)


def _hear(host: _Host) -> None:
    """Take in what a host says of its phases."""
    with contextlib.suppress(BlockingIOError):
        while piece := os.read(host.status_fd, 1 << 16):
            host.unread += piece
    *lines, rest = host.unread.split(b"\n")
    host.unread = rest
    for line in lines:
        with contextlib.suppress(ValueError, AttributeError):
            phase = json.loads(line).get("phase")
            if phase in PHASES:
                host.phase = phase


def _end(host: _Host) -> None:
    """Kill a host; its ranks die with it."""
    host.process.kill()
    host.process.wait()
    os.close(host.status_fd)


def _say(line: str) -> None:
    say(f"node: {line}")


def main(argv: Sequence[str] | None = None) -> int:
    """Be a node until it is over; returns the exit code."""
    parser = argparse.ArgumentParser(prog="engine.executor.node_agent", description="Run ranks for another node.")
    parser.add_argument("--config", type=Path, required=True, help="engine.json")
    parser.add_argument("--status-fd", type=int, default=None, help="where phases are reported, one JSON line each")
    arguments = parser.parse_args(argv)
    if arguments.status_fd is not None:
        follow_parent(arguments.status_fd)
    dump_stacks_on_signal()
    status = StatusPipe(arguments.status_fd)
    try:
        agent = _make(arguments.config, status)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: agent.leave())
        agent.run()
    except NodeEnd as end:
        status.fatal(end.phase, type(end).__name__, end.message, end.hint, end.exit_code)
        say(f"error: {end.message}" + (f"\nhint: {end.hint}" if end.hint else ""))
        return end.exit_code
    return EXIT_OK


def _make(path: Path, status: StatusPipe) -> NodeAgent:
    try:
        config = EngineConfig.read(path)
    except ConfigError as error:
        raise NodeEnd("config", str(error), error.hint, EXIT_REGISTRY_INVALID) from error
    if not config.has_other_nodes or config.nodes.rank == 0:
        raise NodeEnd("config", "this configuration is not that of a node beside the head", "", EXIT_REGISTRY_INVALID)
    if resolve_model_folder(config.model) is None:
        raise NodeEnd("config", f"{config.model!r} is not on this node", "every node reads the model itself")
    try:
        secret = read_secret(os.environ)
    except SecretError as error:
        raise NodeEnd("config", str(error), error.hint, EXIT_PREFLIGHT) from error
    return NodeAgent(config, secret, status, own_facts(digest_of(config.model, config.load_format)))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except Exception as error:  # noqa: BLE001 - the process border: the launcher names the exit, the log holds the trace
        say_trace(error)
        sys.exit(EXIT_FAILED)
