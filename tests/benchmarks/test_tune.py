"""Tuning: what is ranked compiles well, what wins is right and faster, and what is written changes nothing else."""

import importlib
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")

from bench.__main__ import main as bench_main  # noqa: E402
from bench.compile.ahead_of_time import Compiled  # noqa: E402
from bench.compile.record import ROOT  # noqa: E402
from bench.ops import Case  # noqa: E402
from bench.timing import Timing  # noqa: E402
from bench.tune import candidates, cli, model, places, rank, sweep, table, workers  # noqa: E402
from bench.tune.launches import launches  # noqa: E402
from llmcore.kernels import swiglu  # noqa: E402

EVERY_SLOT = [
    slot for op in candidates.SLOTS for architecture in ("sm_90", "sm_80", "sm_86")
    for slot in candidates.slots(op, architecture)
]  # fmt: skip


def slot_of(op: str, name: str) -> candidates.Slot:
    return next(slot for slot in candidates.slots(op, "sm_90") if slot.name == name)


# ranking


def test_ranking_drops_what_spills_and_what_does_not_fit():
    slot = slot_of("attention", "forward half 128")
    spills, does_not_fit, good = ((128, 128, 4, 2),), ((128, 128, 8, 4),), ((128, 64, 8, 2),)
    with workers.Workers(90, 2) as pool:
        row = rank.rank_slot(slot, "sm_90", pool, [spills, does_not_fit, good])
    assert {entry["values"] for entry in row["ranked"]} == {slot.incumbent(), good}
    assert row["dropped"] == {"spills": 1, "more shared memory than a program can have": 1}
    assert row["incumbent"]["rank"] in (1, 2)


def test_a_candidate_that_takes_the_compiler_down_is_one_that_does_not_compile(monkeypatch):
    script = "import os, sys; sys.stdin.readline(); os._exit(11)"
    usual = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda command, **how: usual([sys.executable, "-c", script], **how))
    slot = slot_of("swiglu", "pieces")
    with workers.Workers(90, 1) as pool:
        outcomes = pool.compile([(slot, values, "bf16 11008") for values in slot.candidates[:2]])
    assert outcomes == ["the compiler died (11)"] * 2


def compiled(**facts: int) -> Compiled:
    usual = {"registers": 128, "stack": 0, "shared": 65536, "num_warps": 4, "occupancy": 8, "wgmma": 8, "mma_sync": 0}
    return Compiled("case", "kernel", **{**usual, "bulk_copies": 2, "async_copies": 0, **facts})


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ({}, None),
        ({"stack": 8}, "spills"),
        ({"wgmma": 0, "mma_sync": 8}, "loses its wgmma"),
        ({"bulk_copies": 0}, "loses its bulk_copies"),
        ({"shared": 232449}, "more shared memory than a program can have"),
    ],
)
def test_what_is_dropped(facts, reason):
    assert rank.against("sm_90", [compiled(**facts)], [compiled()]) == reason


def test_a_better_kind_of_instruction_is_no_loss():
    assert rank.against("sm_90", [compiled()], [compiled(wgmma=0, mma_sync=8, bulk_copies=0, async_copies=4)]) is None


def test_what_does_not_compile_is_dropped_by_kind():
    reasons = {rank.against("sm_90", f"ValueError: {number} is too much", [compiled()]) for number in (1, 2.5)}
    assert reasons == {"ValueError: … is too much"}


def test_a_smaller_spill_than_the_incumbents_is_kept():
    assert rank.against("sm_90", [compiled(stack=8)], [compiled(stack=16)]) is None


def test_the_model_prefers_less_of_everything():
    work = model.Work(1024.0, {"half": 1e6, "exponentials": 1024, "L2": 4096}, stages=2)
    usual = model.cycles("sm_90", work, compiled())
    assert model.cycles("sm_90", work, compiled(occupancy=4)) > usual
    assert model.cycles("sm_90", work, compiled(stack=64)) > usual
    assert model.cycles("sm_90", model.Work(512.0, work.units, stages=2), compiled()) > usual
    assert model.cycles("sm_90", model.Work(1024.0, work.units, stages=1), compiled()) > usual


@pytest.mark.parametrize("slot", EVERY_SLOT, ids=lambda slot: f"{slot.op} {slot.name} {slot.places[0].path[0]}")
def test_every_slot_can_be_ranked(slot):
    deciding = [launch for launch in launches(slot) if launch.work]
    assert deciding and slot.candidates
    for launch in deciding:
        for values in (slot.incumbent(), *slot.candidates):
            assert set(launch.work(values)) == set(slot.kernels)


def test_the_committed_rankings_are_of_slots_that_exist():
    for path in rank.FOLDER.glob("*.json"):
        ranked = rank.read(path)
        names = {slot.name for slot in candidates.slots(ranked["op"], ranked["architecture"])}
        assert set(ranked["slots"]) == names, path


# sweeping: kernels whose result and speed are what the table says


