"""Shared: the bundled folder, its tokenizer, and the reference model in float32."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.text.tokenizer import Tokenizer
from tools.tiny_oss.evaluate import ASSET_FOLDER, Judge


@pytest.fixture(scope="session")
def folder() -> Path:
    return ASSET_FOLDER


@pytest.fixture(scope="session")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.from_folder(folder)


@pytest.fixture(scope="session")
def judge(folder: Path) -> Judge:
    return Judge(folder)
