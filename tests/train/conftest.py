"""A model and a text small enough to train in a second, and two ways to run train_minimal.py on them."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # for `import train_minimal`


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 60 files, some of which are held out."""
    folder = tmp_path_factory.mktemp("text")
    for i in range(60):
        (folder / f"{i}.txt").write_text("".join(f"line {i * j % 97} of file {i}: {j * j}\n" for j in range(20)))
    return folder


@pytest.fixture
def small(text: Path, tmp_path: Path) -> list[str]:
    """Arguments of a small run that writes to tmp_path/runs."""
    return [
        "--data.train", str(text), "--out_dir", str(tmp_path / "runs"), "--precision", "fp32",
        "--model.hidden_size", "32", "--model.intermediate_size", "64", "--model.num_hidden_layers", "2",
        "--model.num_attention_heads", "2", "--batch_size", "4", "--seq_len", "32", "--max_steps", "6",
        "--log_interval", "1", "--eval_tokens", "256", "--final_eval_tokens", "512", "--sample.tokens", "8",
        "--optimizer.warmup_steps", "2",
    ]  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """More threads cost more than they bring at this size, and their number must not change the sums."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


Script = Callable[[list[str], list[str]], subprocess.CompletedProcess[str]]


def start(launcher: list[str], argv: list[str]) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "WORLD_SIZE"}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *launcher, str(ROOT / "train_minimal.py"), *argv]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="session")
def run_script() -> Script:
    """run_script(launcher, argv): `python *launcher train_minimal.py *argv` in a process of its own."""
    return start
