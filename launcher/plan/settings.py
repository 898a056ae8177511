"""Resolved entry -> EngineConfig: one place where registry keys and engine fields meet.

Knows: both vocabularies, and what this version of the engine cannot do. Refuses to know: files, memory, processes.
What the schema allows and the engine cannot serve yet is a clear refusal, never an option that is silently ignored.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from engine.config import CacheConfig, ConfigError, EngineConfig, SchedulerConfig, ServerConfig
from engine.placement import ParallelSizes
from launcher.addresses import is_loopback
from launcher.errors import DoesNotFit, HlaunchError, PreflightError
from launcher.registry.keys import KEYS
from launcher.registry.types import Layer, ResolvedEntry
from launcher.registry.values import BadValue

_DTYPES: dict[str, Literal["auto", "float32", "bfloat16"]] = {
    "auto": "auto",
    "float": "float32",
    "float32": "float32",
    "bfloat16": "bfloat16",
}

_OF_MODEL = ("tokenizer", "tool-call-parser", "reasoning-parser")


def refusals(entry: ResolvedEntry, device: str) -> tuple[HlaunchError, ...]:
    """List what the entry asks and this version cannot do on `device`, each with what is possible instead."""
    found: list[HlaunchError] = []
    found += _dtype_refusals(entry, is_gpu=device != "cpu")
    for key in _OF_MODEL:
        value = entry.text_or_none(key)
        if value is not None and (refused := KEYS[key].refusal_of(value)) is not None:
            found.append(PreflightError(f"{key} {value}: {refused}", hint=f"remove {key}"))
    return tuple(found)


def rank_refusals(entry: ResolvedEntry, sizes: ParallelSizes) -> tuple[HlaunchError, ...]:
    """List what the entry asks of ranks on one host and this version cannot do, each with the nearest possible."""
    found: list[HlaunchError] = []
    backend = entry.text("distributed-executor-backend")
    if backend == "mp" and sizes.engine_ranks == 1:
        found.append(
            DoesNotFit(
                "distributed-executor-backend mp: the one rank of an engine runs in its process",
                hint="add --set distributed-executor-backend=auto",
            )
        )
    elif backend in ("ray", "ray-cgraph"):
        found.append(
            DoesNotFit(
                f"distributed-executor-backend {backend}: Ray starts ranks on the nodes of a cluster",
                hint="add --cluster NAME, or --set distributed-executor-backend=auto",
            )
        )
    return tuple(found)


def _dtype_refusals(entry: ResolvedEntry, *, is_gpu: bool) -> list[HlaunchError]:
    known = ("auto", "bfloat16") if is_gpu else tuple(_DTYPES)
    computes = "a GPU rank computes in bfloat16" if is_gpu else "a CPU rank computes in float32 or bfloat16"
    return [
        DoesNotFit(f"{key} {entry.text(key)}: {computes}", hint=f"add --set {key}=auto")
        for key in ("dtype", "kv-cache-dtype")
        if entry.text(key) not in known
    ]


def notes(entry: ResolvedEntry, device: str) -> tuple[str, ...]:
    """Say which set options have no effect on `device`."""
    if device != "cpu":
        return ()
    found = []
    for key, why in (
        ("gpu-memory-utilization", "no effect on CPU: the KV cache is sized from free memory"),
        ("enforce-eager", "no effect on CPU: there are no CUDA graphs"),
    ):
        # A general `defaults:` is not a statement about this model on this machine.
        if entry.origin(key).layer not in (Layer.BUILT_IN, Layer.PLATFORM, Layer.DEFAULTS):
            found.append(f"{key}: {why}")
    return tuple(found)


def engine_config(
    entry: ResolvedEntry, folder: Path | None, api_key_sha256: tuple[str, ...], device: str = "cpu"
) -> EngineConfig:
    """Build the engine's configuration. `folder` None leaves the model's id in its place, for a plan without files.

    Raises: DoesNotFit when values contradict each other in a way only the engine's own rules know.
    """
    dtype, kv_dtype = (_DTYPES.get(entry.text(key), "auto") for key in ("dtype", "kv-cache-dtype"))
    load_format = entry.text("load-format")
    try:
        return EngineConfig(
            model=str(folder) if folder is not None else entry.model,
            device=device,
            dtype=dtype,
            max_model_len=entry.integer_or_none("max-model-len") or 0,
            load_format=load_format if load_format in ("safetensors", "dummy") else "auto",  # type: ignore[arg-type]
            cpu_threads=entry.integer("cpu-threads"),
            seed=entry.integer_or_none("seed"),
            step_timeout_seconds=entry.number("step-timeout"),
            enforce_eager=entry.flag_or_none("enforce-eager") or False,
            scheduler=_scheduler(entry),
            cache=CacheConfig(
                block_size=entry.integer("block-size"),
                kv_cache_bytes=entry.integer_or_none("kv-cache-memory-bytes") or 0,
                dtype=kv_dtype,
                gpu_memory_utilization=entry.number("gpu-memory-utilization"),
            ),
            server=_server(entry, api_key_sha256),
        )
    except ConfigError as error:
        raise DoesNotFit(str(error).replace("_", "-"), hint=error.hint) from error


def shown_config(config: EngineConfig) -> str:
    """Return the engine's file as it may be shown: a digest without salt tells a weak key to whoever tries words."""
    document = json.loads(config.to_json())
    document["server"]["api_key_sha256"] = ["<hidden>" for _ in config.server.api_key_sha256]
    return json.dumps(document, indent=2, sort_keys=True)


