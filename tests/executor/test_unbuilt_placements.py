"""Placements that can be written and drawn, and that no worker serves, are refused before anything is loaded."""

from __future__ import annotations

from dataclasses import replace

import pytest

from engine.config import ConfigError, EngineConfig
from engine.engine_core import EngineCore, open_model
from engine.placement import Device, HostSpec, KVLink, ParallelSizes, Placement, place

TINY = EngineConfig("tiny-oss", device="cpu")


def placed(sizes: ParallelSizes) -> Placement:
    host = HostSpec("localhost", tuple(Device(f"cpu:{index}") for index in range(sizes.world)))
    return place(open_model(TINY)[1], sizes, [host])


def refusal(placement: Placement) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        EngineCore.start(replace(TINY, placement=placement.to_json()))
    return caught.value


@pytest.mark.parametrize("tensor", [1, 2])
def test_copied_experts_are_refused_by_name(tensor: int) -> None:
    base = placed(ParallelSizes(tensor=tensor, expert_parallel=True))
    copied = replace(base, ranks=(*base.ranks[:-1], replace(base.ranks[-1], copied_experts=(0, 3))))
    error = refusal(copied)
    assert f"copied experts (0, 3 on rank {tensor - 1}) are not built" in str(error)
    assert error.hint == "place each expert once"


def test_kv_that_moves_between_engines_is_refused_by_name() -> None:
    error = refusal(replace(placed(ParallelSizes(data=2)), kv_links=(KVLink(0, 1),)))
    assert "KV blocks that move between engines (0 to 1) are not built" in str(error)
    assert error.hint == "leave kv_links empty"
