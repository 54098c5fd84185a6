"""A rank that dies ends the others with one sentence, and the run goes on to the same bits; ranks that disagree do not
start. However they are started."""

import shutil
import signal
import socket
import subprocess
import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from llmcore.train import distributed
from llmcore.train.distributed import World
from llmcore.train.run import read_log

Script = Callable[[list[str], list[str]], subprocess.CompletedProcess[str]]
ROOT = Path(__file__).parents[2]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--local-addr", "localhost", "--nproc_per_node", "2"]
# train_minimal.py, also in the processes that it starts, after `change` was made in the ranks
CHANGED = """
import os, signal, sys
sys.path.insert(0, {root!r})
import train_minimal
from llmcore.train import distributed
train_minimal.__file__ = __file__
argv = [argument for argument in sys.argv[1:] if not argument.endswith("train_minimal.py")]
rank, change = os.environ.get("RANK"), {change!r}
exec(change)
train_minimal.launch.leave(train_minimal.main(argv))
"""
# the rank ends itself in its fifth step, once
DYING = """
steps, original = 0, train_minimal.forward_backward
def forward_backward(*arguments):
    global steps
    steps += 1
    if rank == {rank!r} and steps == 5 and not os.path.exists({mark!r}):
        open({mark!r}, "w").close()
        {how}
    return original(*arguments)
train_minimal.forward_backward = forward_backward
"""
KILL, RAISE = "os.kill(os.getpid(), signal.SIGKILL)", "raise KeyError('a bug')"
ENGINES = {
    "ddp": [],
    **{f"zero{n}": ["--engine", "deepspeed", "--deepspeed", str(ROOT / f"configs/deepspeed/zero{n}.json")] for n in (1, 3)},
}  # fmt: skip
SLOW = pytest.mark.slow
GONE = "train_minimal.py: another process of the run is gone; --resume {} goes on from its last checkpoint, step_{}."


@pytest.fixture
def options(small: list[str]) -> list[str]:
    return [*small, "--batch_size", "2", "--max_steps", "10", "--checkpoint_interval", "2"]


@pytest.fixture
def changed(tmp_path: Path) -> Callable[[str], str]:
    """changed(change): a script that is train_minimal.py, changed."""

    def write(change: str) -> str:
        script = tmp_path / "changed.py"
        script.write_text(CHANGED.format(root=str(ROOT), change=change))
        return str(script)

    return write


@pytest.fixture
def dying(changed: Callable[[str], str], tmp_path: Path) -> Callable[[str, str], str]:
    """dying(rank, how): a script that is train_minimal.py with a rank that dies."""
    return lambda rank, how: changed(DYING.format(rank=rank, how=how, mark=str(tmp_path / "mark")))


def engine(name: str) -> list[str]:
    if name != "ddp":
        pytest.importorskip("deepspeed", reason="needs deepspeed")
    return ENGINES[name]


def require_same_end(a: Path, b: Path) -> None:
    assert (a / "final").resolve().name == (b / "final").resolve().name == "step_10"
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert (a / "step_10" / name).read_bytes() == (b / "step_10" / name).read_bytes()
    losses = [{line["step"]: line["loss"] for line in read_log(run) if "loss" in line} for run in (a, b)]
    assert losses[0] == losses[1]


def gone(run: Path) -> list[str]:
    """What a survivor may say: the last checkpoint may still have been on its way to the disk."""
    return [GONE.format(run, step) for step in (2, 4)]


@pytest.mark.parametrize(
    ("kind", "rank"), [("ddp", 1), *(pytest.param(kind, rank, marks=SLOW) for kind in ENGINES for rank in (0, 1))]
)
def test_a_killed_rank_is_named(kind: str, rank: int, options, tmp_path: Path, run_script: Script, dying):
    options += [*engine(kind), "--num_gpus", "2"]
    died = run_script([dying(str(rank), KILL)], [*options, "--name", "died"])
    run = tmp_path / "runs" / "died"
    assert died.returncode == 128 + signal.SIGKILL
    survivor, launcher = died.stderr.splitlines()
    assert survivor in gone(run) and launcher == f"train_minimal.py: rank {rank} of 2 was killed by SIGKILL."
    for result in (run_script([], ["--resume", str(run)]), run_script([], [*options, "--name", "straight"])):
        assert (result.returncode, result.stderr) == (0, "")
    require_same_end(run, tmp_path / "runs" / "straight")


