"""Only the steps that were asked for are recorded, into files that never replace others and never fail the run."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from llmcore.train.profile import WARM_UP, Profile


def train(run: Path, steps: int, made: int, first: bool = True) -> list[str]:
    """What is said in a loop of `made` steps."""
    said: list[str] = []
    model = nn.Linear(8, 8)
    with Profile(run, steps, first, said.append) as profile:
        for step in range(made):
            with torch.profiler.record_function(f"training step {step}"):
                model(torch.ones(4, 8)).sum().backward()
            profile.step()
    return said


def steps_in(trace: Path) -> set[str]:
    events = json.loads(trace.read_text())["traceEvents"]
    return {event["name"] for event in events if event["name"].startswith("training step")}


def test_the_steps_after_the_warm_up_are_recorded(tmp_path: Path):
    (said,) = train(tmp_path, 3, 20)
    assert steps_in(tmp_path / "profile" / "trace.json") == {f"training step {WARM_UP + i}" for i in range(3)}
    table = (tmp_path / "profile" / "ops.txt").read_text()
    assert "aten::addmm" in table and "training step 5" in table and "training step 8" not in table
    assert said.startswith(f"profile: {tmp_path / 'profile' / 'ops.txt'} (top: aten::") and said.count(" %") == 3


def test_nothing_is_left_running_after_the_last_step(tmp_path: Path):
    with Profile(tmp_path, 1, True, print) as profile:
        for _ in range(WARM_UP):
            profile.step()
        assert profile.profiler is not None
        profile.step()
        assert profile.profiler is None and not torch.autograd._profiler_enabled()


@pytest.mark.parametrize(("steps", "first"), [(0, True), (3, False)])
def test_nobody_asked_or_another_process_records(tmp_path: Path, steps: int, first: bool):
    assert train(tmp_path, steps, 20, first) == [] and not list(tmp_path.iterdir())


@pytest.mark.parametrize("made", [0, 1, WARM_UP - 1, WARM_UP])
def test_a_run_that_is_over_before_the_recording(tmp_path: Path, made: int):
    assert train(tmp_path, 3, made) == [] and not list(tmp_path.iterdir())
    assert not torch.autograd._profiler_enabled()


def test_a_run_that_ends_while_it_is_recorded(tmp_path: Path):
    def interrupted() -> None:
        with Profile(tmp_path, 10, True, said.append) as profile:
            for step in range(WARM_UP + 3):
                with torch.profiler.record_function(f"training step {step}"):
                    torch.ones(3).exp()
                if step == WARM_UP + 2:
                    raise KeyboardInterrupt
                profile.step()

    said: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert len(said) == 1
    assert steps_in(tmp_path / "profile" / "trace.json") == {f"training step {WARM_UP + i}" for i in range(3)}


def test_a_profile_that_is_there_is_kept(tmp_path: Path):
    for _ in range(3):
        train(tmp_path, 1, 10)
    assert {path.name for path in tmp_path.iterdir()} == {"profile", "profile-2", "profile-3"}
    assert all((path / "ops.txt").is_file() for path in tmp_path.iterdir())


def test_files_that_cannot_be_written_do_not_end_the_run(tmp_path: Path):
    (said,) = train(tmp_path / "nowhere", 1, 10)
    assert said == f"profile: {tmp_path / 'nowhere' / 'profile'} could not be written: No such file or directory"
