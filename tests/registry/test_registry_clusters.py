"""Clusters: what a declared one becomes, and every rule of nodes, ports and ranks at the text to blame."""

from __future__ import annotations

from dataclasses import replace

import pytest
from registry_support import ROOT

from launcher.errors import Issue, OverrideError, RegistryInvalid, UnknownName
from launcher.exit_codes import ExitCode
from launcher.plan.cluster_plan import make_cluster_plan
from launcher.registry import Layer, Registry, load_registry, parse_registry, resolve, resolve_cluster
from launcher.registry.cluster import Cluster, Container, Fabric, Node, RaySettings
from launcher.registry.contradictions import contradictions

PAIR = """\
clusters:
  pair:
    platform: generic
    fabric: {rdma: required, subnet: 10.0.0.0/24, tc: 106}
    ray: {}
    nodes:
      - {name: a, role: head, ip: 10.0.0.1, gpus: 2, ifname: eth0}
      - {name: b, ip: 10.0.0.2, gpus: 2, env: {B: only}}
    env: {NCCL_DEBUG: WARN}
models:
  m:
    model: openai/gpt-oss-20b
    cluster: pair
"""


def pair(old: str = "", new: str = "", **settings: object) -> str:
    """The registry above with one text replaced, and more settings in its only entry."""
    assert old in PAIR
    text = PAIR.replace(old, new, 1) if old else PAIR
    return text + "".join(f"    {key.replace('_', '-')}: {value}\n" for key, value in settings.items())


def issues(text: str) -> list[Issue]:
    try:
        return list(parse_registry(text, "r.yml").issues)
    except RegistryInvalid as error:
        return list(error.issues)


def test_a_loopback_address_is_right_without_ray() -> None:
    text = pair("    ray: {}\n", "").replace("subnet: 10.0.0.0/24, ", "").replace("10.0.0.1", "127.0.0.1")
    assert [issue.code for issue in issues(text) if issue.severity == "error"] == []


@pytest.mark.parametrize(
    ("fabric", "node", "rdma"),
    [
        ("hcas: [mlx5_0]", "", "preferred"),
        ("hcas: auto", "", "preferred"),
        ("tc: 106", "", "preferred"),
        ("gid-index: auto-pin, rdma: ", "", "preferred"),
        ("subnet: 10.0.0.0/24, mtu: 9000", "", "off"),
        ("subnet: 10.0.0.0/24", "hcas: [mlx5_0], ", "preferred"),
        ("subnet: 10.0.0.0/24", "gid-index: 3, ", "preferred"),
        ("tc: 106, rdma: off", "", "off"),
        ("tc: 106, rdma: required", "", "required"),
    ],
)
def test_a_field_of_rdma_means_that_it_is_wanted(fabric: str, node: str, rdma: str) -> None:
    text = pair("rdma: required, subnet: 10.0.0.0/24, tc: 106", fabric).replace("{name: a, ", "{name: a, " + node)
    assert parse_registry(text).clusters["pair"].cluster.fabric.rdma == rdma


def test_the_example_is_valid_and_resolves_to_the_shared_type() -> None:
    registry = load_registry(ROOT / "examples" / "two-nodes.yml", ROOT)
    assert registry.issues == ()
    assert list(registry.models) == ["tiny-oss", "gpt-oss-20b"]
    entry = resolve(registry, "gpt-oss-20b")
    assert (entry.cluster_name, entry.platform) == ("pair", "gb10")
    cluster = resolve_cluster(registry, "pair", {}, entry)
    hcas = ("rocep1s0f0", "roceP2p1s0f0")
    head = Node("spark-01", "head", "192.168.100.1", "spark-01", 1, 119 << 30, ifname="enP2p1s0f0np0", hcas=hcas)
    assert cluster == Cluster(
        "pair",
        (head, replace(head, name="spark-02", role="worker", ip="192.168.100.2", ssh="spark-02")),
        platform="gb10",
        fabric=Fabric("required", subnet="192.168.100.0/24", mtu=9000),
        ray=RaySettings(),
        container=Container(),
        env={"NCCL_DEBUG": "INFO", "NCCL_DEBUG_SUBSYS": "INIT"},
    )
    assert cluster.head.name == "spark-01"
    assert [node.name for node in cluster.workers] == ["spark-02"]


