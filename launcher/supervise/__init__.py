"""Supervision: engine processes, their readiness, their end, and the record of what runs.

    folder = InstanceFolder(state_root(os.environ), "tiny-oss")
    folder.create(); lock = folder.try_lock()            # None: another launcher has it
    outcome = Supervisor(spec, folder, listener).run()   # foreground, until the engine is gone
    outcome = start_detached(spec, folder, lock, listener, began)   # until ready or failed
    stop_instance(folder)                                # from any other process

Imports nothing heavy: a detached supervisor starts from here.
"""

from __future__ import annotations
