"""What the supervisor is told to run: plain values that also travel to a detached supervisor as JSON.

Knows: argv, address, deadlines. Refuses to know: registries and plans. A detached supervisor passes its own
environment on, so that no variable's value is ever written to disk.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field

from launcher.errors import HlaunchError


@dataclass(frozen=True, slots=True)
class LaunchSpec:
    """One engine to run. The status pipe's `--status-fd N` is appended to `argv`."""

    name: str
    model: str
    url: str
    argv: tuple[str, ...]
    working_folder: str
    config_text: str
    ready_timeout_seconds: float = 900.0
    drain_timeout_seconds: float = 30.0
    environment: dict[str, str] = field(default_factory=dict, repr=False)
    head_addr: str = ""
    """HOST:PORT of the head that it joins; it then has no server, and `url` is empty."""

    def to_json(self) -> str:
        """Write all but the environment."""
        data = asdict(self)
        del data["environment"]
        return json.dumps(data)

    @classmethod
    def from_json(cls, text: str, environment: dict[str, str]) -> LaunchSpec:
        """Read what `to_json` wrote. Raises: HlaunchError when it is something else (two versions of hlaunch)."""
        try:
            data = json.loads(text)
            data["argv"] = tuple(data["argv"])
            return cls(environment=environment, **data)
        except (ValueError, TypeError, KeyError) as error:
            raise HlaunchError(f"the launch description is malformed: {error}") from error
