"""The unmodified `anthropic` client against the real tiny-oss server."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from e2e_support import Running
from messages_scenarios import SCENARIOS as MESSAGES
from scenarios import Target


@pytest.mark.parametrize("scenario", MESSAGES, ids=lambda scenario: scenario.__name__)
def test_anthropic_client(scenario: Callable[[Target], None], running: Running) -> None:
    scenario(Target(running.url, "tiny-oss"))
