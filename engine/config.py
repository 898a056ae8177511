"""The engine's configuration and the model's: frozen values, parsed once, torch-free.

Knows: the fields, their ranges, how `config.json` of a checkpoint is read, how a configuration travels as JSON from the
launcher to the engine. Refuses to know: YAML, provenance, devices at hand (the launcher's business).

Errors: `ConfigError` (a bad field or a model this engine cannot serve) names the file and the key.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

MAX_CONFIG_BYTES = 1 << 20
MXFP4_BLOCK = 32
MODEL_TYPES = ("gpt_oss",)
"""Families that have a model here, as `model_type` of a config.json names them."""
BUNDLED_MODELS = {"tiny-oss": Path(__file__).parent / "assets" / "tiny_oss"}

DType = Literal["float32", "bfloat16"]


class ConfigError(ValueError):
    """A configuration that cannot be served. `where` is the file and key, `hint` the fix."""

    def __init__(self, where: str, message: str, hint: str = "") -> None:
        super().__init__(f"{where}: {message}")
        self.where = where
        self.message = message
        self.hint = hint


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary embedding with YaRN scaling. `factor == 1` means no scaling.

    Source: YaRN (arXiv 2309.00071); `truncate=False` keeps the ramp's borders fractional, as gpt-oss does.
    """

    theta: float
    factor: float = 1.0
    original_max_position_embeddings: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Shape of one decoder-only model. `layer_windows[i]` is layer i's sliding window in tokens, None for full.

    Units: a window of w lets query i see keys j with i - w < j <= i.
    """

    model_type: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    layer_windows: tuple[int | None, ...]
    num_experts: int
    num_experts_per_token: int
    rope: RopeConfig
    rms_norm_eps: float
    swiglu_limit: float
    max_position_embeddings: int
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None
    quantization: Literal["none", "mxfp4"]
    tie_word_embeddings: bool = False


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """Limits and policy of the scheduler. All sizes count tokens or requests.

    `long_prefill_limit` bounds one request's share of a step while others run; 0 means no bound.
    `max_queue` bounds waiting requests; above it a request is refused, never queued.
    """

    max_num_seqs: int = 16
    max_num_batched_tokens: int = 2048
    long_prefill_limit: int = 0
    policy: Literal["fcfs", "priority"] = "fcfs"
    enable_prefix_caching: bool = True
    enable_chunked_prefill: bool = True
    async_scheduling: bool = True
    max_queue: int = 256


@dataclass(frozen=True, slots=True)
class CacheConfig:
    """KV cache. `num_blocks == 0` sizes the pool from `kv_cache_bytes`, and that from memory when it is 0 too.

    `gpu_memory_utilization` is the share of a GPU's memory that everything of a rank may take; a CPU ignores it.
    """

    block_size: int = 16
    num_blocks: int = 0
    kv_cache_bytes: int = 0
    dtype: DType | Literal["auto"] = "auto"
    gpu_memory_utilization: float = 0.9


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """The HTTP face. `api_key_sha256` holds hex digests; the key itself never travels in this file."""

    host: str = "127.0.0.1"
    port: int = 8000
    served_model_names: tuple[str, ...] = ()
    api_key_sha256: tuple[str, ...] = ()
    insecure_no_auth: bool = False
    drain_timeout_seconds: float = 30.0
    request_timeout_seconds: float = 600.0
    max_body_bytes: int = 8 << 20
    max_header_bytes: int = 64 << 10
    max_headers: int = 100
    header_timeout_seconds: float = 10.0
    body_timeout_seconds: float = 30.0
    keep_alive_seconds: float = 5.0
    max_connections: int = 1024
    stream_interval: int = 1


@dataclass(frozen=True, slots=True)
class NodesConfig:
    """Where ranks on other nodes are reached. Empty `names`: all ranks are on this host.

    `names` are the placement's nodes, the head's own first; this one's is `names[rank]`. `addresses` are theirs, where
    they are known. Nodes come to `head_host`:`head_port`, the one address that the head listens on for them (port 0: a
    free one, told by who starts them). The secret that they share is never here: it is in a file or a variable
    (`engine.node_secret`). A node that says nothing for `silence_seconds` is lost. With Ray, whose cluster is at
    `ray_address` (empty: this node's), ranks must find their places within `placement_timeout_seconds`.
    """

    names: tuple[str, ...] = ()
    rank: int = 0
    addresses: tuple[str, ...] = ()
    head_host: str = ""
    head_port: int = 0
    join_timeout_seconds: float = 300.0
    silence_seconds: float = 4.0
    ray_address: str = ""
    placement_timeout_seconds: float = 60.0


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Everything the engine needs to serve one model. Exactly this, as JSON, is what the launcher hands over.

    `model` is a folder; `device` is `cpu` or `cuda:N`; `max_model_len == 0` means the model's own limit;
    `cpu_threads == 0` lets the worker choose; `seed` feeds requests without one, so that a run can be repeated.
    `enforce_eager` keeps a GPU from capturing CUDA graphs.

    More than one rank: `placement` is the JSON of an `engine.placement.Placement` and says everything; without it the
    sizes do, with all ranks on this host. `data_parallel_rank` is the engine of the placement that this process runs.
    CPU ranks of one node talk through shared memory, or over TCP by Gloo, bound to `node_address`, as they do between
    nodes. `executor` says who starts ranks on other nodes: those that join by themselves, or Ray's.
    `max_restarts` is how often in ten minutes an engine that served and died is started again; 0 ends the server.
    """

    model: str
    device: str = "cpu"
    dtype: DType | Literal["auto"] = "auto"
    max_model_len: int = 0
    load_format: Literal["auto", "safetensors", "dummy"] = "auto"
    cpu_threads: int = 0
    seed: int | None = None
    step_timeout_seconds: float = 60.0
    enforce_eager: bool = False
    placement: str = ""
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    data_parallel_size: int = 1
    data_parallel_rank: int = 0
    enable_expert_parallel: bool = False
    cpu_communicator: Literal["shared_memory", "gloo"] = "shared_memory"
    node_address: str = "127.0.0.1"
    executor: Literal["auto", "multinode", "ray", "ray-cgraph"] = "auto"
    max_restarts: int = 5
    nodes: NodesConfig = field(default_factory=NodesConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    server: ServerConfig = field(default_factory=ServerConfig)

    def __post_init__(self) -> None:
        _check(self.cache.block_size in (16, 32, 64, 128), "cache.block_size", "must be 16, 32, 64 or 128")
        for name in ("max_num_seqs", "max_num_batched_tokens", "max_queue"):
            _check(getattr(self.scheduler, name) >= 1, f"scheduler.{name}", "must be at least 1")
        _check(
            self.scheduler.max_num_batched_tokens >= self.scheduler.max_num_seqs,
            "scheduler.max_num_batched_tokens",
            "must be at least max_num_seqs, or some rows could never run",
        )
        _check(0 <= self.server.port <= 65535, "server.port", "must be between 0 and 65535")
        _check(0 < self.cache.gpu_memory_utilization <= 1, "cache.gpu_memory_utilization", "must be above 0, at most 1")
        _check(self.max_model_len >= 0, "max_model_len", "must not be negative")
        _check(self.cpu_threads >= 0, "cpu_threads", "must not be negative")
        for name in ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size"):
            _check(getattr(self, name) >= 1, name, "must be at least 1")
        _check(self.data_parallel_rank >= 0, "data_parallel_rank", "must not be negative")
        _check(self.max_restarts >= 0, "max_restarts", "must not be negative")
        _check(0 <= self.nodes.head_port <= 65535, "nodes.head_port", "must be between 0 and 65535")
        _check(0 <= self.nodes.rank < max(1, len(self.nodes.names)), "nodes.rank", "must be a place among nodes.names")
        _check(self.nodes.silence_seconds >= 1, "nodes.silence_seconds", "must be at least 1")
        _check(len(set(self.nodes.names)) == len(self.nodes.names), "nodes.names", "must differ")
        _check(
            bool(self.nodes.head_host) or len(self.nodes.names) < 2, "nodes.head_host", "must be set for other nodes"
        )

    @property
    def has_several_ranks(self) -> bool:
        """Whether an engine may consist of more than one process."""
        return bool(self.placement) or self.tensor_parallel_size * self.pipeline_parallel_size > 1

    @property
    def has_other_nodes(self) -> bool:
        """Whether ranks may run on nodes beside this one."""
        return len(self.nodes.names) > 1

    @property
    def core_node(self) -> str:
        """The node of the engine core, by name; empty where there is only one."""
        return self.nodes.names[0] if self.has_other_nodes else ""

    @property
    def served_name(self) -> str:
        """What people call the model."""
        return self.server.served_model_names[0] if self.server.served_model_names else self.model

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2, sort_keys=True)

    @classmethod
    def read(cls, path: Path) -> EngineConfig:
        """Read a file that holds what `to_json` wrote. Raises: ConfigError, as `from_json`, or naming the file."""
        try:
            if path.stat().st_size > MAX_CONFIG_BYTES:
                raise ConfigError(str(path), f"larger than {MAX_CONFIG_BYTES} bytes")
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise ConfigError(str(path), f"cannot be read: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise ConfigError(str(path), f"not UTF-8: {error.reason} at byte {error.start}") from error
        return cls.from_json(text, str(path))

    @classmethod
    def from_json(cls, text: str, where: str = "engine.json") -> EngineConfig:
        """Read a configuration written by `to_json`.

        Raises: ConfigError on bad JSON, an unknown key or a value of the wrong type.
        """
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ConfigError(where, f"not valid JSON: {error}") from error
        built: EngineConfig = _build(cls, data, where)
        return built


_NESTED: dict[str, type] = {
    "scheduler": SchedulerConfig,
    "cache": CacheConfig,
    "server": ServerConfig,
    "nodes": NodesConfig,
}


def _build(cls: type[Any], data: object, where: str) -> Any:
    if not isinstance(data, Mapping):
        raise ConfigError(where, f"expected an object, got {type(data).__name__}")
    known = {item.name: item for item in fields(cls)}
    values: dict[str, Any] = {}
    for key, value in data.items():
        if key not in known:
            raise ConfigError(where, f"unknown key {key!r}", f"known keys: {', '.join(sorted(known))}")
        if key in _NESTED and cls is EngineConfig:
            value = _build(_NESTED[key], value, f"{where}: {key}")
        elif isinstance(value, list):
            value = tuple(value)
        values[key] = value
    try:
        built = cls(**values)
    except TypeError as error:
        raise ConfigError(where, str(error)) from error
    _check_types(built, where)
    return built


def _check_types(value: Any, where: str) -> None:
    """Hold scalar fields against their default's type: enough to catch a hand-edited file."""
    for item in fields(value):
        found = getattr(value, item.name)
        annotation = str(item.type)
        allowed: tuple[type, ...]
        if annotation.startswith("int"):
            allowed = (int,)
        elif annotation.startswith("float"):
            allowed = (int, float)
        elif annotation.startswith("bool"):
            allowed = (bool,)
        elif annotation.startswith("tuple"):
            allowed = (tuple,)
        elif annotation.startswith(("str", "Literal", "DType")):
            allowed = (str,)
        else:
            continue
        if found is None and "None" in annotation:
            continue
        if not isinstance(found, allowed) or (isinstance(found, bool) and bool not in allowed):
            raise ConfigError(where, f"{item.name}: expected {annotation}, got {found!r}")


def _check(ok: bool, where: str, message: str) -> None:
    if not ok:
        raise ConfigError(where, message)


def resolve_model_folder(model: str, model_dir: str | None = None) -> Path | None:
    """Find the folder of a model: a bundled name, a folder, or a snapshot under `model_dir` (a Hugging Face cache).

    Returns None when nothing is on disk. Never downloads.
    """
    if model in BUNDLED_MODELS:
        return BUNDLED_MODELS[model]
    path = Path(model).expanduser()
    if (path / "config.json").is_file():
        return path
    if model_dir is not None and model.count("/") == 1:
        repository = Path(model_dir) / ("models--" + model.replace("/", "--"))
        reference = repository / "refs" / "main"
        if reference.is_file():
            snapshot = repository / "snapshots" / reference.read_text().strip()
            if (snapshot / "config.json").is_file():
                return snapshot
        plain = Path(model_dir) / model
        if (plain / "config.json").is_file():
            return plain
    return None


def load_model_config(folder: Path) -> ModelConfig:
    """Read `config.json` of a checkpoint folder.

    Raises: ConfigError naming file and key when the file is missing, malformed or describes an unsupported model.
    """
    path = folder / "config.json"
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise ConfigError(str(path), f"larger than {MAX_CONFIG_BYTES} bytes")
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(str(path), f"cannot be read: {error.strerror}", "is this a checkpoint folder?") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(str(path), f"not valid JSON: {error}") from error
    return parse_model_config(data, str(path))


def load_generation_defaults(folder: Path) -> dict[str, float]:
    """Read `temperature`, `top_p` and `top_k` of `generation_config.json`; a missing file means no defaults.

    Raises: ConfigError naming the file when it is malformed.
    """
    path = folder / "generation_config.json"
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        return {
            name: float(data[name])
            for name in ("temperature", "top_p", "top_k")
            if isinstance(data.get(name), (int, float)) and not isinstance(data[name], bool)
        }
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise ConfigError(str(path), f"cannot be read: {error}") from error


def parse_model_config(data: object, where: str = "config.json") -> ModelConfig:
    """Turn a Hugging Face `config.json` into a ModelConfig; unknown keys are ignored, known ones are checked."""
    if not isinstance(data, Mapping):
        raise ConfigError(where, "expected an object")
    model_type = data.get("model_type")
    if model_type not in MODEL_TYPES:
        raise ConfigError(where, f"model_type {model_type!r} is not supported", f"supported: {', '.join(MODEL_TYPES)}")
    read = _Reader(data, where)
    hidden_size = read.integer("hidden_size")
    intermediate_size = read.integer("intermediate_size")
    for key, size in (("hidden_size", hidden_size), ("intermediate_size", intermediate_size)):
        if size % MXFP4_BLOCK:
            raise ConfigError(where, f"{key}: {size} is not a multiple of {MXFP4_BLOCK}")
    heads = read.integer("num_attention_heads")
    kv_heads = read.integer("num_key_value_heads")
    if heads % kv_heads:
        raise ConfigError(where, f"num_attention_heads: {heads} is not a multiple of num_key_value_heads {kv_heads}")
    num_layers = read.integer("num_hidden_layers")
    num_experts = read.integer("num_local_experts", "num_experts")
    top_k = read.integer("num_experts_per_tok", "experts_per_token")
    if top_k > num_experts:
        raise ConfigError(where, f"num_experts_per_tok: {top_k} is above the {num_experts} experts")
    if data.get("attention_bias", True) is not True:
        raise ConfigError(where, "attention_bias: only true is supported")
    eos = data.get("eos_token_id")
    eos_ids = tuple(eos) if isinstance(eos, list) else (eos,) if eos is not None else ()
    pad = data.get("pad_token_id")
    return ModelConfig(
        model_type="gpt_oss",
        num_layers=num_layers,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_attention_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=read.integer("head_dim", default=hidden_size // heads),
        vocab_size=read.integer("vocab_size"),
        layer_windows=_layer_windows(data, num_layers, read.integer("sliding_window", default=128), where),
        num_experts=num_experts,
        num_experts_per_token=top_k,
        rope=_rope(data, where),
        rms_norm_eps=read.number("rms_norm_eps", default=1e-5),
        swiglu_limit=read.number("swiglu_limit", default=7.0),
        max_position_embeddings=read.integer("max_position_embeddings"),
        eos_token_ids=tuple(int(i) for i in eos_ids),
        pad_token_id=int(pad) if isinstance(pad, int) else None,
        quantization=_quantization(data, where),
        tie_word_embeddings=bool(data.get("tie_word_embeddings", False)),
    )


class _Reader:
    def __init__(self, data: Mapping[str, Any], where: str) -> None:
        self._data = data
        self._where = where

    def _find(self, keys: tuple[str, ...], default: Any) -> Any:
        for key in keys:
            if self._data.get(key) is not None:
                return self._data[key]
        if default is None:
            raise ConfigError(self._where, f"{keys[0]}: missing")
        return default

    def integer(self, *keys: str, default: int | None = None) -> int:
        value = self._find(keys, default)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 1 << 31:
            raise ConfigError(self._where, f"{keys[0]}: expected a positive integer, got {value!r}")
        return value

    def number(self, *keys: str, default: float | None = None) -> float:
        value = self._find(keys, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e12:
            raise ConfigError(self._where, f"{keys[0]}: expected a positive number, got {value!r}")
        return float(value)


def _layer_windows(data: Mapping[str, Any], num_layers: int, window: int, where: str) -> tuple[int | None, ...]:
    kinds = data.get("layer_types")
    if kinds is None:
        kinds = ["sliding_attention" if i % 2 == 0 else "full_attention" for i in range(num_layers)]
    if not isinstance(kinds, list) or len(kinds) != num_layers:
        raise ConfigError(where, f"layer_types: expected a list of {num_layers} entries")
    for kind in kinds:
        if kind not in ("sliding_attention", "full_attention"):
            raise ConfigError(where, f"layer_types: {kind!r} is not supported")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _rope(data: Mapping[str, Any], where: str) -> RopeConfig:
    """Read either form: `rope_theta` + `rope_scaling` (gpt-oss's files) or one `rope_parameters` (transformers 5)."""
    parameters = data.get("rope_parameters")
    scaling = parameters if isinstance(parameters, Mapping) else data.get("rope_scaling")
    theta_source = parameters if isinstance(parameters, Mapping) and "rope_theta" in parameters else data
    theta = _Reader(theta_source, where).number("rope_theta", default=150000.0)
    if not isinstance(scaling, Mapping):
        return RopeConfig(theta=theta)
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return RopeConfig(theta=theta)
    if kind != "yarn":
        raise ConfigError(where, f"rope_scaling.rope_type: {kind!r} is not supported", "supported: yarn, default")
    read = _Reader(scaling, f"{where}: rope_scaling")
    fallback = data.get("initial_context_length")
    return RopeConfig(
        theta=theta,
        factor=read.number("factor"),
        original_max_position_embeddings=read.integer(
            "original_max_position_embeddings", default=fallback if isinstance(fallback, int) else 4096
        ),
        beta_fast=read.number("beta_fast", default=32.0),
        beta_slow=read.number("beta_slow", default=1.0),
        # Generic YaRN code rounds the borders unless told not to.
        truncate=bool(scaling.get("truncate", True)),
    )


def _quantization(data: Mapping[str, Any], where: str) -> Literal["none", "mxfp4"]:
    quantization = data.get("quantization_config")
    if quantization is None:
        return "none"
    method = quantization.get("quant_method") if isinstance(quantization, Mapping) else quantization
    if method != "mxfp4":
        raise ConfigError(where, f"quantization_config.quant_method: {method!r} is not supported", "supported: mxfp4")
    return "mxfp4"
