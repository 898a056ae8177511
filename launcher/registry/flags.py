"""vLLM's option names, as data: which of them hlaunch has, takes without effect, or cannot serve, and why.

Knows: names of the engine's and the server's options over vLLM's releases, whether each takes a value, what becomes of
it here. Refuses to know: values of native options (`launcher.registry.keys`), files.

`native`: a key of the registry. `accepted`: taken, and nothing changes; an info says so. `unsupported`: an error with
the reason, unless the value switches the feature off anyway.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import Literal

from launcher.registry.keys import ENTRY, Kind

Status = Literal["native", "accepted", "unsupported"]
Arity = Literal["switch", "value", "list"]

_NEUTRAL = frozenset({"", "~", "null", "none", "false", "off", "no", "0", "[]", "{}"})
_NEUTRAL_ONE = frozenset(
    {"decode-context-parallel-size", "prefill-context-parallel-size", "nnodes", "num-scheduler-steps"}
)


@dataclass(frozen=True, slots=True)
class Flag:
    """One option of vLLM. `reason`: why it does nothing here, or why it cannot; `shorts`: as on its command line."""

    name: str
    status: Status
    arity: Arity
    reason: str = ""
    shorts: tuple[str, ...] = ()

    def is_off(self, text: str) -> bool:
        """Whether this value asks for nothing: the option may stand, whatever its status."""
        return text.lower() in _NEUTRAL or (text == "1" and self.name in _NEUTRAL_ONE)

    def verdict(self, text: str | None) -> tuple[str, str]:
        """Return code and message of an option that is no key of ours. `text` None: a list or a mapping."""
        if self.status == "accepted":
            return "accepted-flag", f"no effect: {self.reason}"
        if text is not None and self.is_off(text):
            return "accepted-flag", f"no effect: {self.reason}, and this value asks for none of it"
        return "unsupported-flag", self.reason


# Each block: a status, a reason, then names. `+` after a name: a switch without a value; `*`: several values.
_TABLE = """
accepted logs and metrics are always there, on /metrics and in the log
  disable-log-stats+ aggregate-engine-logging+ show-hidden-metrics-for-version enable-log-requests+
  disable-log-requests+
  enable-log-outputs+ enable-log-deltas+ max-log-len log-config-file uvicorn-log-level disable-uvicorn-access-log+
  disable-access-log-for-endpoints log-error-stack+ enable-server-load-tracking+ kv-cache-metrics+
  kv-cache-metrics-sample cudagraph-metrics+ enable-mfu-metrics+ enable-logging-iteration-details+
accepted the server has one process for HTTP beside the engine's
  disable-frontend-multiprocessing+ api-server-count:asc renderer-num-workers h11-max-incomplete-event-size
  h11-max-header-count disable-fastapi-docs+ enable-offline-docs+
accepted usage, tool choice, reasoning and request ids are always on
  enable-auto-tool-choice+ enable-prompt-tokens-details+ enable-force-include-usage+ enable-request-id-headers+
  enable-reasoning+
  exclude-tools-when-tool-choice-none+ return-tokens-as-token-ids+ response-role chat-template-content-format
accepted the engine plans its own memory and steps
  swap-space num-gpu-blocks-override max-num-partial-prefills max-long-partial-prefills num-lookahead-slots
  preemption-mode scheduler-delay-factor disable-chunked-mm-input+ disable-hybrid-kv-cache-manager+ watermark
  scheduler-reserve-full-isl+ prefix-caching-hash-algo use-v2-block-manager+ disable-async-output-proc+
  multi-step-stream-outputs+ num-scheduler-steps calculate-kv-scales+
  kv-sharing-fast-prefill+ disable-cascade-attn+ skip-mm-profiling+