def test_every_key_of_a_cluster_reaches_its_field() -> None:
    registry = parse_registry(
        "clusters:\n"
        "  c:\n"
        "    platform: hopper\n"
        "    fabric: {rdma: preferred, hcas: [m_0, 'm_1:1'], gid_index: auto-pin, subnet: fd00::/64, mtu: 4200, tc: 3,"
        " sl: 2, timeout: 21, merge-nics: false}\n"
        "    ray: {port: 7000, node-manager-port: 7001, object-manager-port: 7002, runtime-env-agent-port: 7003,"
        " dashboard-agent-grpc-port: 7004, metrics-export-port: 7005, dashboard-agent-listen-port: 7006,"
        " dashboard-host: '::1', dashboard-port: 7007, worker-ports: 11000-12000, object-store-memory: 1GiB}\n"
        "    container: {image: 'r.example:5000/e@sha256:00', ipc: host, gpu-mode: cdi, network: bridge_1}\n"
        "    nodes: [{name: n, role: head, ip: 'fd00::1', ssh: me@n, gpus: 8, gpu-memory: 80GiB, cpus: 64,"
        " memory: 1TiB, ifname: eth0, hcas: m_0, gid-index: 3, env: {A: 1, GONE: }}]\n"
        "models: {m: {model: x}}\n"
    )
    assert registry.clusters["c"].cluster == Cluster(
        "c",
        (Node("n", "head", "fd00::1", "me@n", 8, 80 << 30, 64, 1 << 40, "eth0", ("m_0",), 3, {"A": "1"}),),
        "hopper",
        Fabric("preferred", ("m_0", "m_1:1"), "auto-pin", "fd00::/64", 4200, 3, 2, 21, False),
        RaySettings(7000, 7001, 7002, 7003, 7004, 7005, 7006, "::1", 7007, (11000, 12000), 1 << 30),
        Container("r.example:5000/e@sha256:00", "host", gpu_mode="cdi", network="bridge_1"),
    )
    assert registry.clusters["c"].node_env["n"]["GONE"].value is None


def test_a_cluster_needs_little() -> None:
    registry = parse_registry("clusters: {c: {nodes: [{name: n, role: head, ip: 10.0.0.1}]}}\nmodels: {m: {model: x}}")
    cluster = registry.clusters["c"].cluster
    assert cluster == Cluster("c", (Node("n", "head", "10.0.0.1"),))
    assert cluster.ray is None


