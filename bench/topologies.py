"""The seven topologies of two nodes with eight ranks each, and a few more, on CPU ranks: do all of them say the same?

    python bench/topologies.py [--ranks 8] [--only NAME ...] [--json FILE] [--loopback]

Two network namespaces joined by a cable of the kernel are the nodes (`--loopback`: both on this host's loopback, where
namespaces cannot be made). Each topology is started as `hlaunch up --nnodes 2` does it: the head's engines and desk in
one namespace, the node agent in the other; then the same requests, greedy and in float32, whose tokens must equal those
of one rank alone. The model is made up on the spot: 16 layers, so that sixteen stages have one each, and 8 heads.
Times are those of this machine's cores, on which all ranks run at once: they tell that it works, not how fast it is.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from engine.config import CacheConfig, EngineConfig, ModelConfig, NodesConfig, SchedulerConfig, load_model_config
from engine.placement import Device, HostSpec, ParallelSizes, Placement, place

ROOT = Path(__file__).resolve().parents[1]
HEAD_IP, WORKER_IP = "10.78.0.1", "10.78.0.2"
PORT = 29641
MODEL = {
    "model_type": "gpt_oss",
    "num_hidden_layers": 16,
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 512,
    "sliding_window": 32,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 1024,
    "rope_theta": 150000.0,
    "rms_norm_eps": 1e-5,
    "swiglu_limit": 7.0,
    "attention_bias": True,
    "eos_token_id": 511,
    "pad_token_id": 510,
}


@dataclass(frozen=True, slots=True)
class Case:
    """One topology of two nodes."""

    name: str
    sizes: ParallelSizes
    nodes: int = 2


def cases(ranks: int) -> list[Case]:
    """The seven seed topologies for two nodes of `ranks` each, then tensor ranks over nodes, experts, three stages."""
    each = ranks
    return [
        Case("1 tensor", ParallelSizes(2, 1, each)),
        Case("2 pipeline in a node", ParallelSizes(2, 2, each // 2)),
        Case("3 small engines", ParallelSizes(max(2, each // 2), 2, 2 if each > 2 else 1)),
        Case("4 deep pipeline", ParallelSizes(2, each // 2, 2)),
        Case("5 pure pipeline", ParallelSizes(2 * each // (each // 2), each // 2, 1)),
        Case("6 replicas", ParallelSizes(2 * each, 1, 1)),
        Case("7 pipeline over nodes", ParallelSizes(1, 2 * each, 1)),
        Case("tensor over nodes", ParallelSizes(1, 1, min(8, 2 * each))),
        Case("tensor, then nodes", ParallelSizes(1, 2, each)),
        Case("experts over nodes", ParallelSizes(1, 2, 4 if each >= 4 else 2, expert_parallel=True)),
    ]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a topology did. `tokens` by request; `engines` that answered at least one."""

    tokens: dict[str, list[int]]
    ready_seconds: float
    tokens_per_second: float
    engines: int


def base_config(folder: Path) -> EngineConfig:
    """One rank alone, in float32."""
    return EngineConfig(
        model=str(folder),
        dtype="float32",
        max_model_len=256,
        cpu_threads=1,
        step_timeout_seconds=120.0,
        max_restarts=0,
        scheduler=SchedulerConfig(max_num_seqs=16, max_num_batched_tokens=64),
        cache=CacheConfig(num_blocks=256, dtype="float32"),
    )


