"""Rows of the batch: which are free, which are still in flight, which release the ranks have yet to hear of.

A row goes free -> taken -> (in flight until a step's result arrives) -> free; each taking is a new generation.
"""

from __future__ import annotations


class RowTable:
    """Rows 0 to `num_rows - 1`. `released` lists, in order, those that the next plan must announce."""

    def __init__(self, num_rows: int) -> None:
        self.released: list[int] = []
        self._generations = [0] * num_rows
        self._free = list(range(num_rows - 1, -1, -1))
        # (last step that uses the row, row): nothing may take it before that step's result.
        self._cooling: list[tuple[int, int]] = []

    @property
    def has_free(self) -> bool:
        return bool(self._free)

    def take(self) -> tuple[int, int]:
        """Take a free row: its number and generation."""
        row = self._free.pop()
        self._generations[row] += 1
        return row, self._generations[row]

    def release(self, row: int, last_step: int | None) -> None:
        """Give a row back; `last_step` is the newest step in flight that uses it, None when there is none."""
        self.released.append(row)
        if last_step is None:
            self._free.append(row)
        else:
            self._cooling.append((last_step, row))

    def arrived(self, step_id: int) -> None:
        """Free the rows that waited for the result of that step."""
        if self._cooling:
            self._free += [row for last, row in self._cooling if last <= step_id]
            self._cooling = [entry for entry in self._cooling if entry[0] > step_id]

    def announce(self) -> list[int]:
        """Hand over the rows whose release the next plan carries."""
        released, self.released = self.released, []
        return released

    def idle_rows(self) -> list[int]:
        """Rows that no request has, for checks."""
        return self._free + [row for _, row in self._cooling]
