"""Rules between keys: what each value alone cannot tell. Pure functions of resolved values.

Knows: which combinations cannot work, or are unsafe. Refuses to know: ranks and clusters
(`launcher.registry.placement_rules`), the hardware (the planner's rules), layers and files.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from launcher.registry.findings import Finding, Rule, Values, highest, whole
from launcher.registry.placement_rules import placement_findings
from launcher.registry.types import DeclaredCluster, Layer, ResolvedValue
from launcher.registry.values import SecretRef, holds_secret

_LOOPBACK = re.compile(r"127(\.[0-9]+){3}|localhost|::1|\[::1\]", re.ASCII)


def check_rules(
    values: Values, env: Mapping[str, ResolvedValue], cluster: DeclaredCluster | None = None
) -> list[Finding]:
    """Return every broken rule of one entry on its cluster, errors and warnings, in the order of the rules."""
    found = [finding for rule in _RULES for finding in rule(values)]
    return [*found, *placement_findings(values, cluster), *_secret_variables(env)]


def _step_budget(values: Values) -> Iterator[Finding]:
    budget, rows = whole(values, "max-num-batched-tokens"), whole(values, "max-num-seqs")
    if budget < rows:
        blamed = highest(values, "max-num-seqs", "max-num-batched-tokens")
        yield Finding(
            "error",
            "step-budget",
            blamed,
            f"max-num-batched-tokens {budget} is below max-num-seqs {rows}: some requests could never run",
            f"use max-num-batched-tokens >= {rows}, or max-num-seqs <= {budget}",
        )


def _whole_prefill(values: Values) -> Iterator[Finding]:
    length = values["max-model-len"].value
    budget = whole(values, "max-num-batched-tokens")
    if values["enable-chunked-prefill"].value is False and isinstance(length, int) and budget < length:
        blamed = highest(values, "max-num-batched-tokens", "max-model-len", "enable-chunked-prefill")
        yield Finding(
            "error",
            "prefill-budget",
            blamed,
            f"without chunked prefill a prompt of {length} tokens does not fit a step of {budget}",
            f"set enable-chunked-prefill: true, or max-num-batched-tokens >= {length}",
        )


def _sizing(values: Values) -> Iterator[Finding]:
    size, share = values["kv-cache-memory-bytes"], values["gpu-memory-utilization"]
    if size.value is not None and share.origin.layer is size.origin.layer and share.origin.layer is not Layer.BUILT_IN:
        yield Finding(
            "error",
            "sizing-conflict",
            "kv-cache-memory-bytes",
            "set together with gpu-memory-utilization, but only one can size the KV cache",
            "remove one of the two",
        )


def _remote_code(values: Values) -> Iterator[Finding]:
    if values["trust-remote-code"].value is True:
        yield Finding(
            "error",
            "remote-code",
            "trust-remote-code",
            "hlaunch never runs code that comes with a model",
            "remove the key; the model must be one that the engine implements",
        )


def _open_server(values: Values) -> Iterator[Finding]:
    host = str(values["host"].value)
    is_open = values["api-key"].value is None and values["insecure-no-auth"].value is not True
    if is_open and not _LOOPBACK.fullmatch(host):
        yield Finding(
            "warning",
            "open-server",
            "host",
            f"{host} is reachable from other machines and no api-key is set",
            "set api-key: ${NAME} (or HLAUNCH_API_KEY); insecure-no-auth: true serves without one",
        )


def _secret_literal(values: Values) -> Iterator[Finding]:
    secret = values["api-key"].value
    # A key given by flag or variable is not written down in a file.
    if isinstance(secret, SecretRef) and secret.kind == "literal" and values["api-key"].origin.line is not None:
        yield Finding(
            "warning",
            "secret-literal",
            "api-key",
            "the key itself stands in the registry",
            "write ${NAME} or file:/path, and keep the key out of the file",
        )


def _secret_variables(env: Mapping[str, ResolvedValue]) -> Iterator[Finding]:
    for name, item in env.items():
        is_written = isinstance(item.value, str) and item.value != ""
        if is_written and item.origin.line is not None and holds_secret(name, str(item.value)):
            yield Finding(
                "warning",
                "secret-literal",
                f"env.{name}",
                "looks like a secret that stands in the registry",
                f"remove it and export {name} before `hlaunch up`",
            )


_RULES: tuple[Rule, ...] = (
    _step_budget,
    _whole_prefill,
    _sizing,
    _remote_code,
    _open_server,
    _secret_literal,
)