RULES = [
    ("head-count", pair("role: head, ", ""), 6, 5, "add role: head"),
    ("head-count", pair("{name: b, ip", "{name: b, role: head, ip"), 8, 25, "role: worker"),
    ("name-clash", pair("name: b", "name: A"), 8, 16, "rename"),
    ("node-ip-subnet", pair("10.0.0.2", "10.0.0.1"), 8, 23, "its own"),
    ("node-ip-subnet", pair("10.0.0.2", "10.0.1.2"), 8, 23, "the subnet"),
    ("node-ip-subnet", pair("10.0.0.2", "0.0.0.0"), 8, 23, "fabric address"),
    ("bad-address", pair("10.0.0.2", "node-b"), 8, 23, "not a name"),
    ("bad-address", pair("10.0.0.0/24", "10.0.0.1/24"), 4, 38, "10.0.0.0/24"),
    ("bad-address", pair("10.0.0.0/24", "10.0.0.0"), 4, 38, "network/bits"),
    ("unknown-value", pair("tc: 106", "gid-index: 3"), 4, 62, "one node"),
    ("out-of-range", pair("tc: 106", "tc: 256"), 4, 55, "<= 255"),
    ("out-of-range", pair("tc: 106", "timeout: 32"), 4, 60, "<= 31"),
    ("unknown-key", pair("tc: 106", "rmda: off"), 4, 51, "'rdma'"),
    ("unknown-key", pair("ifname", "ifnam"), 7, 54, "'ifname'"),
    ("unknown-value", pair("generic", "h100"), 3, 15, "hopper"),
    ("missing-key", pair("name: b, ", ""), 8, 9, "add name"),
    ("missing-key", pair("ip: 10.0.0.2, ", ""), 8, 9, "add ip"),
    ("wrong-type", pair("{name: b, ip: 10.0.0.2, gpus: 2, env: {B: only}}", "b"), 8, 9, "setting per line"),
    ("bad-text", pair("ifname: eth0", "ssh: -oProxyCommand=x"), 7, 59, "cannot start with '-'"),
    ("bad-text", pair("ifname: eth0", "ifname: 'eth0,eth1'"), 7, 62, "one name"),
    ("port-clash", pair("ray: {}", "ray: {port: 8265}"), 5, 17, "own port"),
    ("port-clash", pair("ray: {}", "ray: {port: 10001}"), 5, 17, "own port"),
    ("port-clash", pair("ray: {}", "ray: {dashboard-port: 12000}"), 5, 27, "outside"),
    ("port-clash", pair("ray: {}", "ray: {worker-ports: [10000, 11000]}"), 5, 25, "10002"),
    ("out-of-range", pair("ray: {}", "ray: {worker-ports: [20000, 11000]}"), 5, 25, "[11000, 20000]"),
    ("wrong-type", pair("ray: {}", "ray: {worker-ports: [20000]}"), 5, 25, "two ports"),
    ("ephemeral-overlap", pair("ray: {}", "ray: {metrics-export-port: 52365}"), 5, 32, "below 32768"),
    ("ephemeral-overlap", pair("ray: {}", "ray: {worker-ports: [20000, 40000]}"), 5, 25, "32767"),
    ("env-contradicts-fabric", pair("NCCL_DEBUG: WARN", "NCCL_IB_DISABLE: 1"), 9, 28, "fabric.rdma"),
    ("env-contradicts-fabric", pair("NCCL_DEBUG: WARN", "NCCL_NET: Socket"), 9, 21, "fabric.rdma"),
    ("env-contradicts-fabric", pair("NCCL_DEBUG: WARN", "NCCL_IB_TC: 96"), 9, 23, "fabric.tc"),
    ("env-contradicts-fabric", pair("ifname: eth0", "ifname: eth0, env: {GLOO_SOCKET_IFNAME: lo}"), 7, 94, "ifname"),
    ("secret-literal", pair("B: only", "HF_TOKEN: x"), 8, 58, "export"),
    ("shm-inert", pair("ray: {}", "container: {ipc: host, shm-size: 1GiB}"), 5, 38, "private"),
    ("node-ip-subnet", pair("ip: 10.0.0.1", "ip: 127.0.0.1"), 7, 35, "own address"),
    ("node-ip-subnet", pair("ip: 10.0.0.1", "ip: '::1'"), 7, 35, "own address"),
    ("fabric-unused", pair("rdma: required, ", "rdma: off, "), 4, 50, "rdma: required"),
    ("fabric-unused", pair("rdma: required, ", "").replace("tc: 106", "rdma: off, hcas: auto"), 4, 52, "preferred"),
    ("rdma-network", pair("ray: {}", "container: {network: mine}"), 5, 26, "host"),
    ("missing-key", "clusters: {c: {}}\nmodels: {m: {model: x}}\n", 1, 12, "add nodes"),
    ("missing-key", "clusters: {c: {nodes: []}}\nmodels: {m: {model: x}}\n", 1, 23, "add nodes"),
    ("wrong-type", "clusters: [c]\nmodels: {m: {model: x}}\n", 1, 11, "per line"),
    ("wrong-type", "clusters: {c: {nodes: {a: b}}}\nmodels: {m: {model: x}}\n", 1, 23, "[a, b]"),
    (
        "bad-name",
        "clusters: {none: {nodes: [{name: n, role: head, ip: 1.1.1.1}]}}\nmodels: {m: {model: x}}\n",
        1,
        12,
        "",
    ),
    ("unknown-ref", pair("cluster: pair", "cluster: piar"), 13, 14, "'pair'"),
    ("unknown-ref", "defaults: {cluster: c}\nmodels: {m: {model: x}}\n", 1, 21, "declare it"),
    ("unknown-ref", "profiles: {p: {cluster: c}}\nmodels: {m: {model: x}}\n", 1, 25, "declare it"),
    ("unknown-ref", pair(placement="{nodes: [a, c]}"), 14, 24, "nodes: a, b"),
    ("world-exceeds-gpus", pair(tp=8), 14, 9, "use tp 4, or tp 2 pp 2"),
    ("world-exceeds-gpus", pair(tp=2, placement="{exact: true}"), 15, 24, "raise a size"),
    ("world-exceeds-gpus", pair(tp=2, placement="{cpu-ranks: 2}"), 15, 28, "at most 1"),
    ("rank-spread", pair(pp=4, placement="{strategy: strict-pack}"), 15, 27, "use pp 2 dp 2"),
    ("heads-tp", pair(tp=3), 14, 9, "use one of 1, 2, 4, 8"),
    ("layers-pp", pair(pp=25), 14, 9, "at most 24"),
    ("context-too-long", pair(max_model_len="256k"), 14, 20, "131072"),
    ("port-clash", pair(port=6379), 14, 11, "8000"),
    ("port-clash", pair(port=10001), 14, 11, "8000"),
    ("port-clash", pair(port=15000), 14, 11, "outside"),
    ("ephemeral-overlap", pair(port=40000), 14, 11, "32768"),
    ("backend-ranks", pair("    ray: {}\n", "", distributed_executor_backend="ray"), 13, 35, "ray: {}"),
    ("unified-memory", pair("generic", "gb10", gpu_memory_utilization=0.9), 14, 29, "0.85"),
    ("tp-over-slow-link", pair("rdma: required", "rdma: off", tp=4), 14, 9, "tp 2 pp 2"),
]


