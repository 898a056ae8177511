"""Fixtures of the text tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from text_support import O200kCodec, o200k_codec, small_tokenizer

from engine.text import Tokenizer

BUNDLED = Path(__file__).resolve().parents[2] / "engine" / "assets" / "tiny_oss"


@pytest.fixture(scope="session")
def small() -> Tokenizer:
    return small_tokenizer()


@pytest.fixture(scope="session", params=["small", "bundled"])
def tokenizer(request: pytest.FixtureRequest, small: Tokenizer) -> Tokenizer:
    if request.param == "small":
        return small
    return Tokenizer.from_folder(BUNDLED)


@pytest.fixture(scope="session")
def o200k() -> O200kCodec:
    return o200k_codec()