@pytest.mark.parametrize(
    ("kind", "rank"), [("ddp", 0), *(pytest.param(kind, 1, marks=SLOW) for kind in ("ddp", "zero1", "zero3"))]
)
def test_a_rank_with_a_bug_shows_where(kind: str, rank: int, options, tmp_path: Path, run_script: Script, dying):
    result = run_script([dying(str(rank), RAISE)], [*options, *engine(kind), "--num_gpus", "2", "--name", "a"])
    assert result.returncode == 1
    assert result.stderr.count("Traceback") == result.stderr.count("KeyError: 'a bug'") == 1
    others = [line for line in result.stderr.splitlines() if not line.startswith(f"[rank{rank}]: ")]
    assert len(others) == 1 and others[0] in gone(tmp_path / "runs" / "a")


@pytest.mark.parametrize("kind", ["ddp", pytest.param("zero1", marks=SLOW), pytest.param("zero3", marks=SLOW)])
@pytest.mark.parametrize("rank", [1, pytest.param(0, marks=SLOW)])
def test_torchrun_starts_them_again(kind: str, rank: int, options, tmp_path: Path, run_script: Script, dying):
    """With the same store in which the addresses of the dead stand."""
    options += engine(kind)
    launcher = [*TORCHRUN, "--max-restarts", "2", dying(str(rank), KILL)]
    result = run_script(launcher, [*options, "--resume", "auto", "--name", "again"])
    assert result.returncode == 0, result.stderr
    run = tmp_path / "runs" / "again"
    assert [line for line in result.stderr.splitlines() if line.startswith("train_minimal.py: ")][0] in gone(run)
    assert result.stderr.count("train_minimal.py: ") == 1 and "[rank" not in result.stderr
    starts = [line["step"] for line in read_log(run) if line.get("event") == "start"]
    assert starts in ([0, 2], [0, 4])
    assert run_script([], [*options, "--num_gpus", "2", "--name", "straight"]).returncode == 0
    require_same_end(run, tmp_path / "runs" / "straight")


@pytest.mark.parametrize("how", [KILL, pytest.param(RAISE, marks=SLOW)], ids=["kill", "raise"])
def test_torchrun_without_another_try(how: str, options, tmp_path: Path, run_script: Script, dying):
    result = run_script([*TORCHRUN, dying("0", how)], [*options, "--name", "a"])
    assert result.returncode == 1
    said = [line for line in result.stderr.splitlines() if line.startswith("train_minimal.py: ")]
    assert len(said) == 1 and said[0] in gone(tmp_path / "runs" / "a")
    assert result.stderr.count("[rank0]: Traceback") == (how == RAISE) and "[rank1]: " not in result.stderr


def deepspeed_launcher() -> list[str]:
    pytest.importorskip("deepspeed", reason="needs deepspeed")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    return ["-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", port]


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_the_deepspeed_launcher(rank: int, options, tmp_path: Path, run_script: Script, dying):
    launcher = deepspeed_launcher()
    options += ENGINES["zero1"]
    died = run_script([*launcher, dying(str(rank), KILL)], [*options, "--name", "died"])
    run = tmp_path / "runs" / "died"
    assert died.returncode != 0
    said = [line for line in died.stderr.splitlines() if line.startswith("train_minimal.py: ")]
    assert len(said) == 1 and said[0] in gone(run)
    assert "c10d" not in died.stderr and "Traceback" not in died.stderr
    result = run_script(launcher, ["--resume", str(run)])
    assert result.returncode == 0, result.stderr
    assert run_script([], [*options, "--num_gpus", "2", "--name", "straight"]).returncode == 0
    require_same_end(run, tmp_path / "runs" / "straight")


@pytest.mark.slow
def test_the_deepspeed_launcher_trains_as_others_do(options, tmp_path: Path, run_script: Script):
    launcher = deepspeed_launcher()
    result = run_script(launcher, [*options, *ENGINES["zero1"], "--name", "a"])
    assert result.returncode == 0, result.stderr
    assert "2 processes, DeepSpeed ZeRO 1" in result.stdout
    assert run_script([], [*options, *ENGINES["zero1"], "--num_gpus", "2", "--name", "b"]).returncode == 0
    require_same_end(tmp_path / "runs" / "a", tmp_path / "runs" / "b")


@pytest.mark.parametrize(
    ("name", "change", "values"),
    [
        ("optimizer.lr", "argv += ['--optimizer.lr', '0.5'] * (rank == '1')", "(0.5, not 0.003)"),
        ("source code", "if rank == '1': distributed.code_digest = lambda script: 'edited'", "(edited, not "),
        pytest.param(
            "PyTorch",
            "if rank == '1': train_minimal.torch.__version__ = '2.0'",
            f"(2.0, not {torch.__version__})",
            marks=SLOW,
        ),
    ],
    ids=["option", "source code", "PyTorch"],
)
def test_ranks_that_disagree(name, change, values, options, tmp_path: Path, run_script: Script, changed):
    result = run_script([changed(change)], [*options, "--num_gpus", "2"])
    require_disagreement(result, name, values)
    assert not (tmp_path / "runs").exists()


