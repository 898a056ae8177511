"""What the sampler remembers of one row: its options, and token counts when a penalty needs them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.core.plan import AdmittedRow
from engine.core.sampling_params import SamplingParams


class RowSampling:
    """Sampling state of one row.

    `is_plain_greedy`: the row takes the argmax of its raw logits and reports nothing else.
    `adjusts`: the logits must be changed before a token is chosen. `output_counts` float32 [V] and `seen` bool [V]
    exist only when a penalty needs them; presence and frequency count output tokens, repetition sees prompt and output.
    """

    __slots__ = (
        "adjusts",
        "bans",
        "bias_ids",
        "bias_values",
        "is_plain_greedy",
        "num_outputs",
        "num_tokens",
        "output_counts",
        "params",
        "seed",
        "seen",
    )

    def __init__(self, admitted: AdmittedRow, vocab_size: int, device: torch.device | str = "cpu") -> None:
        params = admitted.params

        def tensor(values: Sequence[float], dtype: torch.dtype) -> Tensor:
            return torch.tensor(values, dtype=dtype).to(device)

        self.params: SamplingParams = params
        self.seed = admitted.seed
        self.num_tokens = len(admitted.token_ids)
        self.num_outputs = self.num_tokens - admitted.num_prompt_tokens
        # Ids outside the vocabulary have no logit to change.
        bias = {token: value for token, value in params.logit_bias.items() if token < vocab_size}
        self.bias_ids = tensor(list(bias), torch.int64) if bias else None
        self.bias_values = tensor(list(bias.values()), torch.float32) if bias else None
        stops = [token for token in admitted.stop_token_ids if token < vocab_size]
        self.bans = tensor(stops, torch.int64) if stops and params.min_tokens > 0 else None
        self.output_counts: Tensor | None = None
        self.seen: Tensor | None = None
        if params.has_penalties:
            tokens = tensor(admitted.token_ids, torch.int64)
            outputs = tokens[admitted.num_prompt_tokens :]
            self.output_counts = torch.zeros(vocab_size, device=device)
            self.output_counts.index_add_(0, outputs, torch.ones(len(outputs), device=device))
            self.seen = torch.zeros(vocab_size, dtype=torch.bool, device=device)
            self.seen.index_fill_(0, tokens, True)
        self.adjusts = bool(bias) or self.bans is not None or params.has_penalties
        self.is_plain_greedy = params.is_greedy and not self.adjusts and params.logprobs is None

    def append(self, token: int) -> None:
        """Note a token that was sampled for this row."""
        self.num_tokens += 1
        self.num_outputs += 1
        if self.output_counts is not None and self.seen is not None:
            self.output_counts[token] += 1
            self.seen[token] = True

    def append_on_device(self, token: Tensor) -> None:
        """Note a sampled token, int64 [1], whose id only the device knows."""
        self.num_tokens += 1
        self.num_outputs += 1
        if self.output_counts is not None and self.seen is not None:
            self.output_counts.index_add_(0, token, torch.ones(1, device=token.device))
            self.seen.index_fill_(0, token, True)

    def adjust_(self, logits: Tensor) -> None:
        """Change one row's logits [V] in place: repetition, frequency, presence, then bias, then banned stop ids."""
        params = self.params
        if self.output_counts is not None and self.seen is not None:
            if params.repetition_penalty != 1.0:
                factor = params.repetition_penalty
                penalized = torch.where(logits > 0, logits / factor, logits * factor)
                torch.where(self.seen, penalized, logits, out=logits)
            if params.frequency_penalty:
                logits.sub_(self.output_counts, alpha=params.frequency_penalty)
            if params.presence_penalty:
                logits.sub_((self.output_counts > 0).float(), alpha=params.presence_penalty)
        if self.bias_ids is not None and self.bias_values is not None:
            logits.index_add_(0, self.bias_ids, self.bias_values)
        if self.bans is not None and self.num_outputs < params.min_tokens:
            logits.index_fill_(0, self.bans, float("-inf"))
