"""The typed catalogue: every variable of NCCL, Gloo, PyTorch, UCX, Ray and CUDA that is known by name.

Knows: which names are real, dead, foreign or too new, and which are close to a misspelt one. Refuses to know: where a
value came from (`environment`) and what to say about it (`lint`). Data; nothing is read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache

from launcher.fabric.spec import SCOPE_WORDS, Dead, Scope, Spec
from launcher.fabric.table_nccl import NCCL, NCCL_DEAD, NCCL_OTHERS, NEWEST_BEFORE
from launcher.fabric.table_ray import RAY, RAY_DEAD, RAY_OTHERS
from launcher.fabric.table_torch import CUDA, FOREIGN, GLOO, HUB, OURS, RANKS, THREADS, TORCH, TORCH_ALIASES, UCX
from launcher.registry.values import redacted

__all__ = [
    "CATALOGUE_VERSION",
    "MAIN",
    "NEVER_CARRIED",
    "SCOPE_WORDS",
    "TORCH_ALIASES",
    "Dead",
    "Scope",
    "Spec",
    "is_ours_to_judge",
    "is_too_new",
    "suggestions",
]

CATALOGUE_VERSION = "1: NCCL 2.30.7, Ray 2.60.0, UCX 1.22, torch 2.13"
HOST_NCCL = NEWEST_BEFORE

MAIN: tuple[Spec, ...] = (*NCCL, *GLOO, *TORCH, *UCX, *CUDA, *HUB, *RAY, *THREADS, *RANKS, *OURS)
"""The rows that documentation shows: set by hlaunch, or with a rule of their own."""

_SPECS: dict[str, Spec] = {row.name: row for row in (*NCCL_OTHERS, *RAY_OTHERS, *MAIN)}
_DEAD: dict[str, Dead] = {row.name: row for row in (*NCCL_DEAD, *RAY_DEAD, *FOREIGN)}

_FAMILIES = ("NCCL_", "GLOO_", "TORCH_NCCL_", "TORCH_GLOO_", "TORCH_FR_", "UCX_", "RAY_", "NVSHMEM_")
_FOREIGN_FAMILIES = {"VLLM_": "vLLM", "OMPI_": "Open MPI", "SGLANG_": "SGLang"}
_PATH_LIKE = re.compile(r"(^|_)(PATH|HOME|PRELOAD|TMPDIR|VIRTUAL_ENV|PYTHONPATH)($|_)")

SECRETS = frozenset({"RAY_AUTH_TOKEN", "HF_TOKEN"})

NEVER_CARRIED = frozenset({"HLAUNCH_NODE_IP", "VLLM_HOST_IP", "NVIDIA_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES"}).union(
    SECRETS, (row.name for row in THREADS)
)
"""Facts of one node or its cores, one rank, or secrets: never copied from the machine that starts the others."""


def find(name: str) -> Spec | None:
    """Return the row of a name, exactly as written."""
    return _SPECS.get(name)


def shown(name: str, value: str) -> str:
    """Return a value as it may be printed: a secret is hidden whole, `RAY_AUTH_MODE` is none whatever its name says."""
    is_known = name in _SPECS and name not in SECRETS
    return value if is_known else redacted(name, value)


def find_dead(name: str) -> Dead | None:
    """Return the row of a name that nobody reads; also for the families of other programs."""
    if name in _DEAD:
        return _DEAD[name]
    for prefix, program in _FOREIGN_FAMILIES.items():
        if name.startswith(prefix):
            return Dead(name, f"is read by {program} only", "", "foreign-name")
    return None


def names() -> Iterable[str]:
    """Every name of the catalogue."""
    return _SPECS.keys()


def is_ours_to_judge(name: str) -> bool:
    """Say whether a name belongs to a family of the catalogue; `PATH` and `EDITOR` are nobody's business here."""
    return name in _SPECS or name in TORCH_ALIASES or name.startswith(_FAMILIES) or find_dead(name) is not None


def is_carried(name: str) -> bool:
    """Say whether the launching machine's value may go to other nodes: known, equal everywhere, no secret, no path."""
    row = find(name)
    if row is None or name in NEVER_CARRIED or _PATH_LIKE.search(name):
        return False
    return row.scope in (Scope.CLUSTER, Scope.FREE)


def is_too_new(row: Spec, version: str = HOST_NCCL) -> bool:
    """Say whether NCCL of `version` lacks the name because it is older."""
    return row.owner == "NCCL" and bool(row.since) and release(row.since) > release(version)


def is_gone(row: Spec, version: str = HOST_NCCL) -> bool:
    """Say whether NCCL of `version` lacks the name because it was removed."""
    return row.owner == "NCCL" and bool(row.until) and release(version) > release(row.until)


def release(text: str) -> tuple[int, ...]:
    """Turn `2.28.9` (or `2.28.9+cuda13`) into numbers that compare."""
    return tuple(int(part) for part in re.findall(r"\d+", text.partition("+")[0])[:3])


@cache
def suggestions(name: str) -> tuple[str, ...]:
    """Return up to three known names close to an unknown one, best first; letters' case is the first suspect."""
    same = [known for known in _SPECS if known.lower() == name.lower()]
    if same:
        return tuple(same)
    from launcher.registry.suggest import close_names

    prefix = next((family for family in _FAMILIES if name.upper().startswith(family)), "")
    # What all names of a family share makes no two of them alike.
    pool = {known[len(prefix) :]: known for known in _SPECS if known.upper().startswith(prefix)}
    return tuple(pool[rest] for rest in close_names(name[len(prefix) :], pool))
