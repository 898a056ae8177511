"""Rules of the house that no linter knows: who may import what at all, and what must not appear in the product."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PRODUCT = [path for package in ("launcher", "engine", "kernels") for path in sorted((ROOT / package).rglob("*.py"))]

# Package -> the only places that may import it.
DOORWAYS = {
    "rich": ("launcher/console.py", "launcher/console_phases.py"),
    "matplotlib": ("launcher/benchmark/plot.py",),
    "fastapi": ("engine/server/",),
    "starlette": ("engine/server/",),
    "uvicorn": ("engine/server/",),
    "prometheus_client": ("engine/server/",),
    "safetensors": ("engine/models/", "engine/worker/"),
    "tokenizers": ("engine/text/",),
    "ray": ("engine/executor/ray_",),
    "cupy": ("kernels/",),
    "transformers": (),
}
FORBIDDEN_IMPORTS = {"pickle", "cloudpickle", "dill", "marshal", "shelve"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__"}
FORBIDDEN_ATTRIBUTES = {("torch", "load"), ("yaml", "load"), ("os", "system"), ("os", "popen")}


def imports(tree: ast.AST) -> list[str]:
    names: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.append(node.module)
    return names


@pytest.mark.parametrize("path", PRODUCT, ids=lambda path: str(path.relative_to(ROOT)))
def test_file_keeps_the_rules(path: Path) -> None:
    tree = ast.parse(path.read_text())
    relative = str(path.relative_to(ROOT))
    for name in imports(tree):
        top = name.partition(".")[0]
        assert top not in FORBIDDEN_IMPORTS, f"{relative} imports {name}"
        if top in DOORWAYS:
            assert relative.startswith(DOORWAYS[top]), f"{relative} imports {name}; only {DOORWAYS[top]} may"
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name):
                assert node.func.id not in FORBIDDEN_CALLS, f"{relative}:{node.lineno} calls {node.func.id}"
            if isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name):
                pair = (node.func.value.id, node.func.attr)
                assert pair not in FORBIDDEN_ATTRIBUTES, f"{relative}:{node.lineno} calls {'.'.join(pair)}"
            for keyword in node.keywords:
                is_shell = keyword.arg == "shell" and not (
                    isinstance(keyword.value, ast.Constant) and keyword.value.value is False
                )
                assert not is_shell, f"{relative}:{node.lineno} passes shell="


def test_every_module_says_what_it_knows() -> None:
    bare = [
        str(path.relative_to(ROOT))
        for path in PRODUCT
        if path.read_text().strip() and ast.get_docstring(ast.parse(path.read_text())) is None
    ]
    assert bare == []


@pytest.mark.parametrize(
    ("module", "never"),
    [
        ("engine.config", {"torch", "numpy", "msgspec", "pydantic", "rich"}),
        ("engine.memory", {"torch", "numpy", "msgspec", "pydantic", "rich"}),
        ("engine.core.scheduler", {"torch", "numpy", "msgspec", "asyncio"}),
        ("engine.async_engine", {"torch", "numpy", "tokenizers"}),
        ("engine.text", {"torch", "numpy"}),
        ("launcher.cli", {"torch", "numpy", "msgspec", "fastapi", "uvicorn", "tokenizers"}),
        ("launcher.probe", {"yaml", "pydantic", "rich", "typer", "engine"}),
    ],
)
def test_importing_a_module_does_not_load(module: str, never: set[str]) -> None:
    code = f"import sys, {module}; print(' '.join(sorted(m for m in sys.modules if '.' not in m)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert never.isdisjoint(done.stdout.split())


def test_our_kernels_package_is_ours() -> None:
    import kernels

    assert kernels.__file__ is not None
    assert Path(kernels.__file__).is_relative_to(ROOT)
