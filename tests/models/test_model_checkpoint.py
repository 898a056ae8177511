"""Checkpoints: the three layouts load alike, and every damage is named before anything is allocated."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import model_helpers
import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.config import ModelConfig
from engine.models.checkpoint import Checkpoint, CheckpointError
from engine.models.dummy import DummySource, write_checkpoint
from engine.models.gpt_oss import GptOss
from engine.models.gpt_oss_weights import (
    LoadOptions,
    expected_tensors,
    load_gpt_oss,
    open_source,
    original_name,
    original_tensors,
)

OPTIONS = LoadOptions(dtype=torch.float32, expand_experts=True, num_positions=64)


def load(folder: Path, model: ModelConfig, options: LoadOptions = OPTIONS) -> GptOss:
    return load_gpt_oss(open_source(Checkpoint.open(folder), model), model, options, lambda *_: None)


def tensors_of(model: GptOss) -> dict[str, torch.Tensor]:
    found = {"embedding": model.embedding, "lm_head": model.lm_head, "rope": model.rope}
    for i, (attention, moe) in enumerate(model.layers):
        for part in (attention, moe, moe.experts):
            for name in part.__slots__:
                value = getattr(part, name)
                if isinstance(value, torch.Tensor):
                    found[f"{i}.{type(part).__name__}.{name}"] = value
    return found


@pytest.fixture
def small(tmp_path: Path) -> tuple[Path, ModelConfig]:
    config = model_helpers.small_config(num_hidden_layers=2)
    return tmp_path, write_checkpoint(tmp_path, config, seed=1)


def test_sharded_and_single_files_hold_the_same_model(small: tuple[Path, ModelConfig], tmp_path: Path) -> None:
    folder, model = small
    config = model_helpers.small_config(num_hidden_layers=2)
    write_checkpoint(tmp_path / "sharded", config, seed=1, num_shards=3)
    one, three = tensors_of(load(folder, model)), tensors_of(load(tmp_path / "sharded", model))
    assert one.keys() == three.keys()
    for name in one:
        assert torch.equal(one[name], three[name]), name


def test_the_authors_own_layout_holds_the_same_model(small: tuple[Path, ModelConfig], tmp_path: Path) -> None:
    folder, model = small
    renamed: dict[str, list[torch.Tensor]] = {}
    state = load_file(folder / "model.safetensors")
    for name in expected_tensors(model):  # q, k, v in this order
        renamed.setdefault(original_name(name), []).append(state[name])
    original = tmp_path / "original"
    original.mkdir()
    save_file({name: torch.cat(parts) for name, parts in renamed.items()}, original / "model.safetensors")
    assert renamed.keys() == original_tensors(model).keys()
    one, other = tensors_of(load(folder, model)), tensors_of(load(original, model))
    for name in one:
        assert torch.equal(one[name], other[name]), name


def test_mxfp4_loads_bit_for_bit_as_transformers_expands_it(small: tuple[Path, ModelConfig]) -> None:
    from transformers import GptOssForCausalLM, Mxfp4Config

    folder, model = small
    oracle = GptOssForCausalLM.from_pretrained(
        folder, quantization_config=Mxfp4Config(dequantize=True), dtype=torch.bfloat16
    )
    options = LoadOptions(dtype=torch.bfloat16, expand_experts=True, num_positions=64)
    ours = load(folder, model, options)
    for layer, (_, moe) in zip(oracle.model.layers, ours.layers, strict=True):
        expected = layer.mlp.experts
        gates, ups = moe.experts.gate_up.transpose(1, 2).chunk(2, dim=2)  # type: ignore[union-attr]
        assert torch.equal(gates, expected.gate_up_proj[..., ::2])
        assert torch.equal(ups, expected.gate_up_proj[..., 1::2])
        assert torch.equal(moe.experts.down.transpose(1, 2), expected.down_proj)  # type: ignore[union-attr]


def test_packed_experts_keep_the_checkpoints_bytes(small: tuple[Path, ModelConfig]) -> None:
    folder, model = small
    ours = load(folder, model, LoadOptions(torch.float32, expand_experts=False, num_positions=64))
    state = load_file(folder / "model.safetensors")
    experts = ours.layers[1][1].experts
    assert experts.gate_up is None
    assert torch.equal(
        experts.gate_up_blocks,  # type: ignore[arg-type]
        state["model.layers.1.mlp.experts.gate_up_proj_blocks"],
    )
    assert ours.layers[1][1].norm is not None  # a packed weight cannot take the norm's weight in


def _rewrite(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        file = folder / "model.safetensors"
        state = load_file(file)
        change(state)
        save_file(state, file)

    return damage


def _reheader(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        file = folder / "model.safetensors"
        data = file.read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + length])
        change(header)
        text = json.dumps(header).encode()
        file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])

    return damage


def _bytes(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        file = folder / "model.safetensors"
        file.write_bytes(change(file.read_bytes()))

    return damage


def _second_file(folder: Path) -> None:
    save_file({"lm_head.weight": torch.zeros(2)}, folder / "more.safetensors")


def _pickle_only(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _double_key(data: bytes) -> bytes:
    (length,) = struct.unpack("<Q", data[:8])
    entry = b'"model.norm.weight":{"dtype":"BF16","shape":[0],"data_offsets":[0,0]},'
    header = b"{" + entry + data[9 : 8 + length]
    return struct.pack("<Q", len(header)) + header + data[8 + length :]


def _without_sinks(state: dict[str, torch.Tensor]) -> None:
    del state[LAYER + "self_attn.sinks"]


def _large_scale(state: dict[str, torch.Tensor]) -> None:
    state[LAYER + "mlp.experts.down_proj_scales"][3, 5, 2] = 253


def _overlapping(header: dict[str, Any]) -> None:
    header["model.norm.weight"]["data_offsets"] = header[LAYER + "input_layernorm.weight"]["data_offsets"]


LAYER = "model.layers.1."
DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing": (_rewrite(_without_sinks), r"sinks.*found no such tensor"),
    "extra": (_rewrite(lambda s: s.update(surplus=torch.zeros(1))), r"'surplus'.*no such tensor in this architecture"),
    "shape": (
        _rewrite(lambda s: s.update({"model.norm.weight": torch.zeros(95).bfloat16()})),
        r"model.norm.weight.*expected shape \[96\], found shape \[95\]",
    ),
    "dtype": (
        _rewrite(lambda s: s.update({LAYER + "mlp.router.bias": torch.zeros(6, dtype=torch.int32)})),
        r"router.bias.*expected dtype BF16 or F32 or F16, found dtype I32",
    ),
    "float blocks": (
        _rewrite(lambda s: s.update({LAYER + "mlp.experts.down_proj_scales": torch.zeros(6, 96, 5)})),
        r"down_proj_scales.*expected dtype U8",
    ),
    "scale 253": (
        _rewrite(_large_scale),
        r"down_proj_scales.*scales up to 252, found scale 253",
    ),
    "truncated": (_bytes(lambda data: data[:-5]), r"expected a file of \d+ bytes, found \d+ bytes"),
    "longer": (_bytes(lambda data: data + b"\0"), r"expected a file of \d+ bytes"),
    "empty": (_bytes(lambda data: b""), r"a safetensors header, found a file of 0 bytes"),
    "header length": (_bytes(lambda data: b"\xff" * 8 + data[8:]), r"a header of at most"),
    "header text": (_bytes(lambda data: data[:8] + b"?" + data[9:]), r"a safetensors header in JSON"),
    "twice in one file": (_bytes(_double_key), r"model.norm.weight.*one definition, found two"),
    "twice in two files": (_second_file, r"lm_head.weight.*one definition, found another in model.safetensors"),
    "overlap": (
        _reheader(_overlapping),
        r"expected data from byte \d+, found data from byte",
    ),
    "wrong size": (
        _reheader(lambda h: h["model.norm.weight"].update(shape=[97])),
        r"model.norm.weight.*194 bytes for BF16 \[97\], found 192 bytes",
    ),
    "unknown dtype": (_reheader(lambda h: h["model.norm.weight"].update(dtype="F8_E5M2")), r"found dtype F8_E5M2"),
    "malformed entry": (_reheader(lambda h: h.update({"model.norm.weight": 3})), r"a malformed entry"),
    "pickle": (_pickle_only, r"expected safetensors files, found only pytorch_model.bin"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named(small: tuple[Path, ModelConfig], damage: str) -> None:
    folder, model = small
    hurt, message = DAMAGES[damage]
    hurt(folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        load(folder, model)
    assert str(folder) in caught.value.file or caught.value.file == OPTIONS.where
    if damage == "pickle":
        assert "never read" in caught.value.hint


def test_damage_to_an_index_is_named(tmp_path: Path) -> None:
    config = model_helpers.small_config(num_hidden_layers=2)
    model = write_checkpoint(tmp_path, config, seed=1, num_shards=2)
    index_file = tmp_path / "model.safetensors.index.json"
    index = json.loads(index_file.read_text())
    first, second = (tmp_path / f"model-0000{i}-of-00002.safetensors" for i in (1, 2))

    def expect(message: str, weight_map: Any = None) -> None:
        index_file.write_text(json.dumps({"weight_map": weight_map or index["weight_map"]}))
        with pytest.raises(CheckpointError, match=message):
            load(tmp_path, model)

    swapped = {n: second.name if f == first.name else first.name for n, f in index["weight_map"].items()}
    expect(r"expected it in .*00002-of-00002", swapped)
    promised = index["weight_map"] | {"x": first.name}
    expect(r"the tensor that model.safetensors.index.json promises, found nothing", promised)
    expect(r"the name of a safetensors file in this folder", index["weight_map"] | {"x": "../x.safetensors"})
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)
    expect(r"expected it in")
    second.unlink()
    expect(r"the shard that model.safetensors.index.json names, found no such file")
    index_file.write_text("[]")
    with pytest.raises(CheckpointError, match="a weight_map"):
        load(tmp_path, model)


def test_nothing_is_read_before_all_headers_have_passed(
    small: tuple[Path, ModelConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, model = small
    DAMAGES["extra"][0](folder)
    monkeypatch.setattr(Checkpoint, "get", lambda *_: pytest.fail("a tensor was read"))
    with pytest.raises(CheckpointError):
        load(folder, model)


def test_dummy_weights_do_not_depend_on_the_order_of_loading() -> None:
    model = model_helpers.parse_model_config(model_helpers.small_config())
    source = DummySource(model, seed=4)
    name = "model.layers.2.self_attn.q_proj.weight"
    first = source.get(name)
    source.get("lm_head.weight")
    assert torch.equal(first, source.get(name))
    assert not torch.equal(first, DummySource(model, seed=5).get(name))
