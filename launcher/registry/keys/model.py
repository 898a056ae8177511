"""What to serve, and how much of it at once: the model's identity, the scheduler's limits, memory.

Refuses to know: where it runs (`launcher.registry.keys.running`), what the launcher does with it.
"""

from __future__ import annotations

from engine.config import CacheConfig, SchedulerConfig
from launcher.registry.keys.spec import ENGINE, FROM_MODEL, NAME, NAME_HINT, PATHLIKE, KeySpec, Kind

_SCHEDULER, _CACHE = SchedulerConfig(), CacheConfig()
_COMPUTES = "a GPU rank computes in bfloat16, a CPU rank in float32 or bfloat16"

IDENTITY: tuple[KeySpec, ...] = (
    KeySpec(
        "model",
        Kind.TEXT,
        "Hugging Face id (org/name), a local folder, or a bundled name (tiny-oss)",
        is_required=True,
        pattern=PATHLIKE,
        pattern_hint="write org/name, a folder, or a bundled name such as tiny-oss; it cannot start with '-'",
    ),
    KeySpec(
        "revision",
        Kind.TEXT,
        "Branch, tag or commit of the Hugging Face repository",
        automatic="main",
        pattern=NAME,
        pattern_hint=NAME_HINT,
    ),
    KeySpec(
        "tokenizer",
        Kind.TEXT,
        "Hugging Face id or folder of the tokenizer",
        automatic="same as model",
        refusal=FROM_MODEL,
        pattern=PATHLIKE,
        pattern_hint="write org/name or a folder; it cannot start with '-'",
    ),
    KeySpec(
        "served-model-name",
        Kind.TEXTS,
        "Names that clients may use in the `model` field",
        automatic="the entry's name and aliases",
        pattern=NAME,
        pattern_hint=NAME_HINT,
    ),
    KeySpec(
        "dtype",
        Kind.CHOICE,
        "Type of activations and of unquantized weights; auto follows the checkpoint and the device",
        default="auto",
        choices=("auto", "half", "float16", "bfloat16", "float", "float32"),
        refused=("half", "float16"),
        refusal=_COMPUTES,
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
        default=ENGINE["load_format"],
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
)

LIMITS: tuple[KeySpec, ...] = (
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
)

MEMORY: tuple[KeySpec, ...] = (
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
        refused=("float16", "fp8", "fp8_e4m3", "fp8_e5m2"),
        refusal=_COMPUTES,
    ),
)
