"""Variables that no registry sets: what finds programs and libraries, what hlaunch sets itself, what differs per rank.

Knows: those names, and what to do instead. Refuses to know: values (`launcher.fabric` lints them), where a name stands.
A loader's path in a shared file changes which code runs, on every node, for whoever starts the model next.
"""

from __future__ import annotations

import re

RANK_VARIABLES = frozenset(
    {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT"}
)
_OURS = frozenset({"HLAUNCH_NODE_IP", "HLAUNCH_KERNEL_CACHE"})
"""With our prefix, and yet for the engine: an address that other rules judge, and a folder."""
_CODE = re.compile(r"PATH|LD_\w+|DYLD_\w+|PYTHON\w*", re.ASCII)


def refusal(name: str) -> tuple[str, str] | None:
    """Return why a registry must not set this variable, and what to do; None when it may."""
    if name in RANK_VARIABLES:
        return "the value would reach every process, so all ranks would believe to be the same one", (
            "remove it; the engine sets it per rank"
        )
    if _CODE.fullmatch(name):
        return "decides which code runs, which no registry does", (
            "remove it; export it where hlaunch is started, or put it into the image"
        )
    if name.startswith("HLAUNCH_") and name not in _OURS:
        return "is read by hlaunch itself, not by what it starts", (
            f"remove it; export {name} where hlaunch is started, or write the option it stands for"
        )
    return None
