"""Every CUDA source compiles for every architecture served, for a true and a tiny shape; no GPU needed.

Through nvcc when it is on the path, which also says whether there are warnings; else through NVRTC, as where they run.
"""

from __future__ import annotations

import itertools
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from kernels import build
from kernels.cuda.all_reduce import all_reduce_defines
from kernels.cuda.decode import MODULES, DecodeShape, defines_for, modules_for

NVCC = shutil.which("nvcc")
SHAPES = {
    "true": (DecodeShape(2880, 2880, 64, 8, 64, 32, 4, 201_088, 32), 1),
    "tiny": (DecodeShape(224, 288, 16, 2, 32, 8, 2, 2_603, 16), 8),
    "many rows": (DecodeShape(224, 288, 16, 2, 32, 8, 2, 2_603, 16), 16),
}


def defines(shape: str) -> dict[str, int]:
    return defines_for(*SHAPES[shape])


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HLAUNCH_KERNEL_CACHE", str(tmp_path))


@pytest.mark.parametrize(
    ("shape", "arch"),
    [*itertools.product(("true", "tiny"), ("sm_80", "sm_90", "sm_90a")), ("many rows", "sm_90")],
)
def test_every_source_compiles(shape: str, arch: str, tmp_path: Path) -> None:
    for module in modules_for(*SHAPES[shape]):
        if module == "layers" and arch < "sm_90":
            continue
        compile_without_warning(module, defines(shape), arch, tmp_path)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_90a"])
def test_what_sums_over_ranks_compiles(arch: str, tmp_path: Path) -> None:
    half = replace(SHAPES["true"][0], intermediate=1440, heads=32, kv_heads=4, vocab=100_544)
    for module in ("qkv", "out_proj", "experts", "sample", "layers"):
        if module != "layers" or arch >= "sm_90":
            compile_without_warning(module, defines_for(half, 2, ranks=2), arch, tmp_path)
    for ranks in (2, 4, 8):
        compile_without_warning("all_reduce", all_reduce_defines(2880, ranks, 1 << 20), arch, tmp_path)


def compile_without_warning(module: str, macros: dict[str, int], arch: str, folder: Path) -> None:
    if NVCC is None:
        build.compile_cubin(f"{module}.cu", macros, arch)
        return
    target = f"-gencode=arch=compute_{arch[3:]},code={arch}"
    options = [f"-D{name}={value}" for name, value in macros.items()]
    done = subprocess.run(
        [NVCC, target, "-cubin", "-std=c++17", *options, "-o", str(folder / "out"), f"{module}.cu"],
        cwd=build.SOURCES,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr, done.stderr


def test_every_kernel_of_a_source_is_a_module_of_the_step() -> None:
    assert {path.stem for path in build.SOURCES.glob("*.cu")} == {*MODULES, "all_reduce"}
    for path in build.SOURCES.glob("*.cu"):
        assert re.search(r"^KERNEL\(", path.read_text(), re.MULTILINE), path.name


def test_the_persistent_kernel_serves_what_it_can() -> None:
    true = SHAPES["true"][0]
    assert "layers" in modules_for(true, 8)
    assert "layers" not in modules_for(true, 9)
    assert "layers" not in modules_for(true, 1, 64)  # too few multiprocessors to hold the shape


def test_many_sources_are_built_at_once() -> None:
    jobs = [("embed.cu", defines(shape)) for shape in SHAPES]
    build.build_all(jobs, "sm_90", workers=2)
    assert len(list(build.cache_folder().glob("embed-sm_90-*.cubin"))) == len(jobs)
    with pytest.raises(build.KernelBuildError, match=r"embed\.cu: .*error"):
        build.build_all([*jobs, ("embed.cu", {"H": 64})], "sm_90")


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr("importlib.import_module", absent)
    with pytest.raises(build.KernelBuildError, match="cuda-bindings"):
        build.compile_cubin("embed.cu", defines("tiny"), "sm_90")
    with pytest.raises(build.KernelBuildError, match="cupy-cuda13x"):
        build.load("embed.cu", defines("tiny"))


def test_the_cache_holds_one_file_per_source_and_shape(tmp_path: Path) -> None:
    first = build.compile_cubin("embed.cu", defines("tiny"), "sm_90")
    content = first.read_bytes()
    assert build.compile_cubin("embed.cu", defines("tiny"), "sm_90") == first
    assert build.compile_cubin("embed.cu", defines("true"), "sm_90") != first
    assert first.read_bytes() == content
    with pytest.raises(build.KernelBuildError, match=r"embed\.cu: .*error"):
        build.compile_cubin("embed.cu", {"H": 64}, "sm_90")
