"""The engine measured in its own process: `hlaunch bench --offline`, its profile, and one side of `bench/compare_vllm`.

| module | holds |
|---|---|
| `protocol` | timed points: decode rate as extra time over a 1-token run, prefill rate, distinct experts |
| `device` | what a figure needs to be comparable: device, driver, clocks, versions, copy bandwidth |
| `__main__` | `python -m engine.benchmark`: one request as JSON in, JSON lines out as results come |

Time per op of a step is `engine.profiling`.
"""
