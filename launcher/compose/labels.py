"""The names by which containers of a launch are found again, by whoever starts, asks or ends them."""

from __future__ import annotations

LABEL = "dev.hlaunch"
"""Prefix of the labels: `.model`, `.cluster`, `.node`, `.role`, `.plan`."""
