"""A driver's hold on a Ray cluster: connection, one placement group, actors on its bundles, and their ends.

Knows: Ray's API of the pinned release. Refuses to know: what runs in the actors. Everything that it makes belongs to
the driver's job: when this process dies, Ray ends the actors and gives the placement group back.

Ray is imported on first use: it takes half a second, and an engine on one node never pays it.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from engine.executor.base import ExecutorError
from engine.executor.ray_access import Doors, RayRefused, check_token
from engine.executor.ray_layout import (
    Layout,
    RayNode,
    Shortage,
    describe_shortages,
    find_shortages,
    needed_and_there,
)
from engine.executor.ray_view import describe_error
from engine.process import say

NAMESPACE = "hlaunch"
_POLL_SECONDS = 0.2
_PIECE_SECONDS = 1.0
_CONNECT_SECONDS = 3.0
_LOOK_SECONDS = 60.0
"""An actor's first answer includes the start of its process, perhaps on a cold disk."""


class NoRoom(ExecutorError):
    """The cluster lacks what the ranks need. `does_not_fit`: waiting and starting again would not help."""

    def __init__(self, words: str, *, can_come: bool) -> None:
        self.message = f"the Ray cluster cannot hold the ranks: {words}"
        super().__init__(self.message)
        self.does_not_fit = not can_come
        self.hint = "" if can_come else "give Ray there what the node has (cpus, gpus), or place fewer ranks on it"