def test_ranks_that_read_other_files(options, text: Path, tmp_path: Path, run_script: Script, changed):
    """Two machines with a disk each, where the same names mean other files."""
    disks = [tmp_path / "0", tmp_path / "1"]
    for disk in disks:
        shutil.copytree(text, disk / "text")
    on_disks = f"os.chdir(os.path.join({str(tmp_path)!r}, rank or '0'))"
    names = ["--data.train", "text", "--out_dir", "runs", "--num_gpus", "2", "--name", "a"]
    assert run_script([changed(on_disks)], [*options, *names]).returncode == 0
    before = files(disks[0])
    result = run_script([changed(on_disks)], [*options, *names, "--resume", "auto"])
    require_disagreement(result, "checkpoint", "(none, not ")
    assert files(disks[0]) == before and not (disks[1] / "runs").exists()

    (disks[1] / "text" / "0.txt").write_text("other\n")
    result = run_script([changed(on_disks)], [*options, *names, "--name", "b"])
    require_disagreement(result, "text", ", not ")
    assert files(disks[0]) == before and not (disks[1] / "runs").exists()


def files(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*")}


def require_disagreement(result: subprocess.CompletedProcess[str], name: str, values: str) -> None:
    host = socket.gethostname()
    assert result.returncode == 2 and result.stderr.count("\n") == 1, result.stderr
    assert f"rank 1 on {host} has another {name} than rank 0 on {host} (" in result.stderr and values in result.stderr


def test_what_only_one_rank_finds_wrong_is_said(options, tmp_path: Path, run_script: Script, changed):
    """And not lost because the first rank, which is waiting for this one, is who speaks for the machine."""
    script = changed("argv += ['--data.train', 'nowhere'] * (rank == '1')")
    result = run_script([script], [*options, "--num_gpus", "2"])
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert "nowhere" in result.stderr and not (tmp_path / "runs").exists()


def test_ranks_vote_in_one_type(monkeypatch: pytest.MonkeyPatch):
    """One has seen the signal and votes with its number, another has not and votes with False."""
    types = []
    monkeypatch.setattr(distributed.dist, "all_reduce", lambda box, operation: types.append(box.dtype))
    world = World(0, 2, torch.device("cpu"))
    assert [world.most(value) for value in (2, False, True)] == [2, 0, 1]
    assert types == [torch.int64] * 3


def test_ranks_that_start_again_do_not_meet_the_dead():
    server = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))

    def start(rank: int, wait: float, attempt: dict[int, dist.Store]) -> None:
        threading.Event().wait(wait)
        store = dist.TCPStore("localhost", server.port, is_master=False, timeout=timedelta(seconds=60))
        attempt[rank] = distributed._unused(store, rank, 3)

    for attempt in range(6):
        met: dict[int, dist.Store] = {}
        ranks = [
            threading.Thread(target=start, args=(r, 0.2 * ((r + attempt) % 3), met), daemon=True) for r in range(3)
        ]
        for thread in ranks:
            thread.start()
        for thread in ranks:
            thread.join(60)
        assert len(met) == 3 and not met[0].check(["address"])
        met[attempt % 3].set("address", str(attempt))
        assert [store.get("address") for store in met.values()] == [str(attempt).encode()] * 3


def test_a_sentence_is_said_once_a_machine(monkeypatch: pytest.MonkeyPatch):
    server = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    for name, value in {"MASTER_ADDR": "localhost", "MASTER_PORT": str(server.port), "GROUP_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    worlds = [World(rank, 2, torch.device("cpu"), server) for rank in (1, 0)]
    assert [world.is_first_to_say("a") for world in worlds] == [True, False]
    assert [world.is_first_to_say("b") for world in worlds] == [True, False]
    monkeypatch.setenv("GROUP_RANK", "1")
    assert worlds[1].is_first_to_say("a")
    for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "8")
    with socket.create_server(("localhost", 0)) as nobody:
        monkeypatch.setenv("MASTER_PORT", str(nobody.getsockname()[1]))
    for rank, local_rank, speaks in ((1, 1, True), (2, 2, False), (8, 0, True), (9, 1, False)):
        monkeypatch.setenv("LOCAL_RANK", str(local_rank))
        assert World(rank, 16, torch.device("cpu"), server).is_first_to_say("a") is speaks
