"""Write constraints.txt: the versions that pip chooses today for every extra, pinned.

It installs into a throw-away environment, so the result does not depend on what is installed here.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HEADER = "# Written by `make lock`: the versions every machine installs. Ranges stand in pyproject.toml.\n"
NOT_PINNED = {"hlaunch", "pip", "setuptools", "wheel"}


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        python = str(Path(folder) / "bin" / "python")
        pip = [python, "-m", "pip", "--disable-pip-version-check"]
        subprocess.run([*pip, "install", "--quiet", "--editable", f"{ROOT}[engine,ray,bench,dev]"], check=True)
        listed = subprocess.run([*pip, "list", "--format=json"], check=True, capture_output=True, text=True).stdout
    # A local part (`+cpu`) names one build; the constraint must accept every build of that version. What torch's own
    # build needs (CUDA, triton) is pinned by torch itself.
    pins = sorted(
        f"{item['name'].lower()}=={item['version'].split('+')[0]}"
        for item in json.loads(listed)
        if item["name"].lower() not in NOT_PINNED and not item["name"].lower().startswith(("nvidia-", "triton"))
    )
    (ROOT / "constraints.txt").write_text(HEADER + "\n".join(pins) + "\n")
    print(f"constraints.txt: {len(pins)} versions")
    return 0


if __name__ == "__main__":
    sys.exit(main())
