"""One engine driven to its limits in this process, measured by phase; `bench/memory_estimate.py` runs it as a child.

Reads an engine configuration (`EngineConfig` as JSON) on stdin; prints one JSON object: bytes by phase and the largest
resident size while loading and while serving. Pages mapped from checkpoint files are not counted, as they stood after
loading: the kernel takes those back as it likes.

With `--write FOLDER` it makes up the checkpoint of a folder's config.json instead.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import threading
from pathlib import Path

from engine.config import EngineConfig
from engine.core.request import EngineRequest
from engine.core.sampling_params import SamplingParams
from engine.engine_core import EngineCore
from engine.worker import cpu
from kernels.cpu.attention import MAX_GATHERED_BYTES


def status_bytes(key: str) -> int:
    """Read one line of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) << 10
    raise OSError(f"/proc/self/status has no {key}")


class AnonymousPeak:
    """The largest anonymous memory while loading, looked at every few milliseconds: pages of files come and go."""

    def __init__(self) -> None:
        self.bytes = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._done.wait(0.004):
            self.bytes = max(self.bytes, status_bytes("RssAnon"))

    def stop(self) -> int:
        """End; returns the largest figure."""
        self._done.set()
        self._thread.join()
        return self.bytes


def restart_peak() -> None:
    """Begin a new largest resident size."""
    Path("/proc/self/clear_refs").write_text("5")


def drive(core: EngineCore, config: EngineConfig, steps: int) -> None:
    """Ask for all that the limits allow: one request of full length, then as many as run at once, then two.

    The many give so many tokens that the last prompt is computed beside all others' decoding. They come at the length
    that the pool holds of all, and at the one where they just gather their keys together.
    """
    chance = random.Random(0)
    limit = core.max_model_len
    rows, block = config.scheduler.max_num_seqs, config.cache.block_size
    groups = max(1, len(set(core.model.layer_windows)))
    room = (core.facts.num_blocks - 1) // groups // rows * block - block

    def add(name: str, length: int, outputs: int) -> None:
        prompt = [chance.randrange(core.model.vocab_size) for _ in range(length)]
        sampling = SamplingParams(temperature=0.0, max_tokens=outputs, ignore_eos=True)
        refusal = core.add(EngineRequest(name, prompt, sampling, outputs, 0))
        if refusal is not None:
            raise RuntimeError(f"{name}: {refusal.error}")

    def finish() -> None:
        while core.has_work:
            core.step()

    add("long", limit - steps, steps)
    finish()
    token_bytes = 2 * core.model.num_kv_heads * core.model.head_dim * 4
    together = MAX_GATHERED_BYTES // (rows * token_bytes)
    for length in (min(limit, room), min(limit, room, together)):
        # The first still decodes when the last prompt has been computed.
        outputs = min(length // 2, steps + rows + rows * length // config.scheduler.max_num_batched_tokens)
        for row in range(rows if rows > 1 else 0):
            add(f"many {row} of {length}", max(1, length - outputs), outputs)
        finish()
    for row in range(2):
        add(f"two {row}", min(64, limit - steps), steps)
    finish()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, metavar="FOLDER")
    parser.add_argument("--available", type=int, default=0, metavar="BYTES", help="as if so much memory were free")
    arguments = parser.parse_args()
    if arguments.write is not None:
        from engine.models.dummy import write_checkpoint

        write_checkpoint(arguments.write, json.loads((arguments.write / "config.json").read_text()))
        return
    config = EngineConfig.from_json(sys.stdin.read())
    if arguments.available:
        cpu.available_memory = lambda: arguments.available
    peak = AnonymousPeak()
    core = EngineCore.start(config)
    loading = peak.stop() + status_bytes("RssFile")
    restart_peak()
    ready = status_bytes("VmRSS")
    drive(core, config, steps=2)
    facts = core.facts
    print(
        json.dumps(
            {
                "loading_bytes": loading,
                "ready_bytes": ready,
                "serving_bytes": status_bytes("VmHWM"),
                "weight_bytes": facts.weight_bytes,
                "kv_bytes": facts.kv_bytes,
                "num_blocks": facts.num_blocks,
            }
        )
    )
    sys.stdout.flush()
    core.stop()


if __name__ == "__main__":
    main()
