"""Where a model runs and how it is served: devices, ranks, the server.

Refuses to know: the hosts themselves (`launcher.registry.keys.cluster`).
"""

from __future__ import annotations

from engine.config import SchedulerConfig, ServerConfig
from launcher.registry.keys.spec import ENGINE, FROM_MODEL, NAME, NAME_HINT, KeySpec, Kind

_SCHEDULER, _SERVER = SchedulerConfig(), ServerConfig()


def _parallel(axis: str, alias: str, meaning: str) -> KeySpec:
    return KeySpec(
        f"{axis}-parallel-size", Kind.INTEGER, meaning, default=1, unit="ranks", low=1, high=4096, aliases=(alias,)
    )


RANKS: tuple[KeySpec, ...] = (
    KeySpec(
        "device",
        Kind.CHOICE,
        "Where to run; auto takes CUDA when there is a GPU",
        default="auto",
        choices=("auto", "cpu", "cuda"),
    ),
    KeySpec(
        "cpu-threads",
        Kind.INTEGER,
        "Threads of a CPU rank; 0 for one per physical core",
        default=ENGINE["cpu_threads"],
        unit="threads",
        low=0,
        high=4096,
    ),
    _parallel("tensor", "tp", "Ranks that split each layer"),
    _parallel("pipeline", "pp", "Ranks that split the layers into stages"),
    _parallel("data", "dp", "Engines that share the requests"),
    KeySpec(
        "enable-expert-parallel",
        Kind.BOOLEAN,
        "Give each rank whole experts of a mixture, instead of a slice of every one",
        default=ENGINE["enable_expert_parallel"],
        aliases=("ep",),
    ),
    KeySpec(
        "distributed-executor-backend",
        Kind.CHOICE,
        "Who runs the ranks: uni in-process, mp processes of this node, ray several nodes, ray-cgraph a compiled graph",
        default="auto",
        choices=("auto", "uni", "mp", "ray", "ray-cgraph"),
    ),
)

SERVER: tuple[KeySpec, ...] = (
    KeySpec(
        "host",
        Kind.TEXT,
        "Address to listen on",
        default=_SERVER.host,
        pattern=r"[A-Za-z0-9._:%\[\]-]+",
        pattern_hint="write an address or a host name: 127.0.0.1, 0.0.0.0, ::1",
    ),
    KeySpec("port", Kind.INTEGER, "TCP port of the API", default=_SERVER.port, low=1, high=65535),
    KeySpec(
        "api-key",
        Kind.SECRET,
        "Key that clients must send: ${NAME} or file:/path; a literal warns",
        automatic="no key asked",
    ),
    KeySpec(
        "insecure-no-auth",
        Kind.BOOLEAN,
        "Serve on a public address without an API key",
        default=_SERVER.insecure_no_auth,
    ),
    KeySpec(
        "tool-call-parser",
        Kind.TEXT,
        "Reads tool calls out of the model's text",
        automatic="by model",
        refusal=FROM_MODEL,
        pattern=NAME,
        pattern_hint=NAME_HINT,
    ),
    KeySpec(
        "reasoning-parser",
        Kind.TEXT,
        "Separates reasoning from the answer",
        automatic="by model",
        refusal=FROM_MODEL,
        pattern=NAME,
        pattern_hint=NAME_HINT,
    ),
    KeySpec(
        "max-queue",
        Kind.INTEGER,
        "Most requests that wait; one more is refused with 503",
        default=_SCHEDULER.max_queue,
        unit="requests",
        low=1,
        high=1 << 20,
    ),
    KeySpec(
        "max-connections",
        Kind.INTEGER,
        "Most open client connections",
        default=_SERVER.max_connections,
        unit="connections",
        low=1,
        high=1 << 20,
    ),
    KeySpec(
        "max-body-size",
        Kind.SIZE,
        "Largest request body",
        default=_SERVER.max_body_bytes,
        unit="bytes",
        low=1024,
        high=1 << 30,
    ),
    KeySpec(
        "request-timeout",
        Kind.DURATION,
        "Longest time for one request",
        default=_SERVER.request_timeout_seconds,
        unit="seconds",
        low=0,
        high=7 * 86400,
        is_low_open=True,
    ),
    KeySpec(
        "stream-interval",
        Kind.INTEGER,
        "Tokens per streamed chunk",
        default=_SERVER.stream_interval,
        unit="tokens",
        low=1,
        high=1024,
    ),
    KeySpec(
        "drain-timeout",
        Kind.DURATION,
        "Time that running requests get after Ctrl-C or SIGTERM",
        default=_SERVER.drain_timeout_seconds,
        unit="seconds",
        low=0,
        high=86400,
    ),
    KeySpec(
        "step-timeout",
        Kind.DURATION,
        "A step that takes longer counts as hung and ends the engine",
        default=ENGINE["step_timeout_seconds"],
        unit="seconds",
        low=0,
        high=86400,
        is_low_open=True,
    ),
)
