"""The door: contracts, selection, and that no spec exists without its reference."""

from __future__ import annotations

import pytest
import torch
from kernel_helpers import CPU, REFERENCE_ONLY

from kernels import ops
from kernels.contract import Contract, ContractViolation, RegistrationError
from kernels.ops import ALL_OPS, Ops, explain
from kernels.platform import Platform
from kernels.registry import Band, Op


def test_every_op_has_exactly_one_reference_and_a_docstring() -> None:
    for op in ALL_OPS:
        assert [spec.name for spec in op.specs if spec.band is Band.REFERENCE] == ["reference"]
        assert op.__doc__
        assert getattr(ops, op.name) is op


def test_a_spec_cannot_take_the_reference_band_or_a_used_name() -> None:
    op = Op(lambda x: x, {})
    with pytest.raises(RegistrationError, match="REFERENCE band"):
        op.register("fast", Band.REFERENCE, lambda _: lambda x: x, lambda _: None)
    op.register("fast", Band.OPTIMIZED, lambda _: lambda x: x, lambda _: None)
    with pytest.raises(RegistrationError, match="already"):
        op.register("fast", Band.OPTIMIZED, lambda _: lambda x: x, lambda _: None)


def test_a_spec_with_another_signature_is_refused_when_bound() -> None:
    def double(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    op = Op(double, {"x": "float [T]"})
    op.register("odd", Band.OPTIMIZED, lambda _: lambda y, z: y, lambda _: None)  # type: ignore[arg-type, return-value]
    with pytest.raises(RegistrationError, match="arguments of its reference"):
        op.bind(CPU)


def test_the_highest_fitting_band_wins_and_the_choice_is_explained() -> None:
    lines = explain(CPU, "paged_attention")
    assert [(line.name, line.is_selected) for line in lines] == [("cpu_flash", True), ("reference", False)]
    assert "highest band" in lines[0].reason
    lines = explain(Platform("cpu", torch.bfloat16, True, True), "moe_add")
    assert lines[0].name == "reference"
    assert "float32 only" in lines[1].reason
    lines = explain(REFERENCE_ONLY, "logits")
    assert lines[0].name == "reference"
    assert "oneDNN" in lines[1].reason
    assert {line.op for line in explain(CPU)} == {op.name for op in ALL_OPS}


@pytest.mark.parametrize(
    ("text", "shape", "dtype"),
    [
        ("float [T, H]", (2,), torch.float32),
        ("float [T, T]", (2, 3), torch.float32),
        ("float [T, 2]", (2, 3), torch.float32),
        ("float [T, T*2]", (2, 5), torch.float32),
        ("int64 [T]", (2,), torch.int32),
        ("float32 [T]", (2,), torch.bfloat16),
    ],
)
def test_a_tensor_outside_the_contract_is_named(text: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    with pytest.raises(ContractViolation, match="op: argument 'x': expected"):
        Contract("op", {"x": text}).check({"x": torch.zeros(shape, dtype=dtype)})


def test_contract_binds_symbols_across_arguments() -> None:
    contract = Contract("op", {"x": "float [T, H]", "w": "float [H]?", "y": "float [T, H/2]"})
    contract.check({"x": torch.zeros(2, 4), "w": None, "y": torch.zeros(2, 2)})
    with pytest.raises(ContractViolation, match="argument 'w'.*H=4"):
        contract.check({"x": torch.zeros(2, 4), "w": torch.zeros(3)})
    with pytest.raises(ContractViolation, match="NoneType"):
        contract.check({"x": None})


def test_the_checked_ops_refuse_what_the_bare_ones_would_not_see() -> None:
    bare = Ops(CPU)
    with pytest.raises(ContractViolation, match="rms_norm: argument 'weight'"):
        bare.checked().rms_norm(torch.ones(2, 8), torch.ones(4), 1e-5)
    assert torch.equal(
        bare.checked().rms_norm(torch.ones(2, 8), None, 1e-5), bare.rms_norm(torch.ones(2, 8), None, 1e-5)
    )
