"""What a launch on nodes was started with, kept while it runs: its rendered files, to compare a plan with.

Knows: one private folder in the instance's folder. Refuses to know: what stands in the files, and what differs.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Mapping
from pathlib import Path

from launcher.errors import PreflightError
from launcher.supervise.instance import InstanceFolder, write_private


def files_folder(folder: InstanceFolder) -> Path:
    """Where the files of what runs lie."""
    return folder.path / "running"


def keep_files(folder: InstanceFolder, files: Mapping[str, bytes]) -> None:
    """Keep files by relative path, in place of those of an earlier launch. Raises: PreflightError."""
    forget_files(folder)
    root = files_folder(folder)
    for path, content in files.items():
        target = root / path
        try:
            for parent in (root, target.parent):
                parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise PreflightError(f"{target} cannot be written: {error.strerror}", hint="free disk space?") from error
        write_private(target, content.decode())


def forget_files(folder: InstanceFolder) -> None:
    """Drop them: nothing runs."""
    with contextlib.suppress(OSError):
        shutil.rmtree(files_folder(folder))
