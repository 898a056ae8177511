"""Ray 2.60's variables as data: those that are set or linted, then every other name it reads. Knows rows only."""

# ruff: noqa: E501 - one row a line reads as a table
from __future__ import annotations

from launcher.fabric import names_ray
from launcher.fabric.kinds import Kind, Pattern, RayBool, RayNumber, Text, Words
from launcher.fabric.spec import Dead, Scope, Spec

SOURCE = "Ray 2.60.0, measured"
N, C, R, F = Scope.NODE, Scope.CLUSTER, Scope.RANK, Scope.FREE
_INT, _FLOAT, _BOOL = RayNumber(), RayNumber(is_float=True), RayBool()
_SECONDS = Pattern("seconds", r"\d+(\.\d+)?", "300", "5m", "ray-parse")
_ZERO_ONE = Words(("0", "1"), ignored_code="ray-parse")
_PLAIN = "known to Ray; hlaunch leaves it alone"


def _row(name: str, kind: Kind, default: str, scope: Scope, effect: str) -> Spec:
    return Spec("RAY_" + name, "Ray", kind, default, scope, effect, source=SOURCE)


RAY: tuple[Spec, ...] = (
    _row("AUTH_MODE", Words(("token", "disabled"), ignored_code="ray-parse"), "disabled unless a token exists", C, "token: every connection needs the cluster's token"),
    _row("AUTH_TOKEN_PATH", Text("a file, mode 0600"), "~/.ray/auth_token", F, "where the cluster's token is"),
    _row("AUTH_TOKEN", Text("a secret"), "unset", F, "the token itself, for every process to see"),
    _row("USE_TLS", _ZERO_ONE, "0", C, "encrypts Ray's own traffic"),
    _row("TLS_SERVER_CERT", Text("a file"), "unset", N, "certificate of this node"),
    _row("TLS_SERVER_KEY", Text("a file"), "unset", N, "key of this node"),
    _row("TLS_CA_CERT", Text("a file"), "unset", C, "who signs the nodes' certificates"),
    _row("ADDRESS", Text("ip:port of the head"), "unset", N, "where ray.init goes; a stray one on the head redirects it"),
    _row("memory_monitor_refresh_ms", _INT, "250", C, "how often memory is looked at; 0 on unified memory, else it kills workers"),
    _row("memory_usage_threshold", _FLOAT, "0.95", C, "use of memory from which workers are killed"),
    _row("min_memory_free_bytes", _INT, "-1", C, "free memory below which workers are killed"),
    _row("worker_niceness", _INT, "15", C, "how far workers step back for other processes; 0: not at all"),
    _row("health_check_initial_delay_ms", _INT, "5000", C, "first look at a new node"),
    _row("health_check_period_ms", _INT, "3000", C, "time between looks at a node"),
    _row("health_check_timeout_ms", _INT, "10000", C, "how long a node may take to answer"),
    _row("health_check_failure_threshold", _INT, "5", C, "missed looks before a node counts as dead"),
    _row("gcs_rpc_server_reconnect_timeout_s", _INT, "60", C, "how long a node waits for a lost head"),
    _row("worker_register_timeout_seconds", _INT, "60", C, "how long a worker process may take to start"),
    _row("raylet_start_wait_time_s", _INT, "30", C, "how long a node may take to start"),
    _row("CGRAPH_get_timeout", _SECONDS, "10", C, "wait for a compiled graph's result; read at import"),
    _row("CGRAPH_submit_timeout", _SECONDS, "10", C, "wait for room in a compiled graph; read at import"),
    _row("CGRAPH_teardown_timeout", _SECONDS, "30", C, "wait for a compiled graph's end; read at import"),
    _row("CGRAPH_buffer_size_bytes", _INT, "1000000", C, "bytes of a compiled graph's channel; read at import"),
    _row("CGRAPH_max_inflight_executions", _INT, "10", C, "steps of a compiled graph in flight; read at import"),
    _row("EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES", _ZERO_ONE, "0", C, "1: the engine, not Ray, chooses a rank's GPU"),
    _row("DEFAULT_PYTHON_VERSION_MATCH_LEVEL", Words(("minor", "patch"), ignored_code="ray-parse"), "patch", C, "which difference of Python refuses a join"),
    _row("USAGE_STATS_ENABLED", _ZERO_ONE, "1", C, "0: sends no statistics home"),
    _row("DEDUP_LOGS", _ZERO_ONE, "1", F, "0: shows every line of every worker"),
)  # fmt: skip


def _others() -> tuple[Spec, ...]:
    known = {row.name for row in RAY}
    groups = (
        (names_ray.INTEGERS, _INT),
        (names_ray.FLOATS, _FLOAT),
        (names_ray.BOOLS, _BOOL),
        (names_ray.TEXTS, Text()),
        (names_ray.PYTHON, Text()),
    )
    return tuple(
        _row(name, kind, "", F, _PLAIN)
        for names, kind in groups
        for name in names.split()
        if f"RAY_{name}" not in known
    )


RAY_OTHERS: tuple[Spec, ...] = _others()

RAY_DEAD: tuple[Dead, ...] = (
    Dead("RAY_VISIBLE_DEVICES", "is not in Ray", "'gpus' of the node in the registry"),
    Dead("RAY_NODE_IP_ADDRESS", "is not in Ray 2.60", "'ip' of the node in the registry"),
    Dead("RAY_OVERRIDE_NODE_IP_ADDRESS", "is not in Ray 2.60", "'ip' of the node in the registry"),
)
