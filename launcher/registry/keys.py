"""The one table of registry keys: name, kind, default, unit, range, aliases, meaning.

The schema, the JSON schema, `--set` typing, `HLAUNCH_<KEY>` names, `show` and the tests of the commented registry
are all made from it; a key that is not here does not exist. Defaults of the engine are read from `engine.config`.
Refuses to know: how values are parsed, merged or used.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, auto
from types import MappingProxyType
from typing import Any

from engine.config import CacheConfig, EngineConfig, SchedulerConfig, ServerConfig
from launcher.registry.types import Value
from launcher.registry.values import MAX_QUANTITY, format_duration, format_size


class Kind(Enum):
    """How a value is written and what it becomes."""

    TEXT = auto()
    """str"""
    CHOICE = auto()
    """str, one of `choices`"""
    BOOLEAN = auto()
    """bool; only `true` and `false`"""
    INTEGER = auto()
    """int; `1e6` is read as a number"""
    NUMBER = auto()
    """float"""
    TOKENS = auto()
    """int of tokens, or "auto"; accepts `128k`, `auto`, `-1`"""
    SIZE = auto()
    """int of bytes; accepts `4GiB`"""
    DURATION = auto()
    """float of seconds; accepts `15m`"""
    SECRET = auto()
    """SecretRef"""
    TEXTS = auto()
    """tuple of str; one text counts as a list of one"""
    VARIABLES = auto()
    """mapping of environment variables; only `env`"""


@dataclass(frozen=True, slots=True)
class KeySpec:
    """One key. `default` None means that the engine or the model decides; `automatic` then says how.

    `low` is inclusive unless `is_low_open`; `high` is inclusive. `is_fixed`: no override from outside the file.
    A dot nests: `ready.timeout` is `timeout` inside `ready:`.
    """

    key: str
    kind: Kind
    summary: str
    default: Value = None
    automatic: str = ""
    unit: str = ""
    choices: tuple[str, ...] = ()
    values: tuple[int, ...] = ()
    low: float | None = None
    high: float | None = None
    is_low_open: bool = False
    pattern: str | None = None
    pattern_hint: str = ""
    aliases: tuple[str, ...] = ()
    is_required: bool = False
    is_fixed: bool = False
    is_launcher_only: bool = False

    @property
    def environment(self) -> str:
        """The variable that overrides this key: `HLAUNCH_MAX_NUM_SEQS`."""
        return "HLAUNCH_" + re.sub(r"[-.]", "_", self.key).upper()

    def describe_default(self) -> str:
        """The default as a reader sees it."""
        if self.is_required:
            return "required"
        if self.default is None:
            return self.automatic or "unset"
        return show_value(self, self.default)

    def describe_range(self) -> str:
        """The accepted values in a few words, empty when any value of the kind goes."""
        if self.choices:
            return " | ".join(self.choices)
        if self.values:
            return " | ".join(str(value) for value in self.values)
        if self.kind is Kind.BOOLEAN:
            return "true | false"
        low = "" if self.low is None else f"{'>' if self.is_low_open else '>='} {self._bound(self.low)}"
        high = "" if self.high is None or self.high == MAX_QUANTITY else f"<= {self._bound(self.high)}"
        return ", ".join(part for part in (low, high) if part)

    def _bound(self, value: float) -> str:
        return show_value(self, value) if self.kind in (Kind.SIZE, Kind.DURATION) else f"{value}"


def show_value(spec: KeySpec, value: Value) -> str:
    """Write a value the way the registry takes it back."""
    if value is None:
        return spec.automatic or "unset"
    if isinstance(value, bool):
        return "true" if value else "false"
    if spec.kind is Kind.SIZE and isinstance(value, (int, float)):
        return format_size(int(value))
    if spec.kind is Kind.DURATION and isinstance(value, (int, float)):
        return format_duration(float(value))
    if isinstance(value, tuple):
        return "[" + ", ".join(value) + "]"
    return str(value)


_SCHEDULER, _CACHE, _SERVER = SchedulerConfig(), CacheConfig(), ServerConfig()
_ENGINE: Mapping[str, Any] = {name: item.default for name, item in EngineConfig.__dataclass_fields__.items()}

_NAME_HINT = "use letters, digits, '.', '_', '-', '/' and ':'; it cannot start with '-'"
_NAME = r"[A-Za-z0-9_][A-Za-z0-9._:/+-]*"
_PATHLIKE = r"[A-Za-z0-9_./~][^\x00-\x1f\x7f]*"


def _parallel(axis: str, alias: str, meaning: str) -> KeySpec:
    return KeySpec(
        f"{axis}-parallel-size", Kind.INTEGER, meaning, default=1, unit="ranks", low=1, high=4096, aliases=(alias,)
    )


_TABLE: tuple[KeySpec, ...] = (
    # What to serve.
    KeySpec(
        "model",
        Kind.TEXT,
        "Hugging Face id (org/name), a local folder, or a bundled name (tiny-oss)",
        is_required=True,
        pattern=_PATHLIKE,
        pattern_hint="write org/name, a folder, or a bundled name such as tiny-oss; it cannot start with '-'",
    ),
    KeySpec(
        "revision",
        Kind.TEXT,
        "Branch, tag or commit of the Hugging Face repository",
        automatic="main",
        pattern=_NAME,
        pattern_hint=_NAME_HINT,
    ),
    KeySpec(
        "tokenizer",
        Kind.TEXT,
        "Hugging Face id or folder of the tokenizer",
        automatic="same as model",
        pattern=_PATHLIKE,
        pattern_hint="write org/name or a folder; it cannot start with '-'",
    ),
    KeySpec(
        "served-model-name",
        Kind.TEXTS,
        "Names that clients may use in the `model` field",
        automatic="the entry's name and aliases",
        pattern=_NAME,
        pattern_hint=_NAME_HINT,
    ),
    KeySpec(
        "dtype",
        Kind.CHOICE,
        "Type of activations and of unquantized weights; auto follows the checkpoint and the device",
        default="auto",
        choices=("auto", "half", "float16", "bfloat16", "float", "float32"),
    ),
    KeySpec(
        "quantization",
        Kind.CHOICE,
        "Format of the quantized weights",
        automatic="as the checkpoint says",
        choices=("none", "mxfp4"),
    ),
    KeySpec(
        "load-format",
        Kind.CHOICE,
        "How weights are read; dummy fills them with noise, for speed tests",
        default=_ENGINE["load_format"],
        choices=("auto", "safetensors", "dummy"),
    ),
    KeySpec(
        "trust-remote-code",
        Kind.BOOLEAN,
        "Only false: hlaunch never runs code that comes with a model",
        default=False,
    ),
    KeySpec(
        "seed",
        Kind.INTEGER,
        "Seed of requests that bring none, so that a run can be repeated",
        automatic="a fresh one per request",
        low=0,
        high=2**63 - 1,
    ),
    # Limits of the scheduler.
    KeySpec(
        "max-model-len",
        Kind.TOKENS,
        "Longest prompt plus answer",
        automatic="auto: the model's limit",
        unit="tokens",
        low=1,
        high=1 << 40,
    ),
    KeySpec(
        "max-num-seqs",
        Kind.INTEGER,
        "Most requests that run at once",
        default=_SCHEDULER.max_num_seqs,
        unit="requests",
        low=1,
        high=1 << 16,
    ),
    KeySpec(
        "max-num-batched-tokens",
        Kind.INTEGER,
        "Token budget of one step; at least max-num-seqs",
        default=_SCHEDULER.max_num_batched_tokens,
        unit="tokens",
        low=1,
        high=1 << 24,
    ),
    KeySpec(
        "long-prefill-token-threshold",
        Kind.INTEGER,
        "One prompt's largest share of a step while others run; 0 for no bound",
        default=_SCHEDULER.long_prefill_limit,
        unit="tokens",
        low=0,
        high=1 << 24,
    ),
    KeySpec(
        "scheduling-policy",
        Kind.CHOICE,
        "Order of the queue: first come first served, or by the request's priority",
        default=_SCHEDULER.policy,
        choices=("fcfs", "priority"),
    ),
    KeySpec(
        "enable-prefix-caching",
        Kind.BOOLEAN,
        "Reuse the KV blocks of a prompt's known beginning",
        default=_SCHEDULER.enable_prefix_caching,
    ),
    KeySpec(
        "enable-chunked-prefill",
        Kind.BOOLEAN,
        "Split long prompts over steps, so that running requests keep streaming",
        default=_SCHEDULER.enable_chunked_prefill,
    ),
    KeySpec(
        "async-scheduling",
        Kind.BOOLEAN,
        "Plan the next step while the current one runs",
        default=_SCHEDULER.async_scheduling,
    ),
    KeySpec(
        "enforce-eager",
        Kind.BOOLEAN,
        "Never capture CUDA graphs (slower, starts sooner)",
        default=False,
    ),
    # Memory.
    KeySpec(
        "block-size",
        Kind.INTEGER,
        "Tokens per KV block",
        default=_CACHE.block_size,
        unit="tokens",
        values=(16, 32, 64, 128),
    ),
    KeySpec(
        "gpu-memory-utilization",
        Kind.NUMBER,
        "Share of each GPU's memory that the engine may use; no effect on CPU",
        default=0.9,
        unit="fraction",
        low=0,
        high=1,
        is_low_open=True,
    ),
    KeySpec(
        "kv-cache-memory-bytes",
        Kind.SIZE,
        "Size of the KV cache per rank; replaces sizing by gpu-memory-utilization",
        automatic="sized from memory",
        unit="bytes",
        low=1 << 16,
        high=1 << 50,
    ),
    KeySpec(
        "kv-cache-dtype",
        Kind.CHOICE,
        "Type of the KV cache",
        default=_CACHE.dtype,
        choices=("auto", "float32", "float16", "bfloat16", "fp8", "fp8_e4m3", "fp8_e5m2"),
    ),
    # Where to run.
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
        default=_ENGINE["cpu_threads"],
        unit="threads",
        low=0,
        high=4096,
    ),
    _parallel("tensor", "tp", "Ranks that split each layer"),
    _parallel("pipeline", "pp", "Ranks that split the layers into stages"),
    _parallel("data", "dp", "Engines that share the requests"),
    KeySpec(
        "distributed-executor-backend",
        Kind.CHOICE,
        "Who runs the ranks: uni in-process, mp processes of this node, ray several nodes",
        default="auto",
        choices=("auto", "uni", "mp", "ray", "ray-cgraph"),
    ),
    # The server.
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
        pattern=_NAME,
        pattern_hint=_NAME_HINT,
    ),
    KeySpec(
        "reasoning-parser",
        Kind.TEXT,
        "Separates reasoning from the answer",
        automatic="by model",
        pattern=_NAME,
        pattern_hint=_NAME_HINT,
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
        default=_ENGINE["step_timeout_seconds"],
        unit="seconds",
        low=0,
        high=86400,
        is_low_open=True,
    ),
    # For the launcher only.
    KeySpec(
        "ready.timeout",
        Kind.DURATION,
        "Deadline from start to ready",
        default=900.0,
        unit="seconds",
        low=0,
        high=7 * 86400,
        is_low_open=True,
        is_launcher_only=True,
    ),
    KeySpec(
        "env",
        Kind.VARIABLES,
        "Environment variables of the engine; an empty value removes an inherited one",
        automatic="none",
        is_launcher_only=True,
    ),
    KeySpec(
        "description",
        Kind.TEXT,
        "One line for `hlaunch list`",
        automatic="none",
        is_fixed=True,
        is_launcher_only=True,
    ),
    KeySpec(
        "aliases",
        Kind.TEXTS,
        "Other names of this entry",
        automatic="none",
        pattern=_NAME,
        pattern_hint=_NAME_HINT,
        is_fixed=True,
        is_launcher_only=True,
    ),
    KeySpec(
        "tags",
        Kind.TEXTS,
        "Labels, shown by `hlaunch list`",
        automatic="none",
        is_fixed=True,
        is_launcher_only=True,
    ),
)

KEYS: Mapping[str, KeySpec] = MappingProxyType({spec.key: spec for spec in _TABLE})
"""Canonical dashed key -> spec, in the order of documentation."""

SPELLINGS: Mapping[str, str] = MappingProxyType(
    {
        spelling: spec.key
        for spec in _TABLE
        for name in (spec.key, *spec.aliases)
        for spelling in (name, name.replace("-", "_"))
    }
)
"""Every accepted spelling -> canonical key."""

ENVIRONMENT: Mapping[str, str] = MappingProxyType(
    {spec.environment: spec.key for spec in _TABLE if not spec.is_fixed and spec.kind is not Kind.VARIABLES}
)
"""`HLAUNCH_<KEY>` -> canonical key."""

RESERVED_ENVIRONMENT = frozenset(
    f"HLAUNCH_{name}" for name in ("REGISTRY", "PROFILE", "CLUSTER", "NODE_IP", "MODEL_DIR", "STATE_DIR")
)
"""Variables with the prefix that are not keys."""

DASHED: Mapping[str, str] = MappingProxyType({name: spec.key for spec in _TABLE for name in (spec.key, *spec.aliases)})
"""Every spelling worth proposing -> canonical key."""

MODEL_ONLY = frozenset({"model", "revision", "tokenizer", "served-model-name", "description", "aliases", "tags"})
"""Keys that describe one model, so `defaults` cannot hold them."""

GROUPS = frozenset(spec.key.split(".")[0] for spec in _TABLE if "." in spec.key)
"""Keys that hold a mapping of further keys: `ready`."""


def canonical_key(written: str) -> str | None:
    """Turn any accepted spelling into the canonical key; None when there is no such key."""
    return SPELLINGS.get(written)
