"""What all tests share: helper modules whose assertions explain themselves."""

from __future__ import annotations

import pytest

pytest.register_assert_rewrite(
    "scenarios", "messages_scenarios", "messages_stream", "responses_scenarios", "responses_stream"
)
