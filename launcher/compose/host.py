"""What one host cannot do, and the override file that takes it out again, each line with its reason.

Knows: which rendered lines need which right or version. Refuses to know: how the facts are gathered.

Compose reads `docker-compose.override.yml` beside the main file by itself, so the rendered file stays the same on all
hosts and the exception is visible where it applies.
"""

from __future__ import annotations

from dataclasses import dataclass

from launcher.compose.render import NOFILE, SERVICE
from launcher.compose.yaml_text import Reset, Value, dump

OVERRIDE_FILE = "docker-compose.override.yml"
START_INTERVAL_ENGINE = 25


@dataclass(frozen=True, slots=True)
class HostFacts:
    """What Docker may do on a host. `engine_major` 0 and `nofile_hard` 0: not known, assume the best."""

    can_raise_limits: bool = True
    engine_major: int = 0
    nofile_hard: int = 0
    has_rdma: bool = True


@dataclass(frozen=True, slots=True)
class Override:
    """An override file and why it exists; `text` is empty when the host can do everything."""

    text: str
    reasons: tuple[str, ...]


def host_override(facts: HostFacts) -> Override:
    """Build the override for one host. Pure."""
    reasons: list[str] = []
    service: dict[str, Value] = {}
    limits: dict[str, Value] = {}
    if not facts.can_raise_limits:
        reasons.append(
            "no memlock: -1, because Docker here lacks CAP_SYS_RESOURCE and cannot raise a limit; RDMA needs it"
        )
        limits["memlock"] = Reset()
        if 0 < facts.nofile_hard < NOFILE:
            reasons.append(f"nofile {facts.nofile_hard} in place of {NOFILE}, for the same reason")
            limits["nofile"] = {"soft": facts.nofile_hard, "hard": facts.nofile_hard}
    if limits:
        service["ulimits"] = limits
    if 0 < facts.engine_major < START_INTERVAL_ENGINE:
        reasons.append(
            f"no start_interval, because Docker Engine {facts.engine_major} is older than {START_INTERVAL_ENGINE}"
        )
        service["healthcheck"] = {"start_interval": Reset()}
    if not reasons:
        return Override("", ())
    comments = "".join(f"# {reason}\n" for reason in reasons)
    header = "# written by hlaunch for this host; remove it when the reasons are gone\n"
    return Override(header + comments + dump({"services": {SERVICE: service}}), tuple(reasons))