def _scheduler(entry: ResolvedEntry) -> SchedulerConfig:
    return SchedulerConfig(
        max_num_seqs=entry.integer("max-num-seqs"),
        max_num_batched_tokens=entry.integer("max-num-batched-tokens"),
        long_prefill_limit=entry.integer("long-prefill-token-threshold"),
        policy="priority" if entry.text("scheduling-policy") == "priority" else "fcfs",
        enable_prefix_caching=entry.flag("enable-prefix-caching"),
        enable_chunked_prefill=entry.flag("enable-chunked-prefill"),
        async_scheduling=entry.flag("async-scheduling"),
        max_queue=entry.integer("max-queue"),
    )


def _server(entry: ResolvedEntry, api_key_sha256: tuple[str, ...]) -> ServerConfig:
    return ServerConfig(
        host=entry.text("host"),
        port=entry.integer("port"),
        served_model_names=served_names(entry),
        api_key_sha256=api_key_sha256,
        insecure_no_auth=entry.flag("insecure-no-auth"),
        drain_timeout_seconds=entry.number("drain-timeout"),
        request_timeout_seconds=entry.number("request-timeout"),
        max_body_bytes=entry.integer("max-body-size"),
        max_connections=entry.integer("max-connections"),
        stream_interval=entry.integer("stream-interval"),
    )


def served_names(entry: ResolvedEntry) -> tuple[str, ...]:
    """The names clients may use: as set, else the entry's name and aliases."""
    return entry.texts("served-model-name") or (entry.name, *entry.texts("aliases"))


def api_key_digests(entry: ResolvedEntry, environ: Mapping[str, str]) -> tuple[tuple[str, ...], PreflightError | None]:
    """Read the API key and return its SHA-256 as hex; the key itself goes nowhere.

    Returns: the digests and, when the key cannot be read or is missing on a public address, why `up` must refuse.
    """
    reference = entry.secret("api-key")
    if reference is not None:
        try:
            key = reference.reveal(environ)
        except BadValue as error:
            return (), PreflightError(f"api-key: {error.message}", hint=error.hint)
        return (hashlib.sha256(key.encode()).hexdigest(),), None
    host = entry.text("host")
    if not is_loopback(host) and not entry.flag("insecure-no-auth"):
        return (), PreflightError(
            f"host {host} is reachable from other machines and the entry has no api-key",
            hint="add --set api-key='${HLAUNCH_API_KEY}', or --set insecure-no-auth=true if the network is yours alone",
        )
    return (), None
