"""The next tokens of many rows whose vocabulary is split over ranks: each rank's best compared inside the kernel.

Knows: `sample_advance` and its buffers beyond the batch sizes of `DecodeKernels`. Refuses to know: top-k, top-p and the
like, for which somebody must see all logits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import build
from kernels.contract import KernelError
from kernels.cuda.decode import BATCH_SIZES, SAMPLE_BLOCKS, DecodeShape, DecodeState, jobs_for
from kernels.cuda.exchange import TURN_ROWS, Exchange
from kernels.cuda.launch import Kernel


class TokenExchange:
    """`sample_advance` alone, for any number of rows up to `most_rows`: the ranks' logits of their own tokens compared.

    `shape` is this rank's share. Fills `tokens` int32 [most_rows]. Raises: KernelBuildError.
    """

    def __init__(
        self, shape: DecodeShape, most_rows: int, exchange: Exchange, device: torch.device | str = "cuda"
    ) -> None:
        if most_rows > TURN_ROWS:
            raise KernelError(f"token exchange: {most_rows} rows, at most {TURN_ROWS}")
        # The number of rows means nothing to this kernel, so it is the one of any batch size.
        jobs = dict(jobs_for(shape, BATCH_SIZES[-1], device, ranks=exchange.num_ranks))
        self._sample = Kernel(build.load("sample.cu", jobs["sample.cu"]), "sample_advance", 512)
        self._exchange = exchange
        self.tokens = torch.zeros(most_rows, dtype=torch.int32, device=device)
        self._tickets = torch.zeros(most_rows, dtype=torch.int32, device=device)
        self._best = torch.zeros(most_rows * SAMPLE_BLOCKS, dtype=torch.int64, device=device)

    def sample_advance(self, state: DecodeState, logits: Tensor) -> None:
        """Sample a token for each row of logits float32 [B, V of this rank], and move the state on by one."""
        self._sample(
            (SAMPLE_BLOCKS, logits.shape[0], 1),
            logits,
            state.temperatures,
            state.seeds,
            self._best,
            self._tickets,
            self.tokens,
            state.input_ids,
            state.positions,
            state.seq_lens,
            self._exchange.arguments,
            self._exchange.first_token,
        )
