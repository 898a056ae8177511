"""One Docker Engine, and one image of this checkout, for all tests of this folder that ask for them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
from docker_engine import DockerEngine, NoEngine, running_engine


@pytest.fixture(scope="session")
def docker_engine() -> Iterator[DockerEngine]:
    """A real engine; skips with the reason where none can be had."""
    with contextlib.ExitStack() as stack:
        try:
            engine = stack.enter_context(running_engine())
        except NoEngine as error:
            pytest.skip(str(error))
        yield engine


@pytest.fixture(scope="session")
def engine_image(docker_engine: DockerEngine) -> str:
    """The name of the image of this checkout in that engine."""
    return docker_engine.engine_image()
