"""What the launchers' environment says, and what it must not leave out."""

import pytest
import torch

from llmcore.train import distributed, launch
from llmcore.train.config import ConfigError

TWO = {
    "RANK": "1",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "a",
    "MASTER_PORT": "1",
}


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch):
    for name in (*launch.SET_BY_LAUNCHERS, "LOCAL_SIZE", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def launched_by(monkeypatch: pytest.MonkeyPatch, **environment: str) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)


def test_more_processes_than_gpus(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigError, match="8 processes need 8 GPUs; this machine has 2, so allowed is up to 2"):
        launch.device(8)
    assert launch.device(2) == torch.device("cuda", 0)


def test_processors_are_shared_out(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(launch.os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # torchrun's own
    assert [launch.threads_per_process(n) for n in (1, 2, 3, 16)] == [8, 4, 2, 1]
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert launch.threads_per_process(2) == 3


def test_one_variable_makes_no_launcher(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert not launch.launched() and launch.world_size(2) == 2


@pytest.mark.parametrize("value", ["abc", "0", "-1"])
def test_launcher_that_says_nonsense(value: str, monkeypatch: pytest.MonkeyPatch):
    launched_by(monkeypatch, **{**TWO, "WORLD_SIZE": value})
    with pytest.raises(ConfigError, match=f"WORLD_SIZE is '{value}'; allowed is a whole number of at least 1"):
        launch.world_size(None)


def test_num_gpus_under_a_launcher(monkeypatch: pytest.MonkeyPatch):
    launched_by(monkeypatch, **{**TWO, "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4"})
    with pytest.raises(ConfigError, match="num_gpus is 2, but the launcher has started 4 processes"):
        launch.world_size(2)
    assert launch.world_size(4) == launch.world_size(None) == 4


def test_half_a_launcher(monkeypatch: pytest.MonkeyPatch):
    launched_by(monkeypatch, RANK="1", WORLD_SIZE="2")
    with pytest.raises(ConfigError, match="says RANK=1 but lacks LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_P"):
        launch.world_size(None)


@pytest.mark.parametrize(("launcher", "name"), [("srun", "SLURM_STEP_NUM_TASKS"), ("mpirun", "OMPI_COMM_WORLD_SIZE")])
def test_processes_that_do_not_know_of_each_other(launcher: str, name: str, monkeypatch: pytest.MonkeyPatch):
    launched_by(monkeypatch, **{name: "1"})
    assert launch.world_size(None) == 1
    launched_by(monkeypatch, **{name: "8"})
    with pytest.raises(ConfigError, match=f"{launcher} has started 8 processes .* that do not know of each other"):
        launch.world_size(None)


def test_ddp_alone():
    with pytest.raises(ConfigError, match="engine is ddp, but this process was started alone; start it by torchrun"):
        launch.world_size(None, "ddp")
    assert launch.world_size(2, "ddp") == 2


def test_the_deepspeed_launcher_is_understood(monkeypatch: pytest.MonkeyPatch):
    environment = {name: value for name, value in TWO.items() if name != "LOCAL_WORLD_SIZE"}
    launched_by(monkeypatch, LOCAL_SIZE="2", **environment)
    assert launch.adopt_launcher(["--local_rank=1", "--seed", "3"]) == ["--seed", "3"]
    assert launch.launched() and not launch.is_first() and launch.world_size(None) == 2


def test_a_name_without_an_address(monkeypatch: pytest.MonkeyPatch):
    launched_by(monkeypatch, **{**TWO, "MASTER_ADDR": "no.such.machine.invalid"})
    unreachable = pytest.raises(
        distributed.Unreachable, match="MASTER_ADDR is 'no.such.machine.invalid', of which this"
    )
    with unreachable, distributed.join(torch.device("cpu")):
        pass


def test_others_arguments_are_left_alone():
    assert launch.adopt_launcher(["--local_rank=1"]) == ["--local_rank=1"]


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("RANK", "2", "RANK is 2; allowed is less than WORLD_SIZE, 2."),
        ("LOCAL_RANK", "5", "LOCAL_RANK is 5; allowed is less than LOCAL_WORLD_SIZE, 2."),
        ("LOCAL_RANK", "x", "LOCAL_RANK is 'x'; allowed is a whole number"),
        ("MASTER_PORT", "99999", "MASTER_PORT is '99999'; allowed is a port"),
        ("MASTER_PORT", "", "MASTER_PORT is ''; allowed is a port"),
    ],
)
def test_environments_that_fit_nothing(name: str, value: str, words: str, monkeypatch: pytest.MonkeyPatch):
    launched_by(monkeypatch, **{**TWO, name: value})
    with pytest.raises(ConfigError, match=words):
        launch.world_size(None)
