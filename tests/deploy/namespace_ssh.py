"""Stands in for ssh: `namespace_ssh.py [options] -- NAMESPACE COMMAND` runs the command in a network namespace."""

from __future__ import annotations

import os
import sys

if __name__ == "__main__":
    destination, command = sys.argv[sys.argv.index("--") + 1 :]
    os.execvp("ip", ["ip", "netns", "exec", destination, "sh", "-c", command])