accepted kernels and graphs are chosen by measurement, per platform
  attention-backend attention-config:ac compilation-config:cc:O optimization-level kernel-config moe-backend
  all2all-backend cuda-graph-sizes* cudagraph-capture-sizes* max-cudagraph-capture-size max-seq-len-to-capture
  disable-custom-all-reduce+ ir-op-priority model-impl use-tqdm-on-load+ pt-load-map-location
  enable-flashinfer-autotune+ enable-layerwise-nvtx-tracing+ ray-workers-use-nsight+
  profiler-config
  disable-nccl-for-dp-synchronization+
  ubatch-size dbo-decode-token-threshold dbo-prefill-token-threshold enable-dbo+ mamba-cache-dtype
  mamba-ssm-cache-dtype mamba-block-size mamba-cache-mode
accepted each rank reads its own part of the weights, and nothing else
  max-parallel-loading-workers safetensors-load-strategy ignore-patterns*
accepted the launcher finds the checkpoint and its configuration
  download-dir config-format hf-config-path code-revision tokenizer-mode tokenizer-revision convert runner task
  generation-config intial-incremental-detokenization-offset skip-tokenizer-init+ tokenizer-pool-size
  tokenizer-pool-type tokenizer-pool-extra-config model-loader-extra-config fail-on-environ-validation+
accepted the cluster in the registry says where ranks run
  nnodes node-rank master-addr master-port data-parallel-address:dpa data-parallel-rpc-port:dpp
  data-parallel-backend:dpb data-parallel-size-local:dpl data-parallel-rank:dpn data-parallel-start-rank:dpr
  engine-use-ray+ worker-use-ray+ numa-bind+ numa-bind-nodes* numa-bind-cpus* headless+ distributed-timeout-seconds
accepted limits of features that are off
  max-loras max-lora-rank max-cpu-loras lora-dtype lora-extra-vocab-size fully-sharded-loras+ long-lora-scaling-factors
  lora-target-modules* specialize-active-lora+ enable-lora-bias+ max-prompt-adapters max-prompt-adapter-token
  limit-mm-per-prompt mm-processor-kwargs mm-processor-cache-gb mm-processor-cache-type disable-mm-preprocessor-cache+
  mm-shm-cache-max-object-size-mb mm-encoder-tp-mode mm-encoder-attn-backend media-io-kwargs interleave-mm-strings+
  video-pruning-rate allowed-local-media-path allowed-media-domains* enable-multimodal-encoder-data-parallel+
  mm-tensor-ipc language-model-only+ eplb-config eplb-window-size eplb-step-interval eplb-log-balancedness+
  num-redundant-experts expert-placement-strategy dcp-kv-cache-interleave-size cp-kv-cache-interleave-size
  speculative-disable-by-batch-size speculative-disable-mqa-scorer+ speculative-max-model-len
  speculative-draft-tensor-parallel-size speculative-model-quantization spec-decoding-acceptance-method
  typical-acceptance-sampler-posterior-threshold typical-acceptance-sampler-posterior-alpha
  disable-logprobs-during-spec-decoding+ ngram-prompt-lookup-max ngram-prompt-lookup-min
  guided-decoding-disable-fallback+ guided-decoding-disable-any-whitespace+
  guided-decoding-disable-additional-properties+
accepted the engine is told everything in one file, not by arguments
  extra-args*
accepted a client's request says it
  max-logprobs logprobs-mode
unsupported LoRA adapters are not implemented
  enable-lora+ lora-modules* default-mm-loras qlora-adapter-name-or-path enable-prompt-adapter+ prompt-adapters*
  enable-tower-connector-lora+
unsupported speculative decoding is not implemented
  speculative-config:sc speculative-model num-speculative-tokens spec-method spec-model spec-tokens
unsupported guided decoding is not implemented
  guided-decoding-backend structured-outputs-config logits-processor-pattern logits-processors* reasoning-config
unsupported the engine splits a model by tensor, pipeline and data parallelism only
  decode-context-parallel-size:dcp prefill-context-parallel-size:pcp enable-eplb+
  enable-elastic-ep+ enable-ep-weight-filter+ data-parallel-hybrid-lb:dph+ data-parallel-external-lb:dpe+
