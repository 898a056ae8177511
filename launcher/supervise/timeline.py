"""Time to ready, phase by phase, from the records of a start.

Knows: phases may overlap and may lack an end. Refuses to know: how the table is drawn.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from launcher.supervise.status import Phase


@dataclass(frozen=True, slots=True)
class PhaseTime:
    """One row: seconds since the launch began, and how long the phase took. `detail` is its last word."""

    name: str
    began_seconds: float
    seconds: float
    detail: str


@dataclass(slots=True)
class _Open:
    began: float
    ended: float | None = None
    detail: str = ""


@dataclass(slots=True)
class Timeline:
    """Collects phases; all times are CLOCK_MONOTONIC in seconds, which every process of a machine shares."""

    began: float
    _phases: dict[str, _Open] = field(default_factory=dict)
    _ready_at: float | None = None

    def mark(self, name: str, began: float, ended: float, detail: str = "") -> None:
        """Add a finished phase of our own."""
        self._phases[name] = _Open(began, ended, detail)

    def add(self, phase: Phase) -> None:
        """Take in one record."""
        entry = self._phases.setdefault(phase.name, _Open(phase.at))
        if phase.state == "end":
            entry.ended = phase.at
        if phase.detail:
            entry.detail = phase.detail

    def finish(self, at: float) -> None:
        """Set the moment of readiness: open phases end there."""
        self._ready_at = at

    @property
    def total_seconds(self) -> float:
        """Seconds from the launch to readiness."""
        return (self._ready_at if self._ready_at is not None else self.began) - self.began

    def current(self, now: float) -> tuple[str, float] | None:
        """The phase that began last and has not ended, with its seconds so far."""
        running = [(name, entry) for name, entry in self._phases.items() if entry.ended is None]
        if not running:
            return None
        name, entry = max(running, key=lambda item: item[1].began)
        return name, max(0.0, now - entry.began)

    def rows(self) -> tuple[PhaseTime, ...]:
        """All phases in the order they began."""
        end = self._ready_at if self._ready_at is not None else self.began
        return tuple(
            PhaseTime(
                name,
                entry.began - self.began,
                max(0.0, (entry.ended if entry.ended is not None else end) - entry.began),
                entry.detail,
            )
            for name, entry in sorted(self._phases.items(), key=lambda item: item[1].began)
        )
