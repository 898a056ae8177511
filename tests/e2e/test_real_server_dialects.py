"""The unmodified `anthropic` and `openai` clients, messages and responses, against the real tiny-oss server."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from e2e_support import Running
from messages_scenarios import SCENARIOS as MESSAGES
from responses_scenarios import SCENARIOS as RESPONSES
from scenarios import Target


@pytest.mark.parametrize("scenario", [*MESSAGES, *RESPONSES], ids=lambda scenario: scenario.__name__)
def test_client(scenario: Callable[[Target], None], running: Running) -> None:
    scenario(Target(running.url, "tiny-oss"))