@pytest.mark.parametrize(("code", "text", "line", "column", "hint"), RULES)
def test_every_rule_names_its_place_and_the_fix(code: str, text: str, line: int, column: int, hint: str) -> None:
    found = issues(text)
    assert [item.code for item in found if item.code == code], found
    (issue,) = (item for item in found if item.code == code)
    assert (issue.line, issue.column) == (line, column)
    assert hint in issue.hint
    assert issue.hint
    # Nothing else is an error: one mistake, one message.
    assert [item.code for item in found if item.severity == "error" and item is not issue] == []


@pytest.mark.parametrize(
    "text",
    [
        pair(),
        pair(tp=4),
        pair(tp=2, pp=2),
        pair(dp=4),
        pair(tp=5, device="cpu", model_x="y").replace("model-x", "x-y").replace("tp: 5", "tp: 4"),
        pair(tp=2, placement="{cpu-ranks: 1}"),
        pair("generic", "cpu", tp=8),
        pair("gpus: 2, ifname", "ifname"),
        pair("NCCL_DEBUG: WARN", "NCCL_IB_TC: 106"),
        pair("rdma: required, ", "").replace("NCCL_DEBUG: WARN", "NCCL_IB_DISABLE: 0"),
    ],
)
def test_what_can_be_placed_gives_no_message(text: str) -> None:
    assert issues(text) == []


def test_a_broken_cluster_does_not_blame_who_names_it() -> None:
    found = issues(pair("10.0.0.2", "nowhere"))
    assert [item.code for item in found] == ["bad-address"]


def registry() -> Registry:
    return parse_registry(PAIR, "r.yml")


def test_the_cluster_is_chosen_by_the_highest_layer() -> None:
    assert resolve(registry(), "m").cluster_name == "pair"
    assert resolve(registry(), "m", {}, ["cluster=none"]).cluster_name is None
    assert resolve(registry(), "m", {"HLAUNCH_CLUSTER": "none"}).cluster_name is None
    for bad in ({"HLAUNCH_CLUSTER": "piar"}, {}):
        with pytest.raises(UnknownName, match="cluster 'piar' is not in r.yml") as caught:
            resolve(registry(), "m", bad, [] if bad else ["cluster=piar"])
        assert caught.value.exit_code == 4
        assert "'pair'" in caught.value.hint
    with pytest.raises(UnknownName):
        resolve_cluster(registry(), "piar")


def test_variables_of_cluster_and_node_are_layers() -> None:
    on_cluster = resolve(registry(), "m")
    assert str(on_cluster.env["NCCL_DEBUG"].origin) == "cluster pair (r.yml:9:23)"
    assert "B" not in on_cluster.env
    on_node = resolve(registry(), "m", node="b")
    assert on_node.env["B"].value == "only"
    assert str(on_node.env["B"].origin) == "node b (r.yml:8:51)"
    assert resolve(registry(), "m", {}, ["env.B=flag"], node="b").env["B"].origin.layer is Layer.FLAG
    with pytest.raises(UnknownName, match="node 'c' is not in cluster pair"):
        resolve(registry(), "m", node="c")


