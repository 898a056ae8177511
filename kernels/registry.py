"""Which implementation of an op runs: specs in priority bands, chosen by platform, and able to say why.

Knows: ops, their reference, their specs. Refuses to know: what any of them computes.

An `Op` is made from its reference function, which fixes name, signature and meaning; so a spec without a reference twin
has nothing to register with. `Op.__call__` is the checked door; `Op.bind` gives the chosen function itself, for loops
that have checked their shapes once.
"""

from __future__ import annotations

import enum
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, ParamSpec, TypeVar

import torch

from kernels.contract import Contract, NoKernelError, RegistrationError
from kernels.platform import Platform, probe

P = ParamSpec("P")
R = TypeVar("R")


class Band(enum.IntEnum):
    """How specialised a spec is; a higher band wins."""

    REFERENCE = 0
    PORTABLE = 10
    OPTIMIZED = 20
    SPECIALIZED = 30


@dataclass(frozen=True, slots=True)
class KernelSpec:
    """One implementation of an op. `unfit(platform)` gives the reason not to use it there, or None.

    `create(platform)` makes the function; what it keeps between calls lives as long as that function does.
    """

    op: str
    name: str
    band: Band
    create: Callable[[Platform], Callable[..., Any]]
    unfit: Callable[[Platform], str | None]


@dataclass(frozen=True, slots=True)
class Candidate:
    """One line of an explanation: a spec, whether it was chosen, and why or why not."""

    op: str
    name: str
    band: Band
    is_selected: bool
    reason: str


class Op(Generic[P, R]):
    """A public op: contract, reference, and any number of faster specs with the same signature."""

    def __init__(self, reference: Callable[P, R], tensors: dict[str, str]) -> None:
        self.name = reference.__name__
        self.reference = reference
        self.contract = Contract(self.name, tensors)
        self.__doc__ = reference.__doc__
        self._signature = inspect.signature(reference)
        self._specs = [KernelSpec(self.name, "reference", Band.REFERENCE, lambda _: reference, lambda _: None)]
        unknown = set(tensors) - set(self._signature.parameters)
        if unknown:
            raise RegistrationError(f"{self.name}: the contract names unknown arguments {sorted(unknown)}")

    @property
    def specs(self) -> tuple[KernelSpec, ...]:
        return tuple(self._specs)

    def register(
        self,
        name: str,
        band: Band,
        create: Callable[[Platform], Callable[P, R]],
        unfit: Callable[[Platform], str | None],
    ) -> None:
        """Add a faster spec. Raises: RegistrationError on a used name or the REFERENCE band."""
        if band is Band.REFERENCE:
            raise RegistrationError(f"{self.name}: only the reference itself lives in the REFERENCE band")
        if any(spec.name == name for spec in self._specs):
            raise RegistrationError(f"{self.name}: a spec {name!r} is registered already")
        self._specs.append(KernelSpec(self.name, name, band, create, unfit))

    def select(self, platform: Platform) -> KernelSpec:
        """Choose the fitting spec of the highest band; among equals the one registered last."""
        fitting = [spec for spec in self._specs if spec.unfit(platform) is None]
        if not fitting:
            raise NoKernelError(f"{self.name}: no kernel for {platform}")
        best = fitting[0]
        for spec in fitting[1:]:
            if spec.band >= best.band:
                best = spec
        return best

    def explain(self, platform: Platform) -> list[Candidate]:
        """List all specs with the reason for or against each, the chosen one first."""
        chosen = self.select(platform)
        lines = []
        for spec in self._specs:
            if spec is chosen:
                lines.append(Candidate(self.name, spec.name, spec.band, True, f"highest band that fits {platform}"))
            else:
                reason = spec.unfit(platform) or f"{chosen.name} stands in band {chosen.band.name}"
                lines.append(Candidate(self.name, spec.name, spec.band, False, reason))
        return sorted(lines, key=lambda line: (not line.is_selected, -line.band))

    def bind(self, platform: Platform) -> Callable[P, R]:
        """Make the chosen spec's function, bare: for loops that check their shapes once."""
        function: Callable[P, R] = self.select(platform).create(platform)
        if list(inspect.signature(function).parameters) != list(self._signature.parameters):
            raise RegistrationError(f"{self.name}: a spec does not take the arguments of its reference")
        return function

    def behind_contract(self, function: Callable[P, R]) -> Callable[P, R]:
        """Put the contract in front of a bound function."""

        def door(*args: P.args, **kwargs: P.kwargs) -> R:
            self.contract.check(self._signature.bind(*args, **kwargs).arguments)
            result: R = function(*args, **kwargs)
            return result

        return door

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Check the contract, choose a spec for the first tensor's platform, and run it."""
        arguments = self._signature.bind(*args, **kwargs).arguments
        self.contract.check(arguments)
        tensor = next((value for value in arguments.values() if isinstance(value, torch.Tensor)), None)
        floating = next((v for v in arguments.values() if isinstance(v, torch.Tensor) and v.is_floating_point()), None)
        kind = "cuda" if tensor is not None and tensor.is_cuda else "cpu"
        dtype = floating.dtype if floating is not None else torch.float32
        return self.bind(probe("cuda" if kind == "cuda" else "cpu", dtype))(*args, **kwargs)
