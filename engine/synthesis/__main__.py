"""`python -m engine.synthesis`: one job as JSON on stdin; progress and the outcome as JSON lines on stdout.

The process that `hlaunch synth` starts, since it needs numpy and the list of a model's tensors.

    in    {"folder", "config", "generation_config", "seed", "model", "threads", "shard_bytes", "tokenizer_folder"}
    out   {"event": "progress", "done", "total"} … {"event": "done", …} or {"event": "error", "kind", "message", "hint"}

Exit status: 0 done, 1 failed (an error line says why).
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from engine.config import ConfigError, parse_model_config
from engine.synthesis.stand_in import MIN_VOCAB_SIZE, stand_in_tokenizer
from engine.synthesis.writer import SHARD_BYTES, Job, SynthesisError, SyntheticTensor, write_synthetic

REPORT_EVERY_SECONDS = 0.1
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)


def main() -> int:
    # Ctrl-C reaches the whole terminal: the launcher decides, and closing stdout or SIGTERM ends this process.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    request = json.load(sys.stdin)
    try:
        say("done", **run(request))
    except SynthesisError as error:
        say("error", kind=type(error).__name__, message=str(error), hint=error.hint)
        return 1
    except ConfigError as error:
        say("error", kind="ConfigError", message=str(error), hint=error.hint)
        return 1
    except BrokenPipeError:
        # Nobody reads any more: the launcher has gone, and so do we. What is whole stays for the next run.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        say("error", kind="OSError", message=f"{error.filename or request['folder']}: {error.strerror}", hint="")
        return 1
    return 0


def run(request: dict[str, Any]) -> dict[str, Any]:
    """Write the checkpoint that a request asks for and say what came of it."""
    begin = time.perf_counter()
    config = request["config"]
    tensors = model_tensors(config)
    tokenizer, files = _tokenizer(request.get("tokenizer_folder"), int(config["vocab_size"]))
    if request.get("generation_config"):
        files["generation_config.json"] = (json.dumps(request["generation_config"], indent=2) + "\n").encode()
    job = Job(
        folder=Path(request["folder"]),
        config=config,
        tensors=tensors,
        seed=int(request["seed"]),
        model=str(request.get("model", "")),
        shard_bytes=int(request.get("shard_bytes") or SHARD_BYTES),
        files=files,
    )
    threads = int(request.get("threads") or len(os.sched_getaffinity(0)))
    said_at = 0.0

    def progress(done: int, total: int) -> None:
        nonlocal said_at
        now = time.perf_counter()
        if now - said_at >= REPORT_EVERY_SECONDS or done == total:
            said_at = now
            say("progress", done=done, total=total)

    outcome = write_synthetic(job, threads, progress)
    return {
        "folder": str(job.folder),
        "model": job.model,
        "seed": job.seed,
        "fingerprint": job.fingerprint,
        "num_tensors": len(tensors),
        "num_shards": outcome.num_shards,
        "weight_bytes": job.weight_bytes,
        "written_bytes": outcome.written_bytes,
        "resumed_bytes": outcome.resumed_bytes,
        "tokenizer": tokenizer,
        "threads": threads,
        "seconds": round(time.perf_counter() - begin, 3),
    }


def model_tensors(config: dict[str, Any]) -> list[SyntheticTensor]:
    """List the tensors of a model's checkpoint in file order. Raises: ConfigError."""
    # Brings torch along, which is why it is not at the top.
    from engine.models.gpt_oss_weights import expected_tensors

    wanted = expected_tensors(parse_model_config(config))
    return [
        SyntheticTensor(name, tensor.shape, "U8" if tensor.dtypes == ("U8",) else "BF16")
        for name, tensor in wanted.items()
    ]


def _tokenizer(folder: str | None, vocab_size: int) -> tuple[str, dict[str, bytes]]:
    """Copy the model's own tokenizer when it is at hand; else make a stand-in where the vocabulary allows one."""
    if folder is not None:
        found = {name: Path(folder) / name for name in TOKENIZER_FILES if (Path(folder) / name).is_file()}
        if "tokenizer.json" in found:
            return "copied", {name: path.read_bytes() for name, path in found.items()}
    if vocab_size >= MIN_VOCAB_SIZE:
        return "stand-in", stand_in_tokenizer(vocab_size)
    return "none", {}


def say(event: str, **fields: Any) -> None:
    sys.stdout.write(json.dumps({"event": event, **fields}) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