class Planted:
    """swiglu, whose entry decides how long it takes and whether it is right."""

    def __init__(self, seconds: dict, wrong: tuple = ()) -> None:
        self.seconds, self.wrong, self.spent, self.checks = seconds, wrong, 0.0, 0

    def ours(self, x):
        values = (swiglu.PIECES["sm_90"],)
        self.spent = self.seconds[values]
        return x * 2 + (1e-3 if values in self.wrong else 0)

    def reference(self, x):
        return x * 2

    def inputs(self, device):
        self.checks += 1
        return {"x": torch.randn(4, 8, requires_grad=True)}

    def interleaved(self, calls, **_):
        seconds = {}
        for name, call in calls.items():
            call()
            seconds[name] = self.spent
        return {n: Timing((s,), s, s, s) for n, s in seconds.items()}, {
            n: s / seconds["incumbent"] for n, s in seconds.items()
        }


OLD, FAST, FASTER, SLOW, EQUAL, WRONG = (((1024 * i, 4),) for i in (2, 1, 3, 4, 5, 6))
SECONDS = {OLD: 1.0, FAST: 0.9, FASTER: 0.8, SLOW: 1.1, EQUAL: 0.99, WRONG: 0.1}
SETTINGS = sweep.Settings(device="cpu")


@pytest.fixture
def plant(monkeypatch):
    def install(seconds=SECONDS, wrong=(WRONG,)):
        planted = Planted(seconds, wrong)
        case = Case("planted", planted.ours, planted.reference, planted.reference, planted.inputs, (0, 0), (0, 0))
        monkeypatch.setattr(sweep, "workloads", lambda slot, device: [case])
        monkeypatch.setattr(sweep, "interleaved", planted.interleaved)
        return planted

    monkeypatch.setattr(swiglu, "PIECES", {**swiglu.PIECES, "sm_90": OLD[0]})
    return install


def run(ranked, done=(), settings=SETTINGS):
    """The rows as a record gives them back."""
    return json.loads(json.dumps(list(sweep.sweep_slot(slot_of("swiglu", "pieces"), ranked, list(done), settings))))


def values(row):
    return candidates.tupled(row["values"])


def test_the_fastest_right_candidate_replaces_the_incumbent(plant):
    plant()
    rows = run([SLOW, WRONG, FAST, OLD, FASTER])
    assert [row["what"] for row in rows] == ["candidate"] * 4 + ["second timing", "decision"]
    assert values(rows[-1]) == FASTER and rows[-1]["replaces"] and swiglu.PIECES["sm_90"] == OLD[0]


def test_a_planted_wrong_candidate_is_named_and_not_timed(plant):
    plant()
    wrong, decision = run([WRONG])
    assert values(wrong) == WRONG and "output 0: WRONG" in wrong["error"] and "timed" not in wrong
    assert not decision["replaces"] and values(decision) == OLD


@pytest.mark.parametrize("candidate", [SLOW, EQUAL], ids=["slower", "faster by less than the margin"])
def test_what_is_not_faster_beyond_noise_never_wins(plant, candidate):
    plant()
    assert not run([candidate])[-1]["replaces"]


def test_a_noisy_machine_asks_for_more():
    row = {"case": "c", "ratio": 0.95}
    assert sweep.faster([{**row, "noise": 0.01}]) and not sweep.faster([{**row, "noise": 0.02}])


def test_a_candidate_slower_on_one_workload_does_not_win():
    rows = [{"case": "a", "ratio": 0.5, "noise": 0.0}, {"case": "b", "ratio": 1.05, "noise": 0.0}]
    assert not sweep.faster(rows)


def test_a_lucky_reading_does_not_win(plant):
    planted = plant()
    usual, readings = planted.interleaved, []

    def lucky(calls, **how):
        timings, ratios = usual(calls, **how)
        readings.append(ratios["candidate"])
        return timings, {**ratios, "candidate": ratios["candidate"] * (0.5 if len(readings) == 1 else 1.0)}

    sweep.interleaved = lucky
    first, second, decision = run([SLOW])
    assert first["timed"][0]["ratio"] < 0.6 and second["timed"][0]["ratio"] > 1 and not decision["replaces"]


def test_a_wrong_incumbent_ends_its_slot(plant):
    plant(wrong=(OLD,))
    (row,) = run([FAST])
    assert row["what"] == "incumbent" and "WRONG" in row["error"]


def test_what_is_recorded_is_not_measured_again(plant):
    planted = plant()
    rows = run([WRONG, FAST, FASTER])
    planted.checks = 0
    assert run([WRONG, FAST, FASTER], rows[:3]) == rows[3:]
    assert planted.checks == 2  # one second timing: to prove and to time
    assert run([WRONG, FAST, FASTER], rows[:4]) == rows[4:] and planted.checks == 2
    places.put(slot_of("swiglu", "pieces").places, FASTER)
    assert run([WRONG, FAST, FASTER], rows) == []


def test_a_sweep_that_is_out_of_time_decides_nothing(plant):
    plant()
    assert run([FAST], settings=sweep.Settings(device="cpu", deadline=0.0)) == []