class RayCluster:
    """One connection of this process, which can have only one at a time. `close` gives everything back."""

    def __init__(self, address: str, own_address: str, layout: Layout | None = None) -> None:
        """Connect to the cluster at `address` ("": that of RAY_ADDRESS), through the raylet at `own_address`.

        A `layout` for which its nodes are too small is refused before anything else is done there.
        Raises: RayRefused, NoRoom, ExecutorError.
        """
        check_token(os.environ)
        address = address or os.environ.get("RAY_ADDRESS", "")
        if address in ("", "auto"):
            raise RayRefused("nothing says where Ray's head is", "set RAY_ADDRESS=HOST:PORT, or nodes.ray_address")
        _check_listening(address)
        doors = Doors(address, os.environ)
        # What an actor prints comes with names and numbers of ranks: lines that differ only there must all be seen.
        os.environ.setdefault("RAY_DEDUP_LOGS", "0")
        try:
            self._ray = importlib.import_module("ray")
        except BaseException:
            doors.close()
            raise
        self._group: Any = None
        self._actors: list[Any] = []
        nodes = doors.check(own_address)
        if layout is not None:
            _refuse_what_cannot_come(find_shortages(layout, nodes), layout, nodes)
        _connect(self._ray, address, own_address)

    def nodes(self) -> list[RayNode]:
        """List all nodes, dead ones too, with what they have and what of it is free."""
        # Ray has no public question for what is free on each node.
        state: Any = importlib.import_module("ray._private.state")
        free: dict[str, Any] = state.available_resources_per_node()
        return [
            RayNode(
                id=node["NodeID"],
                address=node["NodeManagerAddress"],
                is_alive=bool(node["Alive"]),
                total=dict(node["Resources"]),
                available=dict(free.get(node["NodeID"], {})),
            )
            for node in self._ray.nodes()
        ]

    def await_resources(self, layout: Layout, deadline: float, tell: Callable[[str], None]) -> None:
        """Wait until everything is there, telling each time what is not; at once give up on what cannot come.

        `deadline` counts as `time.monotonic`. Raises: ExecutorError with what is missing on which node.
        """
        told = ""
        while True:
            nodes = self.nodes()
            missing = find_shortages(layout, nodes)
            if not missing:
                return
            words = describe_shortages(missing)
            if words != told:
                told = words
                tell(f"waiting for {words}")
            _refuse_what_cannot_come(missing, layout, nodes)
            if time.monotonic() > deadline:
                say(needed_and_there(layout, nodes))
                raise NoRoom(words, can_come=True)
            time.sleep(_POLL_SECONDS)

    def place(self, layout: Layout, name: str, deadline: float) -> None:
        """Take the bundles, each on its node. Raises: ExecutorError at the deadline."""
        from ray.util.placement_group import placement_group, placement_group_table

        self._group = placement_group(
            [bundle.resources for bundle in layout.bundles], strategy=layout.strategy, name=name
        )
        while not self._group.wait(_PIECE_SECONDS):  # in pieces, as in `answers`
            if time.monotonic() < deadline:
                continue
            nodes = self.nodes()
            say(needed_and_there(layout, nodes))
            missing = describe_shortages(find_shortages(layout, nodes))
            where = ", ".join(bundle.address or bundle.node for bundle in layout.bundles)
            hung = f"everything seems to be there, so the raylet of one of {where} does not answer"
            raise ExecutorError(f"Ray has not placed the ranks in time: {missing or hung}")
        placed = placement_group_table(self._group)["bundles_to_node_id"]
        addresses = {node.id: node.address for node in self.nodes()}
        for number, bundle in enumerate(layout.bundles):
            found = addresses.get(placed[number], "")
            if bundle.address and found != bundle.address:
                raise ExecutorError(f"Ray placed {bundle.node} on {found or 'a lost node'}, not on {bundle.address}")

    def start_actor(self, actor_class: type[Any], layout: Layout, node: str) -> Any:
        """Start an actor on a node's bundle and return its handle; it never restarts by itself.

        Ranks keep state that all of them share, so none comes back alone: who runs the engine starts all anew.
        """
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        index = layout.index(node)
        num_gpus = layout.bundles[index].num_gpus
        options: dict[str, Any] = {"num_cpus": 0, "max_restarts": 0, "max_task_retries": 0}
        if num_gpus:
            # Ranks count GPUs as the node does, so Ray must not renumber them.
            noset = {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}
            options |= {"num_gpus": num_gpus, "runtime_env": {"env_vars": noset}}
        strategy = PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=index)
        actor = self._ray.remote(actor_class).options(scheduling_strategy=strategy, **options).remote()
        self._actors.append(actor)
        return actor

    def answers(self, references: dict[str, Any], seconds: float = _LOOK_SECONDS) -> dict[str, Any]:
        """Wait for one answer of each node. Raises: ExecutorError naming the node that did not come, with why."""
        came = {}
        for node, reference in references.items():
            deadline = time.monotonic() + seconds
            try:
                # In pieces: what a signal's handler raises is heard only when Ray's own code returns.
                while not self._ray.wait([reference], timeout=_PIECE_SECONDS)[0]:
                    if time.monotonic() >= deadline:
                        raise ExecutorError(f"node {node}: its Ray actor did not start within {seconds:g} s")
                came[node] = self._ray.get(reference)
            except self._ray.exceptions.RayError as error:
                raise ExecutorError(f"node {node}: {describe_actor_end(error)}") from None
        return came

    def watch(self, references: dict[str, Any], on_end: Callable[[str, str], None]) -> ActorWatch:
        """Have `on_end` told, from a thread, which node's call has ended and how: once for each."""
        return ActorWatch(self._ray, references, on_end)

    def end_actors(self) -> None:
        """Kill every actor. Idempotent."""
        for actor in self._actors:
            with contextlib.suppress(self._ray.exceptions.RayError, ValueError):
                self._ray.kill(actor, no_restart=True)
        self._actors.clear()

    def close(self) -> None:
        """End the actors, give the placement group back, and disconnect. Idempotent."""
        ray = self._ray
        if not ray.is_initialized():
            return
        self.end_actors()
        if self._group is not None:
            from ray.util.placement_group import remove_placement_group

            with contextlib.suppress(ray.exceptions.RayError, ValueError):
                remove_placement_group(self._group)
            self._group = None
        with _own_sigterm():
            ray.shutdown()


