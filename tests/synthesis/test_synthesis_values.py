"""The bytes of synthetic weights: fixed for ever, the same from any place, and of a plausible size."""

from __future__ import annotations

import hashlib

import model_helpers
import numpy as np
import pytest
import torch

from engine.config import parse_model_config
from engine.models.dummy import DummySource
from engine.models.gpt_oss_weights import LoadOptions, expected_tensors, load_gpt_oss
from engine.models.synthetic import SyntheticRule, synthetic_rule
from engine.synthesis.values import PIECE_BYTES, fill, make, tensor_key
from kernels.ops import ExpertWeights, Ops, PagedBatch, Prefill, probe
from kernels.reference.moe import router_topk

# sha256 of the first 100,000 bytes of tensor "t" under seed 7. These never change: checkpoints elsewhere have them.
FOREVER = {
    SyntheticRule("codes"): "53827fff8b5c3d338b91d657a339036bcaa003007f03c93d332f31ed2a2e4560",
    SyntheticRule("scales", centre=119): "79856fc108a9c10be5739b627eedd914d94f55bb77481f125c4a9c2fb4708c0f",
    SyntheticRule("normal", std=2880**-0.5): "4326b2eb82371a1e8295b1d0fcdde7efa8e8d90bb98bc5e437bb59dccf32ebc2",
}


@pytest.mark.parametrize(("rule", "digest"), FOREVER.items(), ids=lambda item: getattr(item, "kind", ""))
def test_the_bytes_never_change(rule: SyntheticRule, digest: str) -> None:
    assert hashlib.sha256(make("t", 100_000, rule, 7).tobytes()).hexdigest() == digest


def test_the_stream_is_what_numpy_promises() -> None:
    """`integers` hands the raw stream through; `random_raw` is the part with the promise of stability."""
    raw = np.random.Philox(key=tensor_key(7, "t"), counter=0).random_raw(4096)
    assert make("t", 8 * 4096, SyntheticRule("codes"), 7).tobytes() == raw.astype("<u8").tobytes()


@pytest.mark.parametrize("rule", list(FOREVER), ids=lambda rule: rule.kind)
def test_any_part_can_be_made_alone(rule: SyntheticRule) -> None:
    whole = make("t", 2 * PIECE_BYTES + 70, rule, 0)
    for begin, end in ((0, 64), (32, 4096), (PIECE_BYTES - 32, PIECE_BYTES + 96), (2 * PIECE_BYTES, len(whole))):
        part = np.empty(end - begin, dtype=np.uint8)
        fill(part, begin, rule, tensor_key(0, "t"))
        assert bytes(part) == bytes(whole[begin:end])
    with pytest.raises(ValueError, match="multiple of 32"):
        fill(np.empty(32, dtype=np.uint8), 16, rule, tensor_key(0, "t"))


def test_names_and_seeds_have_streams_of_their_own() -> None:
    rule = SyntheticRule("codes")
    streams = [make(name, 4096, rule, seed).tobytes() for name in ("a", "b", "1 a") for seed in (0, 1, 11)]
    assert len(set(streams)) == 9


def test_normal_values_are_normal() -> None:
    drawn = torch.from_numpy(make("t", 2 << 20, SyntheticRule("normal"), 3)).view(torch.bfloat16).double()
    assert float(drawn.mean()) == pytest.approx(0, abs=5e-3)
    assert float(drawn.std()) == pytest.approx(1, abs=5e-3)
    assert float((drawn.abs() > 1.95996).double().mean()) == pytest.approx(0.05, abs=2e-3)
    assert 4.0 < float(drawn.abs().max()) < 4.5
    shifted = torch.from_numpy(make("t", 2 << 20, SyntheticRule("normal", mean=1.0, std=0.1), 3)).view(torch.bfloat16)
    assert float(shifted.double().mean()) == pytest.approx(1, abs=1e-3)


def test_rounding_is_that_of_bfloat16() -> None:
    """Every quantile against torch's conversion: ties go to even."""
    from engine.synthesis.values import _bfloat16_bits, _quantiles

    values = (0.3 + 1.7 * _quantiles()).astype(np.float32)
    values[:4] = (1.00390625, 1.01171875, -1.00390625, 3.0)
    expected = torch.from_numpy(values).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    assert (_bfloat16_bits(values) == expected).all()


def test_scales_and_codes_cover_their_range_evenly() -> None:
    codes = np.bincount(make("t", 1 << 20, SyntheticRule("codes"), 0), minlength=256)
    # 4,096 expected each; 6 standard deviations: a false alarm once in 2 million runs of other seeds.
    assert np.abs(codes - 4096).max() < 6 * 64
    scales = np.bincount(make("t", 1 << 20, SyntheticRule("scales", centre=119), 0), minlength=256)
    assert scales.sum() == scales[118:121].sum()
    assert np.abs(scales[118:121] / 2**20 - np.array([85, 86, 85]) / 256).max() < 3e-3