def test_a_dead_device_is_blamed_on_one_candidate(plant, monkeypatch):
    plant()
    monkeypatch.setattr(sweep, "_answers", lambda device: False)
    rows = []
    with pytest.raises(sweep.Broken, match="6144"):
        for row in sweep.sweep_slot(slot_of("swiglu", "pieces"), [WRONG, FAST], [], SETTINGS):
            rows.append(row)
    assert [row["values"] for row in rows] == [WRONG]


def test_an_injected_entry_is_taken_out_again_whatever_happens():
    slot = slot_of("rms_norm", "backward")
    before = slot.incumbent()
    with pytest.raises(ZeroDivisionError), places.injected(slot.places, (8192, 0)):
        assert slot.incumbent() == (8192, 0)
        raise ZeroDivisionError
    assert slot.incumbent() == before


# writing


@pytest.fixture
def kernels(tmp_path):
    """A copy of kernels/ that can be imported."""
    folder = tmp_path / "copied_kernels"
    shutil.copytree(ROOT / "kernels", folder, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "__init__.py").touch()
    return folder


def tables_of(folder, monkeypatch) -> dict:
    """Every table that a slot stands in, from a fresh import of the copy."""
    for name in [name for name in sys.modules if name.startswith(folder.name)]:
        del sys.modules[name]
    importlib.invalidate_caches()
    monkeypatch.syspath_prepend(folder.parent)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    names = {(place.module, place.table) for slot in EVERY_SLOT for place in slot.places}
    return {(module, name): getattr(importlib.import_module(f"{folder.name}.{module}"), name) for module, name in names}


def test_the_winner_is_written_and_nothing_else(kernels, monkeypatch):
    slot = slot_of("attention", "dk/dv half 128")
    before = tables_of(kernels, monkeypatch)
    table.write(slot.places, ((32, 128, 8, 3),), kernels)
    after = tables_of(kernels, monkeypatch)
    assert after["attention_bwd", "DKDV_CONFIGS"]["sm_90", "half"][128] == (32, 128, 8, 3)
    after["attention_bwd", "DKDV_CONFIGS"]["sm_90", "half"][128] = slot.incumbent()[0]
    assert after == before
    changed = [
        (old, new)
        for path in (ROOT / "kernels").glob("*.py")
        for old, new in zip(path.read_text().splitlines(), (kernels / path.name).read_text().splitlines(), strict=True)
        if old != new
    ]
    ((old, new),) = changed
    assert old.replace("(64, 64, 4, 2)", "(32, 128, 8, 3)", 1) == new


def test_every_entry_can_be_written_stays_formatted_and_comes_back(kernels):
    for slot in EVERY_SLOT:
        table.write(slot.places, max(slot.candidates, key=lambda chosen: len(str(chosen))), kernels)
    done = subprocess.run(
        [sys.executable, "-m", "ruff", "format", "--check", "--config", str(ROOT / "pyproject.toml"), str(kernels)],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    for slot in EVERY_SLOT:
        table.write(slot.places, slot.incumbent(), kernels)
    for path in (ROOT / "kernels").glob("*.py"):
        assert (kernels / path.name).read_bytes() == path.read_bytes(), path.name


def test_a_place_that_is_not_there_is_an_error(kernels):
    with pytest.raises(KeyError, match="0 entries 'sm_100'"):
        table.write([places.Place("swiglu", "PIECES", ("sm_100",))], [(1, 1)], kernels)
    with pytest.raises(KeyError, match="no table PEACES"):
        table.write([places.Place("swiglu", "PEACES", ("sm_90",))], [(1, 1)], kernels)


# the command


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (["swigloo"], "swigloo has no tables to tune; allowed: apply_rotary, attention, rms_norm, swiglu."),
        (["swiglu"], "there is no GPU here to time candidates on; --rank ranks them without one."),
        (["swiglu", "--rank", "--capability", "70"], "--capability is 70; the tables have rows for 80, 86, 90."),
        (["swiglu", "--rank", "--only", "half"], "no slot of swiglu holds 'half'; there are: pieces."),
        (["swiglu", "--rank", "--top", "0"], "--top is 0; it must be at least 1."),
    ],
)
def test_mistakes_get_one_sentence(arguments, found, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench", "tune", *arguments])
    with pytest.raises(SystemExit) as stopped:
        bench_main()
    assert stopped.value.code == 2 and found in capsys.readouterr().err


def test_a_rehearsal_sweeps_interpreted_kernels_and_leaves_the_tables(tmp_path):
    before = (ROOT / "kernels" / "swiglu.py").read_bytes()
    command = [sys.executable, "-m", "bench", "tune", "swiglu", "--rehearse", "--top", "1", "--results", str(tmp_path)]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("*/tune-swiglu.json")
    candidate, *_, decision = json.loads(path.read_text())["records"]
    assert candidate["timed"][0]["ratio"] > 0 and decision["what"] == "decision"
    assert (ROOT / "kernels" / "swiglu.py").read_bytes() == before


def test_rows_read_as_sentences():
    row = {"slot": "pieces", "what": "candidate", "values": [[1, 2]], "error": "nothing"}
    assert cli.sentence(row).endswith("WRONG: nothing")
