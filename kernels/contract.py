"""What an op accepts: names, dtypes and shapes of its tensors, matched at the door and trusted inside.

Knows: the small shape language below. Refuses to know: any op, any device.

    "float [T, H]"        a float32 or bfloat16 tensor; T and H bind on first use and must agree afterwards
    "int64 [B, _]"        `_` matches anything
    "float32 [T, H/2]"    integers and `X*n`, `X/n` of a symbol that is bound already
    "float [H]?"          may be None

Errors:

    KernelError
    ├── ContractViolation      a caller gave an op what it does not accept
    ├── RegistrationError      a spec without reference twin, or two specs of one name
    └── NoKernelError          no registered spec fits the platform
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch

_DTYPES: dict[str, tuple[torch.dtype, ...]] = {
    "float": (torch.float32, torch.bfloat16),
    "float32": (torch.float32,),
    "int64": (torch.int64,),
    "complex64": (torch.complex64,),
    "uint8": (torch.uint8,),
}
_PATTERN = re.compile(r"^(\w+) \[(.*)\](\?)?$")


class KernelError(Exception):
    """Root of the errors of this package."""


class ContractViolation(KernelError):  # noqa: N818 - named by the house vocabulary
    """An argument does not meet an op's contract. The message names op, argument, what was expected and found."""

    def __init__(self, op: str, argument: str, expected: str, found: str) -> None:
        super().__init__(f"{op}: argument {argument!r}: expected {expected}, found {found}")
        self.op = op
        self.argument = argument
        self.expected = expected
        self.found = found


class RegistrationError(KernelError):
    """A kernel spec cannot be registered."""


class NoKernelError(KernelError):
    """No spec of an op serves a platform."""


@dataclass(frozen=True, slots=True)
class TensorContract:
    """One parsed line of the shape language."""

    text: str
    dtypes: tuple[torch.dtype, ...]
    dims: tuple[str, ...]
    optional: bool

    @classmethod
    def parse(cls, text: str) -> TensorContract:
        """Read one line of the shape language. Raises: ValueError on anything else."""
        match = _PATTERN.match(text)
        if match is None or match[1] not in _DTYPES:
            raise ValueError(f"not a tensor contract: {text!r}")
        dims = tuple(dim.strip() for dim in match[2].split(",")) if match[2].strip() else ()
        return cls(text, _DTYPES[match[1]], dims, match[3] is not None)


class Contract:
    """The tensors of one op. `check` raises ContractViolation on the first argument that does not fit."""

    def __init__(self, op: str, tensors: Mapping[str, str]) -> None:
        self.op = op
        self.tensors = {name: TensorContract.parse(text) for name, text in tensors.items()}

    def check(self, arguments: Mapping[str, object]) -> None:
        """Match all tensors of a call against the contract."""
        bound: dict[str, int] = {}
        for name, contract in self.tensors.items():
            value = arguments.get(name)
            if value is None and contract.optional:
                continue
            if not isinstance(value, torch.Tensor):
                raise ContractViolation(self.op, name, contract.text, type(value).__name__)
            found = f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
            fits = value.dtype in contract.dtypes and value.dim() == len(contract.dims)
            if not fits or not all(_matches(d, s, bound) for d, s in zip(contract.dims, value.shape, strict=True)):
                symbols = ", ".join(f"{key}={size}" for key, size in bound.items())
                raise ContractViolation(self.op, name, f"{contract.text} with {symbols or 'no symbol bound'}", found)


def _matches(dim: str, size: int, bound: dict[str, int]) -> bool:
    if dim == "_":
        return True
    if dim.isdigit():
        return size == int(dim)
    for sign in "*/":
        symbol, operator, factor = dim.partition(sign)
        if operator:
            base = bound.get(symbol)
            if base is None:
                return True
            return size == (base * int(factor) if sign == "*" else base // int(factor))
    return bound.setdefault(dim, size) == size
