"""Run the project's checks one after the other and close with one line of passed and failed.

Steps: lint, format, imports (architecture), types, tests. Without arguments all of them run; a failing step does not
hide the ones after it. The exit status is 0 only when nothing failed.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
STEPS: dict[str, list[str]] = {
    "lint": [str(BIN / "ruff"), "check", "--quiet", "."],
    "format": [str(BIN / "ruff"), "format", "--quiet", "--check", "."],
    "imports": [str(BIN / "lint-imports"), "--no-cache"],
    "types": [str(BIN / "mypy")],
    "tests": [sys.executable, "-m", "pytest", "-q"],
}


def main(names: list[str]) -> int:
    unknown = [name for name in names if name not in STEPS]
    if unknown:
        print(f"error: unknown step {unknown[0]!r}; steps: {', '.join(STEPS)}", file=sys.stderr)
        return 2
    passed = failed = skipped = 0
    for name in names or list(STEPS):
        print(f"== {name}", flush=True)
        begin = time.monotonic()
        if name == "tests":
            counts = _run_tests()
            passed, failed, skipped = passed + counts[0], failed + counts[1], skipped + counts[2]
        elif subprocess.run(STEPS[name], cwd=ROOT, check=False).returncode == 0:
            passed += 1
        else:
            failed += 1
        print(f"== {name}: {time.monotonic() - begin:.1f} s", flush=True)
    print(f"{passed} passed, {failed} failed" + (f", {skipped} skipped" if skipped else ""))
    return 1 if failed else 0


def _run_tests() -> tuple[int, int, int]:
    """Run pytest; a run that dies without a report, or that ran nothing, counts as one failure."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        code = subprocess.run([*STEPS["tests"], f"--junit-xml={report}"], cwd=ROOT, check=False).returncode
        if not report.is_file():
            return 0, 1, 0
        suite = ElementTree.parse(report).getroot()
        suite = suite if suite.tag == "testsuite" else suite[0]
        total, skipped = int(suite.get("tests", 0)), int(suite.get("skipped", 0))
        failed = int(suite.get("failures", 0)) + int(suite.get("errors", 0))
        if code != 0 and failed == 0:
            failed = 1
        return max(0, total - failed - skipped), failed, skipped


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
