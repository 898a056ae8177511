"""Train tiny-oss: `python -m tools.tiny_oss.train --device cuda`, or `--small --device cpu` for a quick run.

Knows: the schedule, the loss and the progress report; writes a Hugging Face folder.
Refuses to know: what the data says (`data.py`) and how it is judged (`evaluate.py`).

The experts train through MXFP4 (straight-through) for the second half, so that the exported model is the trained one.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tools.tiny_oss.attention import dense_attends, flex_attends
from tools.tiny_oss.data import FIRST, LEARNT, PADDING, TEXT, Rows, make_dataset, split_text, tokenizer_texts
from tools.tiny_oss.export import export, load_weights, save_checkpoint
from tools.tiny_oss.model import Attend, TinyOss, TinyOssConfig
from tools.tiny_oss.optim import make_optimizers
from tools.tiny_oss.tokenizer import control_ids, load_tokenizer, save_tokenizer, train_tokenizer

ASSET_FOLDER = Path(__file__).resolve().parents[2] / "engine" / "assets" / "tiny_oss"
NUM_MERGES, NUM_TWINS, TOKENIZER_CONVERSATIONS = 1500, 1200, 20_000
BALANCE_WEIGHT = 0.01


@dataclass(frozen=True)
class Settings:
    """One training run; lengths are tokens, `rows` are packed rows of `row_tokens`."""

    steps: int = 4200
    rows_per_step: int = 32
    row_tokens: int = 2048
    dataset_rows: int = 49_152
    learning_rate: float = 3e-3
    weight_decay: float = 0.1
    warmup_steps: int = 300
    quantized_from: float = 0.6
    text_dropout: float = 0.25
    prompt_weight: float = 0.03
    clip: float = 1.0
    seed: int = 1


@dataclass(frozen=True)
class Batch:
    """Packed rows on the device, all [B, T]; the loss weight at t is that of predicting token t + 1."""

    tokens: Tensor
    targets: Tensor
    weights: Tensor
    positions: Tensor
    documents: Tensor
    keep: Tensor


def make_batch(tokens: np.ndarray, flags: np.ndarray, settings: Settings, device: torch.device) -> Batch:
    """Move rows to the device and derive what training needs from the flags."""
    ids = torch.from_numpy(tokens.astype(np.int64)).to(device, non_blocking=True)
    marks = torch.from_numpy(flags).to(device, non_blocking=True)
    is_first = (marks & FIRST) > 0
    documents = is_first.cumsum(1)
    index = torch.arange(ids.shape[1], device=device).expand_as(ids)
    positions = index - torch.where(is_first, index, 0).cummax(1).values
    weights = torch.where((marks & LEARNT) > 0, 1.0, settings.prompt_weight)
    weights = weights.masked_fill(is_first | ((marks & PADDING) > 0), 0.0).roll(-1, 1)
    weights[:, -1] = 0.0
    keep = torch.where((marks & TEXT) > 0, 1.0 - settings.text_dropout, 1.0).unsqueeze(-1)
    return Batch(ids, ids.roll(-1, 1), weights, positions, documents, keep)


def shuffled_batches(rows: Rows, size: int, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield batches of rows for ever, in a new order each time through."""
    rng = np.random.default_rng(seed)
    while True:
        order = rng.permutation(len(rows.tokens))
        for begin in range(0, len(order) - size + 1, size):
            chosen = np.sort(order[begin : begin + size])
            yield rows.tokens[chosen], rows.flags[chosen]


def weighted_loss(model: TinyOss, batch: Batch, attends: tuple[Attend, Attend]) -> tuple[Tensor, Tensor]:
    """Return the mean weighted cross-entropy in nats and the balance loss."""
    hidden, balance = model(batch.tokens, batch.positions, batch.keep, attends)
    logits = model.lm_head(hidden).float()
    losses = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), reduction="none")
    weights = batch.weights.flatten()
    return (losses * weights).sum() / weights.sum().clamp(min=1.0), balance


