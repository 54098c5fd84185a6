"""The commands in scripts/launch: that they parse, name what exists, and start what they say, from any folder."""

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from llmcore.models.presets import PRESETS
from llmcore.train.parse import _keys

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "scripts" / "launch").glob("*.sh"))
# A stand-in for the launcher and for python: says where it is and what it was told.
STAND_IN = '#!/bin/bash\necho "$PWD" "$(basename "$0")"\nprintf "%s\\n" "$@"\n'


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[list[str]]]:
    """What each script runs, from another folder and with an option of two words: [where and what], its arguments."""
    folder = tmp_path_factory.mktemp("bin")
    for name in ("python", "torchrun", "deepspeed"):
        (folder / name).write_text(STAND_IN)
        (folder / name).chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if name != "GPUS"}
    environment |= {"PATH": f"{folder}:{environment['PATH']}", "MASTER": "first:29500", "NAME": "my run"}
    results = {}
    for script in SCRIPTS:
        result = subprocess.run(
            [script, "--preset", "two words"], cwd=folder, env=environment, capture_output=True, text=True, check=True
        )
        where, *arguments = result.stdout.splitlines()
        results[script.stem] = [where.rsplit(" ", 1), arguments]
    return results


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_script(script: Path, commands: dict[str, list[list[str]]]):
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", script], check=True)
    first, what, *others = script.read_text().splitlines()
    assert first == "#!/usr/bin/env bash" and what.startswith("# ")
    lines = [line for line in others if not line.startswith("# ")]
    assert lines[0].startswith('cd "$(dirname "$0")')
    assert all(line.endswith("\\") for line in lines[:-1]) and lines[-1].endswith(' "$@"')

    (folder, program), arguments = commands[script.stem]
    assert folder == str(ROOT)
    here = arguments.index("train_minimal.py")
    assert program == "python" or here > 0
    own = arguments[here + 1 :]
    assert own[-2:] == ["--preset", "two words"]
    names = [name[2:] for name in own if name.startswith("--")]
    assert set(names) <= set(_keys()) and own[::2] == [f"--{name}" for name in names]
    given = dict(zip(names[:-1], own[1:-2:2], strict=True))
    assert given.get("preset", "tiny") in PRESETS
    for name in {"deepspeed", "config"} & set(given):
        assert (ROOT / given[name]).is_file()
    assert ("deepspeed" in given) == (given.get("engine") == "deepspeed")
    if (ROOT / f"configs/deepspeed/{script.stem}.json").exists():
        assert given["deepspeed"] == f"configs/deepspeed/{script.stem}.json"


@pytest.mark.parametrize(
    "script", [script for script in SCRIPTS if script.stem[1] == "x"], ids=lambda script: script.stem
)
def test_hardware_scripts_start_as_many_processes(script: Path, commands: dict[str, list[list[str]]]):
    arguments = commands[script.stem][1]
    assert arguments[arguments.index("--nproc-per-node") + 1] == script.stem[0]


def test_two_nodes_asks_for_what_it_needs():
    script = ROOT / "scripts" / "launch" / "two_nodes.sh"
    environment = {name: value for name, value in os.environ.items() if name not in ("MASTER", "NAME")}
    for name in ("MASTER", "NAME"):
        result = subprocess.run([script], env=environment, capture_output=True, text=True)
        assert result.returncode != 0 and re.search(rf"{name}: is \S", result.stderr)
        environment[name] = "given"


@pytest.mark.skipif(shutil.which("torchrun") is None, reason="torchrun is not on the PATH")
def test_options_of_torchrun():
    known = subprocess.run(["torchrun", "--help"], capture_output=True, text=True, check=True, timeout=120).stdout
    for script in SCRIPTS:
        text = " ".join(script.read_text().replace("\\\n", "").splitlines()[2:])
        if "exec torchrun" in text:
            words = shlex.split(text.split("exec torchrun")[1].split("train_minimal.py")[0])
            for word in words:
                assert not word.startswith("--") or f"[{word} " in known or f"[{word}]" in known, word