def place_on_two(model: ModelConfig, sizes: ParallelSizes) -> Placement:
    """Share the ranks out over two equal nodes."""
    each = -(-sizes.world // 2)
    hosts = [HostSpec(f"node{n}", tuple(Device(f"cpu:{i}") for i in range(each))) for n in range(2)]
    return place(model, sizes, hosts)


def configs(folder: Path, sizes: ParallelSizes, head: str) -> tuple[EngineConfig, EngineConfig]:
    """The head's configuration and the other node's."""
    base = base_config(folder)
    placement = place_on_two(load_model_config(folder), sizes)
    joined = replace(
        base,
        placement=placement.to_json(),
        tensor_parallel_size=sizes.tensor,
        pipeline_parallel_size=sizes.pipeline,
        data_parallel_size=sizes.data,
        enable_expert_parallel=sizes.expert_parallel,
        # So many processes share few cores here that a slow one is not a lost one.
        nodes=NodesConfig(("node0", "node1"), head_host=head, head_port=PORT, silence_seconds=30.0),
    )
    return joined, replace(joined, nodes=replace(joined.nodes, rank=1))


async def serve(config: EngineConfig, num_requests: int, num_tokens: int) -> Outcome:
    """Start the engines of a configuration, have them answer, and end them."""
    from engine.core.request import EngineRequest
    from engine.core.sampling_params import SamplingParams
    from engine.data_parallel import DataParallelEngine

    causes: list[str] = []
    began = time.monotonic()
    engine = DataParallelEngine(config, lambda _: None, lambda message: causes.append(message.message))
    try:
        engine.start()
        while not engine.ready.is_set():
            if causes:
                raise RuntimeError(causes[0])
            await asyncio.sleep(0.02)
        ready = time.monotonic() - began

        async def answer(number: int) -> list[int]:
            prompt = [(7 * number + 3 * i) % 500 for i in range(9 + 5 * number)]
            request = EngineRequest(f"r{number}", prompt, SamplingParams(temperature=0.0), num_tokens, seed=1)
            tokens: list[int] = []
            async for output in engine.submit(request):
                if output.error:
                    raise RuntimeError(output.error)
                tokens += output.new_token_ids
            return tokens

        began = time.monotonic()
        answers = await asyncio.gather(*(answer(number) for number in range(num_requests)))
        seconds = time.monotonic() - began
        used = sum(part.stats().generation_tokens > 0 for part in engine.engines)
        return Outcome(
            {f"r{number}": tokens for number, tokens in enumerate(answers)},
            ready,
            sum(map(len, answers)) / seconds,
            used,
        )
    finally:
        await engine.stop()


@dataclass(frozen=True, slots=True)
class Nodes:
    """Where the two nodes' processes run: prefixes of their commands, and the head's address."""

    head: tuple[str, ...] = ()
    worker: tuple[str, ...] = ()
    address: str = "127.0.0.1"


@contextlib.contextmanager
def namespaces() -> Iterator[Nodes]:
    """Make two network namespaces with a cable between them. Raises: OSError or CalledProcessError without root."""
    tag = secrets.token_hex(2)
    names = (f"hlt{tag}a", f"hlt{tag}b")
    cable = (f"vt{tag}a", f"vt{tag}b")

    def ip(*arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True, capture_output=True)

    try:
        for name in names:
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        ip("link", "add", cable[0], "netns", names[0], "type", "veth", "peer", "name", cable[1], "netns", names[1])
        for name, device, address in zip(names, cable, (HEAD_IP, WORKER_IP), strict=True):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", device)
            ip("-n", name, "link", "set", device, "up")
        yield Nodes(("ip", "netns", "exec", names[0]), ("ip", "netns", "exec", names[1]), HEAD_IP)
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def run_case(
    case: Case, folder: Path, nodes: Nodes, work: Path, *, num_requests: int, num_tokens: int, seconds: float
) -> Outcome:
    """Run one topology on two nodes. Raises: RuntimeError with what went wrong."""
    head, worker = configs(folder, case.sizes, nodes.address)
    files = [work / "head.json", work / "worker.json"]
    for file, config in zip(files, (head, worker), strict=True):
        file.write_text(config.to_json())
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "HLAUNCH_NODE_SECRET": secrets.token_hex(16),
    }
    python = sys.executable
    with (work / "worker.log").open("w") as log:
        agent = subprocess.Popen(
            [*nodes.worker, python, "-m", "engine.executor.node_agent", "--config", str(files[1])],
            cwd=ROOT, env=environment, stdout=log, stderr=log,
        )  # fmt: skip
    try:
        driver = [python, str(ROOT / "bench/topologies.py"), "--drive", str(files[0]), str(num_requests)]
        done = subprocess.run(
            [*nodes.head, *driver, str(num_tokens)],
            cwd=ROOT, env=environment, capture_output=True, text=True, timeout=seconds, check=False,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"{case.name}: {done.stderr[-2000:]}\n{(work / 'worker.log').read_text()[-1000:]}")
        if agent.wait(20):
            raise RuntimeError(f"{case.name}: the other node ended with {agent.returncode}")
    finally:
        agent.kill()
        agent.wait()
    return Outcome(**json.loads(done.stdout.splitlines()[-1]))


