"""Reads a host and prints what it found as one JSON object. The standard library only, Python 3.8 or newer.

Knows: sysfs, procfs, a few commands' versions, every path under a root that a fixture tree can replace. Refuses to
know: what any of it means (`launcher.fabric.checks`), and anything else of this package, because the far side may have
no hlaunch: `launcher.fabric.remote` pipes these files, joined, into `python3 -` there.
"""
