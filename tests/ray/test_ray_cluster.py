"""A driver's hold on a real Ray cluster of two nodes: who may, what is missing, what is taken, what is given back."""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import replace

import msgspec
import pytest
from ray_nodes import ADDRESSES, ONE, ROOT, TWO, RayPair, ray_pair, wait_for

from engine.config import BUNDLED_MODELS, load_model_config
from engine.executor.base import ExecutorError
from engine.executor.ray_access import RayRefused
from engine.executor.ray_actor import ActorFacts, NodeHostActor
from engine.executor.ray_cluster import NoRoom, RayCluster
from engine.executor.ray_layout import Layout, lay_out
from engine.placement import Device, HostSpec, ParallelSizes, place

MODEL = load_model_config(BUNDLED_MODELS["tiny-oss"])


def two_nodes(backend: str = "cpu", *, per_node: int = 1, addresses: dict[str, str] | None = None) -> Layout:
    devices = tuple(Device(f"{backend}:{i}") for i in range(per_node))
    hosts = [HostSpec("one", devices), HostSpec("two", devices)]
    return lay_out(place(MODEL, ParallelSizes(tensor=2 * per_node), hosts), 0, addresses or ADDRESSES)


def free(cluster: RayCluster, name: str) -> dict[str, float]:
    return {node.address: node.available.get(name, 0) for node in cluster.nodes() if node.is_alive}


def connect_elsewhere(address: str) -> str:
    """Connect in a process of its own and return what it was refused with."""
    code = (
        "import sys\nfrom engine.executor.ray_cluster import RayCluster\n"
        "try:\n    RayCluster(sys.argv[1], '127.0.0.2').close()\n"
        "except Exception as error:\n    print(f'{type(error).__name__}: {error}')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, address], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    return done.stdout.strip() or done.stderr[-500:]


def test_what_is_missing_is_told_within_a_second(ray_environ: RayPair) -> None:
    cluster = RayCluster(ray_environ.address, ONE)
    try:
        layout = two_nodes()
        began = time.monotonic()
        cluster.await_resources(layout, began + 30, lambda _: pytest.fail("everything is there"))
        greedy = replace(layout, bundles=(layout.bundles[0], replace(layout.bundles[1], num_cpus=64, num_gpus=3)))
        with pytest.raises(NoRoom) as caught:
            cluster.await_resources(greedy, began + 30, lambda _: None)
        assert str(caught.value) == (
            f"the Ray cluster cannot hold the ranks: two: {TWO} has 2 CPUs, 64 are needed; "
            f"two: {TWO} has 2 GPUs, 3 are needed"
        )
        assert caught.value.does_not_fit, "it ends with the exit code of a launch that does not fit"
        elsewhere = two_nodes(addresses={"one": ONE, "two": "127.0.0.77"})
        told: list[str] = []
        with pytest.raises(ExecutorError, match=r"two: 127\.0\.0\.77 is not in the Ray cluster \(there: "):
            cluster.await_resources(elsewhere, time.monotonic() + 0.3, told.append)
        assert told == [f"waiting for two: 127.0.0.77 is not in the Ray cluster (there: {ONE}, {TWO})"]
        assert time.monotonic() - began < 1.5
    finally:
        cluster.close()


def test_a_placement_is_taken_where_it_says_and_given_back(ray_environ: RayPair) -> None:
    cluster = RayCluster(ray_environ.address, ONE)
    try:
        layout = two_nodes("cuda", per_node=2)
        deadline = time.monotonic() + 20
        cluster.place(layout, "test", deadline)
        wait_for(lambda: free(cluster, "GPU") == {ONE: 0, TWO: 0}, 5)
        said = cluster.answers({"two": cluster.start_actor(NodeHostActor, layout, "two").look.remote()})
        facts = msgspec.msgpack.decode(said["two"], type=ActorFacts)
        assert (facts.address, facts.gpus, facts.niceness) == (TWO, (0, 1), 0)
        with pytest.raises(ExecutorError, match=f"one: {ONE}: 0 of 2 GPUs are free, 2 are needed"):
            cluster.await_resources(layout, time.monotonic(), lambda _: None)
    finally:
        cluster.close()
    again = RayCluster(ray_environ.address, ONE)
    try:
        again.await_resources(layout, time.monotonic() + 10, lambda _: None)
    finally:
        again.close()


def test_without_a_token_or_with_one_that_others_read_nothing_is_tried(
    ray_environ: RayPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "/nowhere/token")
    with pytest.raises(RayRefused, match="/nowhere/token cannot be read: No such file"):
        RayCluster(ray_environ.address, ONE)
    open_file = ray_environ.folder / "open"
    open_file.write_text(ray_environ.token.read_text())
    open_file.chmod(0o644)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(open_file))
    with pytest.raises(RayRefused, match=r"can be read by others \(mode 0644\)"):
        RayCluster(ray_environ.address, ONE)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with pytest.raises(RayRefused, match="not used without token authentication"):
        RayCluster(ray_environ.address, ONE)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "x" * 43)
    with pytest.raises(RayRefused, match="RAY_AUTH_TOKEN puts Ray's token into the environment"):
        RayCluster(ray_environ.address, ONE)


def test_an_address_where_no_ray_is_gives_one_line(ray_environ: RayPair) -> None:
    with pytest.raises(ExecutorError, match=r"Ray at 127\.0\.0\.2:1 cannot be reached: Connection refused"):
        RayCluster("127.0.0.2:1", ONE)
    with pytest.raises(ExecutorError, match=r"no node of the Ray cluster at .* runs at 127\.0\.0\.9") as caught:
        RayCluster(ray_environ.address, "127.0.0.9")
    assert "\n" not in str(caught.value)


def test_a_wrong_token_is_refused(ray_environ: RayPair, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a process of its own: Ray reads a token once."""
    wrong = ray_environ.folder / "wrong"
    wrong.write_text("x" * 43)
    wrong.chmod(0o600)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(wrong))
    said = connect_elsewhere(ray_environ.address)
    assert said == f"RayRefused: Ray at {ray_environ.address} refused this node's token"


def test_a_cluster_without_a_token_is_refused(ray_environ: RayPair) -> None:
    with ray_pair(("one",), has_token=False) as bare:
        said = connect_elsewhere(bare.address)
        assert said == (
            f"RayRefused: Ray at {bare.address} lets in anyone: it was started without token authentication"
        )
