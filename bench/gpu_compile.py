"""Time the compilation of all Triton kernels that gpt-oss-20b needs: cold and warm disk cache, each in a new process.

    python bench/gpu_compile.py [--workers 1 4 16] [--tasks]

"wall" is the whole process: imports and the CUDA context too.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


def child(workers: int, *, with_tasks: bool) -> None:
    started = time.perf_counter()
    import torch

    from engine.worker.gpu_decode import LARGE
    from kernels.cuda.decode import DecodeShape
    from kernels.triton import warm

    torch.zeros(1, device="cuda")
    ready = time.perf_counter() - started
    shape = DecodeShape(2880, 2880, 64, 8, 64, 32, 4, 201088, 64)
    report = warm.compile_all(shape, decode_rows=LARGE, workers=workers)
    print(f"  imports and context {ready:.2f} s, compile_all {report.seconds:.2f} s, {report.compiled} compiled")
    if with_tasks:
        for name, seconds in sorted(report.tasks.items(), key=lambda item: -item[1]):
            print(f"    {seconds:6.2f} s  {name}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 4, 16])
    parser.add_argument("--tasks", action="store_true", help="list the tasks of each run; they overlap")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child, with_tasks=options.tasks)
        return
    for workers in options.workers:
        with tempfile.TemporaryDirectory() as folder:
            for state in ("cold", "warm"):
                environment = {**os.environ, "HLAUNCH_KERNEL_CACHE": folder}
                environment.pop("TRITON_CACHE_DIR", None)
                command = [sys.executable, __file__, "--child", str(workers), *(["--tasks"] if options.tasks else [])]
                begin = time.perf_counter()
                print(f"{workers} workers, {state} cache:", flush=True)
                subprocess.run(command, env=environment, check=True)
                print(f"  wall {time.perf_counter() - begin:.2f} s", flush=True)


if __name__ == "__main__":
    main()
