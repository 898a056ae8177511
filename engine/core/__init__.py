"""The pure core: requests, scheduler, block pool, prefix cache, execution plan. No torch, no I/O, no clock."""
