"""The shape of the house: arrows go down, imports are harmless, every op has its rooms."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = ["kernels", "ops", "compat", "nn", "models", "data", "train", "infer", "cli"]
BELOW = {
    "kernels": set(),
    "ops": {"kernels"},
    "compat": {"ops"},
    "nn": {"ops"},
    "data": set(),
    "models": {"nn", "ops"},
    "train": {"models", "data", "nn", "ops"},
    "infer": {"models", "data", "nn", "ops"},
    "cli": {"train", "infer", "models", "data", "nn", "ops"},
}


def imported_modules(path: Path, package: str) -> set[str]:
    """Every module that the file imports, anywhere in it, by absolute name."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join(
                    [*package.split(".")[: len(package.split(".")) - node.level + 1], *([base] if base else [])]
                )
            found |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return found


def floor_files(floor: str) -> list[Path]:
    return sorted((ROOT / ("kernels" if floor == "kernels" else f"llmcore/{floor}")).rglob("*.py"))


@pytest.mark.parametrize("floor", FLOORS)
def test_arrows_go_down(floor):
    for path in floor_files(floor):
        package = ".".join(["llmcore", *path.relative_to(ROOT / ("." if floor == "kernels" else "llmcore")).parts[:-1]])
        for name in imported_modules(path, package):
            parts = name.split(".")
            if parts[0] != "llmcore" or len(parts) < 2 or parts[1] not in FLOORS or parts[1] == floor:
                continue
            assert parts[1] in BELOW[floor], (
                f"{path.relative_to(ROOT)} imports {name}, but {floor} stands below {parts[1]}"
            )


def test_kernels_import_nothing_of_llmcore():
    for path in floor_files("kernels"):
        for name in imported_modules(path, "llmcore.kernels"):
            assert not name.startswith("llmcore") or name.startswith("llmcore.kernels"), f"{path.name} imports {name}"
    assert not (ROOT / "kernels/__init__.py").exists()


def test_the_arrow_test_sees_arrows(tmp_path):
    source = tmp_path / "x.py"
    source.write_text("def f():\n    from ..nn import RMSNorm\n    import llmcore.train.config\n")
    assert {"llmcore.nn", "llmcore.nn.RMSNorm", "llmcore.train.config"} <= imported_modules(source, "llmcore.ops")


def test_every_op_has_its_rooms():
    from llmcore import ops

    for name, op in ops.registry.items():
        assert getattr(ops, name).reference is not None and name in ops.__all__
        assert (ROOT / f"llmcore/ops/{name}.py").exists() and (ROOT / f"tests/ops/test_{name}.py").exists()
        for backend, room in (("triton", f"kernels/{name}.py"), ("cuda", f"csrc/cuda/{name}.cu")):
            assert (backend in op.kernels) == (ROOT / room).exists(), f"{name}: {backend} and {room} disagree"
        own = list((ROOT / "csrc/cpu").glob(f"{name}*.cpp"))
        assert ("cpu" in op.kernels) == bool(own or op.parts) and not (own and op.parts)
        assert all("cpu" in ops.registry[part].kernels for part in op.parts)


def test_inline_assembly_stands_in_one_file():
    """Elsewhere the host shim could not run it."""
    sources = [path for floor in ("common", "cuda") for path in (ROOT / "csrc" / floor).iterdir()]
    holders = {path.name for path in sources if re.search(r"\b(asm|__asm|__asm__)\b", path.read_text())}
    assert holders == {"ptx.cuh"}


def test_import_is_harmless():
    script = (
        "import sys, torch; before = set(sys.modules); import llmcore; new = set(sys.modules) - before;"
        "bad = [m for m in ('triton', 'deepspeed', 'transformers', 'torch._dynamo', 'torch._inductor', 'llmcore._cpu',"
        " 'llmcore._cuda', 'safetensors', 'jsonargparse') if m in new];"
        "assert not bad, bad; assert not torch.cuda.is_initialized()"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)