@pytest.mark.parametrize("quantized", [True, False])
def test_products_keep_unit_vectors_at_unit_size(quantized: bool) -> None:
    """One expert of the true shape: gate_up brings size 1 to about 1, down to about a quarter, its damping."""
    torch.manual_seed(0)
    for name, rows, columns, wanted in (("gate_up_proj", 256, 2880, 1.0), ("down_proj", 256, 2880, 0.25)):
        base = f"model.layers.0.mlp.experts.{name}"
        if quantized:
            blocks_shape, scales_shape = (1, rows, columns // 32, 16), (1, rows, columns // 32)
            blocks = make(base, rows * columns // 2, synthetic_rule(base + "_blocks", blocks_shape), 0)
            scales = make(base, rows * columns // 32, synthetic_rule(base + "_scales", scales_shape), 0)
            assert int(scales.max()) <= 128
            from kernels.ops import mxfp4_expand

            weight = mxfp4_expand(
                torch.from_numpy(blocks).view(blocks_shape), torch.from_numpy(scales).view(scales_shape), torch.float32
            )[0]
        else:
            data = make(base, 2 * rows * columns, synthetic_rule(base, (1, columns, rows)), 0)
            weight = torch.from_numpy(data).view(torch.bfloat16).view(columns, rows).T.float()
        size = float((weight @ torch.randn(columns, 64)).square().mean().sqrt())
        assert wanted / 1.5 < size < wanted * 1.5


def test_routing_is_near_uniform_and_activations_stay_finite_through_24_layers() -> None:
    """Eight requests of 80 random tokens: the experts of their last tokens, the worst case that floors assume."""
    layers, num_experts, rows, length = 24, 32, 8, 80
    config = model_helpers.small_config(
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=32,
        num_local_experts=num_experts,
        num_experts_per_tok=4,
        vocab_size=2048,
        sliding_window=64,
        layer_types=None,
    )
    model = parse_model_config(config)
    weights = load_gpt_oss(
        DummySource(model, 0),
        model,
        LoadOptions(torch.float32, expand_experts=True, num_positions=128),
        lambda *_: None,
    )
    ops = Ops(probe("cpu", torch.float32))
    last = torch.arange(1, rows + 1) * length - 1
    distinct: list[int] = []
    sizes: list[float] = []
    moe_add = ops.moe_add

    def watched(
        x: torch.Tensor,
        router: torch.Tensor,
        router_bias: torch.Tensor,
        top_k: int,
        experts: ExpertWeights,
        limit: float,
        residual: torch.Tensor,
    ) -> torch.Tensor:
        distinct.append(len(router_topk(x[last], router, router_bias, top_k)[1].unique()))
        out = moe_add(x, router, router_bias, top_k, experts, limit, residual)
        sizes.append(float(out.square().mean().sqrt()))
        return out

    ops.moe_add = watched
    table = torch.zeros(rows, length + 1, dtype=torch.int64)
    table[:, 1:] = 1 + torch.arange(rows * length).view(rows, length)
    slots = table[:, 1:].flatten()
    prefills = [Prefill(row, row * length, length, 0) for row in range(rows)]
    batches = {window: PagedBatch(window, table, slots, [], [], prefills) for window in (None, 64)}
    caches = [torch.zeros(1 + rows * length, 2, 2, 32) for _ in range(layers)]
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, 2048, rows * length))
    with torch.inference_mode():
        hidden = weights.forward(
            ops, ids, torch.arange(length).repeat(rows), caches, [batches[w] for w in model.layer_windows]
        )
        logits = weights.logits(ops, hidden[last])
    uniform = num_experts * (1 - (1 - 4 / num_experts) ** rows)
    assert sum(distinct) / layers > 0.92 * uniform
    assert all(0.8 < size < 4 for size in sizes)
    assert 0.5 < float(logits.std()) < 2
    # Requests that all said the same next token would be routed alike from then on.
    assert len(set(logits.argmax(-1).tolist())) == rows


def test_every_tensor_of_gpt_oss_has_a_rule_with_room_for_exact_conversions() -> None:
    from launcher.plan.known_models import KNOWN_CONFIGS

    for config in KNOWN_CONFIGS.values():
        for name, tensor in expected_tensors(parse_model_config(config)).items():
            rule = synthetic_rule(name, tensor.shape)
            assert (rule.kind == "normal") == ("U8" not in tensor.dtypes)
            assert rule.kind != "scales" or 100 < rule.centre < 127
            assert rule.kind != "normal" or 0 < rule.std <= 1
