"""The weights of a layer's experts as MoE ops take them: expanded, or packed as MXFP4.

Expanded gate_up rows (and all gate_up biases) hold the gates first, then the ups. Packed rows keep the checkpoint's
order, gate and up interleaved, since they are never repacked.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from kernels.reference.mxfp4 import mxfp4_expand


@dataclass(slots=True)
class ExpertWeights:
    """E experts of one layer.

    Shapes: gate_up_bias [E, 2 I], down_bias [E, H]; expanded: gate_up [E, 2 I, H], down [E, H, I]; packed:
    gate_up_blocks uint8 [E, 2 I, H/32, 16], gate_up_scales uint8 [E, 2 I, H/32], down_* likewise with I/32.
    `prepared` belongs to the specs: what they made of the weights, by spec name. `first` is the router's id of the
    first of these experts; others that tokens are sent to are another rank's and add nothing here.
    """

    gate_up_bias: Tensor
    down_bias: Tensor
    gate_up: Tensor | None = None
    down: Tensor | None = None
    gate_up_blocks: Tensor | None = None
    gate_up_scales: Tensor | None = None
    down_blocks: Tensor | None = None
    down_scales: Tensor | None = None
    prepared: dict[str, object] = field(default_factory=dict)
    first: int = 0

    @property
    def num_experts(self) -> int:
        return self.down_bias.shape[0]

    @property
    def is_empty(self) -> bool:
        """Whether these are no experts, or experts without columns."""
        return self.gate_up_bias.numel() == 0

    def expert(self, index: int) -> tuple[Tensor, Tensor]:
        """Give gate_up [2 I, H] (gates first) and down [H, I] of one expert, expanding when packed."""
        if self.gate_up is not None and self.down is not None:
            return self.gate_up[index], self.down[index]
        if self.gate_up_blocks is None or self.gate_up_scales is None or self.down_blocks is None:
            raise ValueError("experts hold neither expanded nor packed weights")
        if self.down_scales is None:
            raise ValueError("packed experts lack down_scales")
        one = slice(index, index + 1)
        dtype = self.down_bias.dtype
        gate_up = mxfp4_expand(self.gate_up_blocks[one], self.gate_up_scales[one], dtype)[0]
        down = mxfp4_expand(self.down_blocks[one], self.down_scales[one], dtype)[0]
        return gates_first(gate_up), down


def gates_first(interleaved: Tensor) -> Tensor:
    """Reorder rows (dimension 0) gate, up, gate, up, … to all gates, then all ups."""
    rows = interleaved.shape[0]
    return interleaved.reshape(rows // 2, 2, *interleaved.shape[1:]).transpose(0, 1).reshape(interleaved.shape)
