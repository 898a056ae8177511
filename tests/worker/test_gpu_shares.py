"""What each GPU rank loads: the parts of the whole that its share names, from either layout, and made up alike."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.config import ModelConfig
from engine.config import resolve_model_folder as find_model
from engine.models.checkpoint import Checkpoint
from engine.models.dummy import write_checkpoint
from engine.models.gpt_oss_weights import expected_tensors, original_name
from engine.placement import Device, HostSpec, ParallelSizes, Placement, RankSpec, place
from tests.worker.test_gpu_runner import load, twins

assert twins  # the fixture, used by all tests here
SIZES = [ParallelSizes(1, 1, 2), ParallelSizes(1, 2, 2), ParallelSizes(1, 1, 4), ParallelSizes(1, 1, 2, True)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, ModelConfig]:
    """A made-up checkpoint of tiny-oss's shape in both layouts."""
    tiny = find_model("tiny-oss")
    assert tiny is not None
    folder = tmp_path_factory.mktemp("shares")
    model = write_checkpoint(folder / "named", json.loads((tiny / "config.json").read_text()), seed=3)
    state = load_file(folder / "named" / "model.safetensors")
    renamed: dict[str, list[Tensor]] = {}
    for name in expected_tensors(model):
        renamed.setdefault(original_name(name), []).append(state[name])
    (folder / "original").mkdir()
    parts = {name: torch.cat(found) for name, found in renamed.items()}
    save_file(parts, folder / "original" / "model.safetensors")
    return folder / "named", folder / "original", model


def load_share(model: ModelConfig, folder: Path | None, placement: Placement, rank: RankSpec) -> Any:
    from engine.models.gpt_oss_gpu_weights import load_gpt_oss_gpu

    return load_gpt_oss_gpu(
        model, None if folder is None else Checkpoint.open(folder), torch.device("cpu"), num_positions=64,
        num_threads=1, seed=0, progress=lambda *_: None, rank=rank, stage=placement.stage(0, rank.pp_rank),
    )  # fmt: skip


def cut(name: str, whole: Tensor, model: ModelConfig, rank: RankSpec) -> Tensor:
    """Cut a rank's part out of a layer's tensor, said once more in other words than the loader's."""
    dim, heads, kv_heads = model.head_dim, model.num_attention_heads, model.num_kv_heads
    query = slice(dim * rank.query_heads[0], dim * rank.query_heads[1])
    keys = slice(dim * rank.kv_heads[0], dim * rank.kv_heads[1])
    first, last = rank.mlp_units
    mine = slice(*rank.experts)
    if name in ("qkv", "qkv_bias"):
        q, k, v = whole.split([heads * dim, kv_heads * dim, kv_heads * dim])
        return torch.cat((q[query], k[keys], v[keys]))
    if name == "sinks":
        return whole[slice(*rank.query_heads)]
    if name == "out":
        return whole[:, query]
    if name.startswith("gate_up"):
        return whole[mine, 64 * first : 64 * last]
    if name == "down_bias":
        return whole[mine] if first == 0 else torch.zeros_like(whole[mine])
    if name.startswith("down"):
        return whole[mine, :, first:last]
    return whole


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("layout", ["named", "original", "made up"])
def test_a_share_is_a_part_of_the_whole(
    layout: str, sizes: ParallelSizes, checkpoint: tuple[Path, Path, ModelConfig]
) -> None:
    named, original, model = checkpoint
    folder = {"named": named, "original": original, "made up": None}[layout]
    # Both layouts hold one model; made-up weights are drawn on the device, whole, whatever the share.
    whole = load(model, None if folder is None else named, 64)
    placement = place(model, sizes, [HostSpec("here", tuple(Device(f"cuda:{i}") for i in range(sizes.world)))])
    for rank in placement.ranks:
        share = load_share(model, folder, placement, rank)
        assert len(share.layers) == rank.num_layers
        for number, layer in enumerate(share.layers, start=rank.layers[0]):
            of_whole = whole.layers[number].weights
            for field in fields(layer.weights):
                got, wanted = getattr(layer.weights, field.name), getattr(of_whole, field.name)
                assert torch.equal(got, cut(field.name, wanted, model, rank)), (rank.rank, number, field.name)
                assert got.is_contiguous()
            assert layer.window == model.layer_windows[number]
        assert torch.equal(share.embedding, whole.embedding[: model.vocab_size if rank.pp_rank == 0 else 0])
        assert torch.equal(share.lm_head, whole.lm_head[slice(*rank.vocab)])
        assert share.vocab_size == model.vocab_size
        assert share.has_all_experts != sizes.expert_parallel
