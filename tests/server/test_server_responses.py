"""The unmodified `openai` client's responses against the real HTTP server over a scripted engine."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from responses_scenarios import SCENARIOS
from scenarios import Target
from server_support import RunningServer


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_openai_client(scenario: Callable[[Target], None], shared_server: RunningServer) -> None:
    scenario(Target(shared_server.url, "tiny-oss", scripted=True))