class ActorWatch:
    """Waits for calls that should not end, in a thread of its own, until `stop`."""

    def __init__(self, ray: Any, references: dict[str, Any], on_end: Callable[[str, str], None]) -> None:
        self._ray = ray
        self._by_reference = {reference: node for node, reference in references.items()}
        self._on_end = on_end
        self._is_stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="ray actors", daemon=True)
        self._thread.start()

    def stop(self, grace_seconds: float = 0.0) -> None:
        """Stop telling; wait up to `grace_seconds` for calls that are about to end by themselves."""
        self._on_end = lambda *_: None
        self._thread.join(grace_seconds)
        self._is_stopped.set()
        self._thread.join(2.0)

    def _run(self) -> None:
        waiting = list(self._by_reference)
        while waiting and not self._is_stopped.is_set():
            try:
                done, waiting = self._ray.wait(waiting, num_returns=1, timeout=_POLL_SECONDS)
            except (self._ray.exceptions.RayError, RuntimeError, ValueError):
                return  # disconnected
            for reference in done:
                self._on_end(self._by_reference[reference], self._how(reference))

    def _how(self, reference: Any) -> str:
        try:
            status = self._ray.get(reference, timeout=0)
        except self._ray.exceptions.RayError as error:
            return describe_actor_end(error)
        return f"its node host ended with status {status}"


def describe_actor_end(error: BaseException) -> str:
    """Say in one line what became of an actor, by what Ray raised for a call of it."""
    text = " ".join(str(error).split())
    if "node has died" in text or "died because its node" in text or type(error).__name__ == "NodeDiedError":
        reason = _after(text, "Death reason:", "Reason:", "node death:") or "it no longer answers"
        return f"Ray lost the node: {reason}"
    if type(error).__name__ in ("ActorDiedError", "ActorUnavailableError", "RayActorError"):
        detail = _after(text, "Worker exit detail:", "cause:", "creation task,")
        return f"its Ray actor died: {detail or text[:200]}"
    cause = getattr(error, "cause", None)
    if cause is not None:
        return f"its Ray actor failed: {type(cause).__name__}: {' '.join(str(cause).split())[:200]}"
    return f"{type(error).__name__}: {text[:200]}"


def _after(text: str, *marks: str) -> str:
    """The first sentence behind the first mark that is there."""
    for mark in marks:
        _, found, rest = text.partition(mark)
        if found:
            return rest.strip().split(". ")[0][:200].rstrip(".")
    return ""


def _refuse_what_cannot_come(missing: Sequence[Shortage], layout: Layout, nodes: Sequence[RayNode]) -> None:
    """Give up on what no waiting brings. Raises: NoRoom with everything that is missing."""
    if not all(item.can_come for item in missing):
        say(needed_and_there(layout, nodes))
        raise NoRoom(describe_shortages(missing), can_come=False)


def _connect(ray: Any, address: str, own_address: str) -> None:
    if ray.is_initialized():
        raise ExecutorError("this process is connected to a Ray cluster already")
    try:
        with _own_sigterm():
            ray.init(
                address=address,
                namespace=NAMESPACE,
                _node_ip_address=own_address,
                logging_level="ERROR",
                configure_logging=False,
            )
    except (ray.exceptions.RayError, ConnectionError, RuntimeError, ValueError, AssertionError) as error:
        said = describe_error(type(error).__name__, str(error))
        raise ExecutorError(f"Ray at {address} cannot be reached from {own_address}: {said['message']}") from None


def _check_listening(address: str) -> None:
    """Ray itself tries for minutes where nobody listens. Raises: ExecutorError."""
    host, _, port = address.rpartition(":")
    if not port.isdigit():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), _CONNECT_SECONDS).close()
    except OSError as error:
        reason = error.strerror or str(error)
        raise ExecutorError(f"Ray at {address} cannot be reached: {reason}: is its head up?") from None


@contextlib.contextmanager
def _own_sigterm() -> Iterator[None]:
    """Keep SIGTERM's meaning: Ray would have it end this process, whose parent decides that."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
