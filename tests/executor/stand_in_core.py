"""The process that owns ranks: starts them, prints their ids, and keeps them busy until killed, telling each round."""

from __future__ import annotations

import sys

from executor_support import add_requests, drive, new_scheduler, start


def main() -> None:
    executor = start(int(sys.argv[1]), step_timeout_seconds=float(sys.argv[2]))
    print(*executor.pids, flush=True)
    while True:
        scheduler = new_scheduler()
        add_requests(scheduler, 8, 200)
        drive(executor, scheduler)
        print("round", flush=True)


if __name__ == "__main__":
    main()