unsupported weights and KV blocks stay in the memory of their rank
  cpu-offload-gb kv-offloading-size kv-offloading-backend offload-backend offload-group-size offload-num-in-group
  offload-prefetch-step offload-params* kv-transfer-config kv-events-config ec-transfer-config weight-transfer-config
  enable-sleep-mode+ cpu-offload-params*
unsupported a model's shape comes from its config.json
  hf-overrides rope-scaling rope-theta disable-sliding-window+ override-attention-dtype kv-cache-dtype-skip-layers*
  override-neuron-config override-generation-config
unsupported only text goes in and out
  enable-prompt-embeds+ enable-mm-embeds+ io-processor-plugin pooler-config override-pooler-config
  enable-return-routed-experts+ tokens-only+
unsupported hlaunch runs no code that comes from outside
  worker-cls worker-extension-cls scheduler-cls middleware tool-parser-plugin reasoning-parser-plugin tool-server
  additional-config external-parameters
unsupported the template comes with the model
  chat-template trust-request-chat-template+ default-chat-template-kwargs
unsupported put a proxy in front that speaks TLS
  ssl-keyfile ssl-certfile ssl-ca-certs ssl-cert-reqs ssl-ciphers enable-ssl-refresh+
unsupported put a proxy in front that sets these
  root-path allow-credentials+ allowed-origins allowed-methods allowed-headers
unsupported the server listens on host and port, and speaks HTTP
  uds grpc+
unsupported traces are not exported
  otlp-traces-endpoint collect-detailed-traces*
unsupported a secret has no place in a file: export HF_TOKEN
  hf-token
unsupported the names and shapes of the tokenizer are not published
  enable-tokenizer-info-endpoint+
unsupported one file says it all: run hlaunch import vllm-config FILE
  config
unsupported use drain-timeout
  shutdown-timeout
"""

_SHORTS = {
    "tensor-parallel-size": ("tp",),
    "pipeline-parallel-size": ("pp",),
    "data-parallel-size": ("dp",),
    "enable-expert-parallel": ("ep",),
    "quantization": ("q",),
}


@cache
def flags() -> Mapping[str, Flag]:
    """Every known option by its dashed name. Parsed on first use."""
    found: dict[str, Flag] = {}
    for spec in ENTRY.specs.values():
        if "." not in spec.key and not spec.is_launcher_only:
            arity: Arity = "switch" if spec.kind is Kind.BOOLEAN else "list" if spec.kind is Kind.TEXTS else "value"
            found[spec.key] = Flag(spec.key, "native", arity, shorts=_SHORTS.get(spec.key, ()))
    status: Status = "accepted"
    reason = ""
    for line in _TABLE.strip().splitlines():
        if not line.startswith(" "):
            word, _, reason = line.partition(" ")
            status = "accepted" if word == "accepted" else "unsupported"
            continue
        for word in line.split():
            name, *shorts = word.rstrip("+*").split(":")
            arity = "switch" if word.endswith("+") else "list" if word.endswith("*") else "value"
            found[name] = Flag(name, status, arity, reason, tuple(shorts))
    return MappingProxyType(found)


@cache
def _by_short() -> Mapping[str, Flag]:
    return MappingProxyType({short: flag for flag in flags().values() for short in flag.shorts})


def find_flag(written: str) -> Flag | None:
    """Return the option of this name, with dashes or underscores, or of this short form; None when vLLM has none."""
    name = written.replace("_", "-")
    return flags().get(name) or _by_short().get(name)


def find_foreign(written: str) -> Flag | None:
    """Return the option of this name, also with `.part` behind it, that is no key of ours; None when there is none."""
    flag = find_flag(written.partition(".")[0])
    return flag if flag is not None and flag.status != "native" else None


def find_negated(written: str) -> Flag | None:
    """Return the switch that `no-…` turns off; None when the text is no such thing."""
    name = written.replace("_", "-")
    flag = flags().get(name.removeprefix("no-")) if name.startswith("no-") else None
    return flag if flag is not None and flag.arity == "switch" else None