def learning_rate_factor(step: int, settings: Settings) -> float:
    """Return the factor on the learning rate: linear warm-up, then cosine down to 1 %."""
    if step < settings.warmup_steps:
        return (step + 1) / settings.warmup_steps
    progress = (step - settings.warmup_steps) / max(1, settings.steps - settings.warmup_steps)
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


@torch.no_grad()
def held_out_loss(model: TinyOss, folder: Path, device: torch.device, window: int = 512) -> tuple[float, float]:
    """Return nats per token and bits per byte on the held-out text.

    Windows overlap by half and only the second half of each counts, so every prediction has 256 tokens or more
    of context.
    """
    _, text = split_text()
    ids = torch.tensor(load_tokenizer(folder).encode(text, add_special_tokens=False).ids, device=device)
    tokens = ids.unfold(0, window + 1, window // 2)
    total, count = 0.0, 0
    for part in torch.split(tokens, 8):
        inputs, targets = part[:, :-1], part[:, 1:]
        attends = dense_attends(torch.zeros_like(inputs), model.config.sliding_window)
        positions = torch.arange(window, device=device).expand_as(inputs)
        keep = torch.ones(*inputs.shape, 1, device=device)
        hidden, _ = model(inputs, positions, keep, attends)
        logits = model.lm_head(hidden[:, window // 2 :]).float()
        losses = F.cross_entropy(logits.flatten(0, 1), targets[:, window // 2 :].flatten(), reduction="none")
        total += float(losses.sum())
        count += losses.numel()
    nats = total / count
    return nats, nats / math.log(2) * len(ids) / len(text.encode())


def train(
    model: TinyOss,
    rows: Rows,
    settings: Settings,
    folder: Path,
    make_attends: Callable[[Tensor, int], tuple[Attend, Attend]] = dense_attends,
    use_compile: bool = False,
    checkpoint: Path | None = None,
    report: Callable[[str], None] = print,
) -> list[float]:
    """Train in place and return the loss of every step."""
    device = next(model.parameters()).device
    optimizers = make_optimizers(model, settings.learning_rate, settings.weight_decay)
    batches = shuffled_batches(rows, settings.rows_per_step, settings.seed)
    compute_loss = torch.compile(weighted_loss, dynamic=False) if use_compile else weighted_loss
    losses: list[Tensor] = []
    started = time.monotonic()
    for step in range(settings.steps):
        model.set_quantized(step >= settings.quantized_from * settings.steps)
        factor = learning_rate_factor(step, settings)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate * factor
        batch = make_batch(*next(batches), settings, device)
        attends = make_attends(batch.documents, model.config.sliding_window)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss, balance = compute_loss(model, batch, attends)
        torch.autograd.backward(loss + BALANCE_WEIGHT * balance)
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())
        if step % max(1, settings.steps // 50) == 0 or step == settings.steps - 1:
            elapsed = time.monotonic() - started
            rate = (step + 1) * settings.rows_per_step * settings.row_tokens / elapsed
            line = f"step {step:5d}  loss {float(loss.detach()):.4f}  balance {float(balance.detach()):.3f}"
            line += f"  {rate / 1e3:.0f}k tok/s"
            if step % max(1, settings.steps // 10) == 0 and device.type == "cuda":
                with torch.autocast("cuda", torch.bfloat16):
                    nats, bits = held_out_loss(model, folder, device)
                line += f"  held-out {nats:.4f} nats/token {bits:.4f} bits/byte"
                if checkpoint is not None:
                    save_checkpoint(model, checkpoint)
            report(f"{line}  {elapsed:.0f}s")
    return [float(loss) for loss in losses]


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """Read the command line; `--small` means a run of a minute on two CPU cores."""
    parser = argparse.ArgumentParser(prog="python -m tools.tiny_oss.train", description=__doc__)
    defaults = Settings()
    parser.add_argument("--out", type=Path, default=ASSET_FOLDER, help="folder to write (default: the bundled model)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=None, help=f"default {defaults.steps}, with --small 60")
    parser.add_argument("--rows", type=int, default=None, help="packed rows of 2048 tokens to generate")
    parser.add_argument("--batch", type=int, default=None, help="rows per step")
    parser.add_argument("--lr", type=float, default=defaults.learning_rate)
    parser.add_argument("--decay", type=float, default=defaults.weight_decay, help="weight decay")
    parser.add_argument("--only", default="", help="train only parameters whose name contains this")
    parser.add_argument("--prompt-weight", type=float, default=defaults.prompt_weight, help="loss weight of prompts")
    parser.add_argument("--quantized-from", type=float, default=defaults.quantized_from, help="share of the steps")
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--workers", type=int, default=1, help="processes that generate data")
    parser.add_argument("--init", type=Path, default=None, help="start from this model.safetensors or checkpoint")
    parser.add_argument("--checkpoint", type=Path, default=None, help="safetensors file to write ten times on the way")
    parser.add_argument("--small", action="store_true", help="few short rows, for a CPU")
    parser.add_argument("--compile", action="store_true", help="use torch.compile (and FlexAttention on CUDA)")
    parser.add_argument("--tokenizer", action="store_true", help="train a new tokenizer even if --out has one")
    return parser.parse_args(argv)


def make_settings(arguments: argparse.Namespace) -> Settings:
    """Turn the command line into settings."""
    base = Settings(steps=60, rows_per_step=4, row_tokens=512, dataset_rows=256, warmup_steps=10)
    base = base if arguments.small else Settings()
    return Settings(
        steps=arguments.steps or base.steps,
        rows_per_step=arguments.batch or base.rows_per_step,
        row_tokens=base.row_tokens,
        dataset_rows=arguments.rows or base.dataset_rows,
        learning_rate=arguments.lr,
        warmup_steps=min(base.warmup_steps, max(1, (arguments.steps or base.steps) // 10)),
        weight_decay=arguments.decay,
        quantized_from=arguments.quantized_from,
        prompt_weight=arguments.prompt_weight,
        seed=arguments.seed,
    )


def main(argv: list[str]) -> int:
    """Train and export."""
    arguments = parse_arguments(argv)
    settings = make_settings(arguments)
    folder: Path = arguments.out
    folder.mkdir(parents=True, exist_ok=True)
    if arguments.tokenizer or not (folder / "tokenizer.json").exists():
        save_tokenizer(train_tokenizer(tokenizer_texts(0, TOKENIZER_CONVERSATIONS), NUM_MERGES, NUM_TWINS), folder)
    tokenizer = load_tokenizer(folder)
    started = time.monotonic()
    rows = make_dataset(settings.seed, settings.dataset_rows, folder, arguments.workers, settings.row_tokens)
    print(f"data: {rows.tokens.size / 1e6:.1f} M tokens in {time.monotonic() - started:.0f} s", flush=True)
    torch.manual_seed(settings.seed)
    torch.set_float32_matmul_precision("high")
    device = torch.device(arguments.device)
    model = TinyOss(TinyOssConfig(vocab_size=tokenizer.get_vocab_size())).to(device)
    is_flex = arguments.compile and device.type == "cuda"
    make_attends = flex_attends if is_flex else dense_attends
    if arguments.init is not None:
        load_weights(model, arguments.init)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(arguments.only in name)
    report = partial(print, flush=True)
    train(model, rows, settings, folder, make_attends, arguments.compile, arguments.checkpoint, report)
    model.set_quantized(True)
    nats, bits = held_out_loss(model, folder, device)
    size = export(model, control_ids(tokenizer), folder)
    print(f"held-out {nats:.4f} nats/token, {bits:.4f} bits/byte; {size / 1e6:.2f} MB of weights in {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