def make_model(folder: Path) -> ModelConfig:
    """Write the made-up checkpoint."""
    from engine.models.dummy import write_checkpoint

    return write_checkpoint(folder, MODEL, seed=11)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--drive", nargs=3, metavar=("CONFIG", "REQUESTS", "TOKENS"), help=argparse.SUPPRESS)
    parser.add_argument("--ranks", type=int, default=8, help="ranks of each node")
    parser.add_argument("--only", nargs="*", help="parts of the names of those to run")
    parser.add_argument("--json", type=Path, help="write the figures here, too")
    parser.add_argument("--loopback", action="store_true", help="both nodes on this host, without namespaces")
    options = parser.parse_args(argv)
    if options.drive:
        path, num_requests, num_tokens = options.drive
        config = EngineConfig.from_json(Path(path).read_text(), path)
        print(json.dumps(asdict(asyncio.run(serve(config, int(num_requests), int(num_tokens))))))
        return 0
    return run_all(options)


def run_all(options: argparse.Namespace) -> int:
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
        nodes = Nodes() if options.loopback else stack.enter_context(namespaces())
        work = Path(scratch)
        folder = work / "model"
        make_model(folder)
        chosen = [
            case for case in cases(options.ranks) if not options.only or any(part in case.name for part in options.only)
        ]
        num_requests = 2 * max(case.sizes.data for case in chosen)
        alone = asyncio.run(serve(base_config(folder), num_requests, 24))
        print(head_line("topology"))
        print(f"{'one rank':<24}{'1 1 1':>10}{1:>7}{alone.ready_seconds:>7.1f} s{alone.tokens_per_second:>10.0f}")
        for case in chosen:
            outcome = run_case(case, folder, nodes, work, num_requests=num_requests, num_tokens=24, seconds=600)
            rows.append(tell(case, outcome, alone))
    return conclude(rows, options.json)


def head_line(title: str) -> str:
    """Give the line above the lines of `tell`."""
    return f"{title:<24}{'tp pp dp':>10}{'ranks':>7}{'ready':>9}{'tokens/s':>10}  same as one rank"


def tell(case: Case, outcome: Outcome, alone: Outcome) -> dict[str, Any]:
    """Print how a topology did beside one rank; returns the same as a row for JSON."""
    sizes, ep = case.sizes, " ep" if case.sizes.expert_parallel else ""
    is_same = outcome.tokens == alone.tokens
    print(
        f"{case.name:<24}{f'{sizes.tensor} {sizes.pipeline} {sizes.data}{ep}':>10}{sizes.world:>7}"
        f"{outcome.ready_seconds:>7.1f} s{outcome.tokens_per_second:>10.0f}  {'yes' if is_same else 'NO'}",
        flush=True,
    )
    row = {"name": case.name, **asdict(sizes), **asdict(outcome), "is_same": is_same}
    del row["tokens"]
    return row


def conclude(rows: list[dict[str, Any]], file: Path | None) -> int:
    """Write the rows where wanted; returns the exit code, 1 when tokens differ anywhere."""
    if file:
        file.write_text(json.dumps(rows, indent=2))
    return 0 if all(row["is_same"] for row in rows) else 1


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