def test_the_entrys_container_goes_over_the_clusters() -> None:
    text = pair("    ray: {}\n", "    container: {image: low:1, shm-size: 1GiB}\n", container="{image: 'high:2'}")
    found = parse_registry(text)
    entry = resolve(found, "m")
    assert resolve_cluster(found, "pair", {}, entry).container == Container("high:2", shm_bytes=1 << 30)
    assert resolve_cluster(found, "pair").container.image == "low:1"
    assert resolve_cluster(found, "pair", {"HLAUNCH_CONTAINER_IMAGE": "env:3"}).container.image == "env:3"
    with pytest.raises(OverrideError):
        resolve_cluster(found, "pair", {"HLAUNCH_CONTAINER_SHM_SIZE": "big"})


def test_errors_from_flags_on_a_cluster_blame_the_flag() -> None:
    with pytest.raises(OverrideError) as caught:
        resolve(registry(), "m", {}, ["tp=8"])
    assert [(item.code, item.source) for item in caught.value.issues] == [("world-exceeds-gpus", "--set tp")]


@pytest.mark.parametrize(
    ("flags", "code", "hint"),
    [
        (["tp=8"], ExitCode.DOES_NOT_FIT, "use tp 4, or tp 2 pp 2, or tp 2 dp 2"),
        (["tp=3"], ExitCode.DOES_NOT_FIT, "use one of 1, 2, 4, 8, 16, 32, 64"),
        (["pp=25"], ExitCode.DOES_NOT_FIT, "use at most 24"),
        (["placement.nodes=[c]"], ExitCode.UNKNOWN_MODEL, "nodes: a, b"),
        (["tp=8", "port=6379"], ExitCode.USAGE, ""),
        (["port=6379"], ExitCode.USAGE, "choose another, such as 8000"),
    ],
)
def test_what_has_no_place_and_what_is_unknown_have_exit_codes_of_their_own(
    flags: list[str], code: ExitCode, hint: str
) -> None:
    with pytest.raises(OverrideError) as caught:
        resolve(registry(), "m", {}, flags)
    assert caught.value.exit_code == code
    assert not hint or [item.hint for item in caught.value.issues] == [hint]
    assert not any("cpu-ranks" in item.hint for item in caught.value.issues)


def test_words_that_nccl_reads_as_zero_switch_nothing_off() -> None:
    fabric = Fabric(rdma="required")
    for word in ("true", "0", "00", "²", ""):
        assert list(contradictions(fabric, {"NCCL_IB_DISABLE": word})) == []
    assert list(contradictions(fabric, {"NCCL_IB_DISABLE": "9" * 5000}))
    assert [item.field for item in contradictions(fabric, {"NCCL_IB_DISABLE": "1"})] == ["fabric.rdma"]


def test_a_node_is_the_truth_about_itself() -> None:
    node = Node("n", "head", "10.0.0.1", ifname="eth0", hcas=("m_0", "m_1"), gid_index=3)
    good = {
        "NCCL_SOCKET_IFNAME": "=eth0",
        "NCCL_IB_HCA": "=m_1,m_0",
        "NCCL_IB_GID_INDEX": "3",
        "HLAUNCH_NODE_IP": "10.0.0.1",
    }
    assert list(contradictions(Fabric(), good, node)) == []
    bad = {
        "NCCL_SOCKET_IFNAME": "^eth0",
        "NCCL_IB_HCA": "^m_0,m_1",
        "NCCL_IB_GID_INDEX": "0",
        "HLAUNCH_NODE_IP": "10.0.0.9",
    }
    assert [item.variable for item in contradictions(Fabric(), bad, node)] == list(bad)


def test_a_flag_goes_over_what_cluster_and_node_set() -> None:
    found = parse_registry(PAIR)
    for flags, expected in (([], ("WARN", "only")), (["env.NCCL_DEBUG=INFO", "env.B=flag"], ("INFO", "flag"))):
        entry = resolve(found, "m", {}, ["tp=4", *flags])
        plan = make_cluster_plan(entry, resolve_cluster(found, "pair", {}, entry), {})
        given = {item.name: item.value for item in plan.nodes[1].environment}
        assert (given["NCCL_DEBUG"], given["B"]) == expected
