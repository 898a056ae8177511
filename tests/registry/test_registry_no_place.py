"""An entry that finds no place on its cluster fails where it is named, and stops no other entry."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.cli import run
from launcher.errors import RegistryInvalid
from launcher.exit_codes import ExitCode
from launcher.registry import parse_registry
from launcher.registry.editing.edits import set_value

REGISTRY = """\
version: 1
clusters:
  rack:
    nodes:
      - {name: h1, role: head, ip: 10.0.1.1, gpus: 8, gpu-memory: 80GiB}
      - {name: h2, role: worker, ip: 10.0.1.2, gpus: 8, gpu-memory: 80GiB}
models:
  fine: {model: openai/gpt-oss-120b, cluster: rack, tp: 8, dp: 2}
  large: {model: openai/gpt-oss-120b, cluster: rack, tp: 32}
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model_registry.yml").write_text(REGISTRY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("HLAUNCH_REGISTRY", raising=False)


@pytest.mark.parametrize("command", [["list"], ["show", "fine"], ["env", "fine"], ["plan", "fine"]], ids=" ".join)
def test_the_other_entries_are_of_use(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(command) == 0
    written = capsys.readouterr()
    assert written.out
    # Who lists all is told of all.
    assert ("error[world-exceeds-gpus] models.large" in written.err) == (command == ["list"])


@pytest.mark.parametrize("command", [["show", "large"], ["env", "large"], ["plan", "large"]], ids=" ".join)
def test_who_names_it_is_told(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(command) == ExitCode.DOES_NOT_FIT
    told = capsys.readouterr().err
    assert "model_registry.yml:9:58: error[world-exceeds-gpus] models.large.tensor-parallel-size" in told
    assert "hint: use tp 16, or" in told


def test_validate_reports_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["validate"]) == ExitCode.REGISTRY_INVALID
    assert "error[world-exceeds-gpus] models.large" in capsys.readouterr().err


def test_an_edit_may_mend_it_or_leave_it_and_makes_no_other() -> None:
    mended = parse_registry(set_value(REGISTRY, "r.yml", "large", "tp", "16").text, known=())
    assert [item.severity for item in mended.issues] == ["warning"]
    assert "max-num-seqs: 4" in set_value(REGISTRY, "r.yml", "fine", "max-num-seqs", "4").text
    with pytest.raises(RegistryInvalid, match="nothing was written"):
        set_value(REGISTRY, "r.yml", "fine", "dp", "3")


def test_every_other_error_still_stops_all() -> None:
    with pytest.raises(RegistryInvalid):
        parse_registry(REGISTRY.replace("tp: 32", "tp: many"))
