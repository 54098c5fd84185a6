"""The benchmarks catch what they are there to catch: a wrong kernel, a slower one, a peer that is not there."""

import dataclasses
import json
import subprocess
import sys

import pytest
import torch

from bench import compare, report, run_ops
from bench.__main__ import RESULTS, ROOT
from bench.ceilings import Ceilings
from bench.ops import bench_rms_norm

CEILINGS = Ceilings(1e9, {torch.float32: 1e9, torch.bfloat16: 1e9})


@pytest.fixture
def case():
    case = bench_rms_norm.case(8, 32, torch.float32, residual=False)
    return dataclasses.replace(case, ours=case.eager)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Few and short rounds; nothing is compiled."""
    usual = run_ops.interleaved
    monkeypatch.setattr(
        run_ops, "interleaved", lambda calls, device: usual(calls, device=device, rounds=2, round_seconds=1e-4)
    )
    monkeypatch.setattr(torch, "compile", lambda function: function)


def test_a_record_has_times_ratios_and_rates(case):
    forward, training = run_ops.measure(case, CEILINGS, "cpu")
    assert (forward["pass"], training["pass"]) == ("forward", "forward + backward")
    assert set(forward["microseconds"]) == {"llmcore", "eager", "torch.compile"}
    assert set(training["times faster than"]) == {"eager", "torch.compile"}
    moved = 2 * 8 * 32 * 4
    assert forward["GB/s"]["eager"] == pytest.approx(moved / forward["microseconds"]["eager"] / 1e3, abs=0.06)


def test_a_planted_wrong_result_is_found_and_not_timed(case):
    def wrong(x, weight):
        return case.eager(x, weight) * 1.0001

    (record,) = run_ops.measure(dataclasses.replace(case, ours=wrong), CEILINGS, "cpu")
    assert "WRONG" in record["error"] and "microseconds" not in record


def test_a_planted_wrong_gradient_is_found(case):
    def wrong(x, weight):
        return case.eager(x, weight) + 0 * x.sum() + (x - x.detach()) * 1e-3

    (record,) = run_ops.measure(dataclasses.replace(case, ours=wrong), CEILINGS, "cpu")
    assert "gradient of x" in record["error"]


def test_peers_that_do_not_load_or_agree_are_named(case):
    def missing():
        raise ImportError("no such package")

    peers = {"absent": missing, "other": lambda: lambda x, weight: 2 * case.eager(x, weight)}
    forward, _ = run_ops.measure(dataclasses.replace(case, peers=peers), CEILINGS, "cpu")
    assert forward["absent"]["absent"] == "ImportError: no such package"
    assert forward["absent"]["other"].startswith("disagrees: relative distance")
    assert set(forward["microseconds"]) == {"llmcore", "eager", "torch.compile"}


def test_a_planted_slow_kernel_is_found(case):
    def slow(x, weight):
        for _ in range(6):
            case.eager(x, weight)
        return case.eager(x, weight)

    old, new = (
        {
            "records": [
                {"op": "rms_norm", **r} for r in run_ops.measure(dataclasses.replace(case, ours=f), CEILINGS, "cpu")
            ]
        }
        for f in (case.eager, slow)
    )
    for record in (*old["records"], *new["records"]):
        record["spread"] = dict.fromkeys(record["spread"], 0.05)  # two rounds have no quartiles to speak of
    assert compare.regressions(old, old) == []
    found = compare.regressions(old, new)
    assert len(found) == 2 and all("times faster than eager before" in sentence for sentence in found)


def test_comparing_says_what_is_gone_or_wrong():
    row = {
        "op": "a",
        "case": "b",
        "pass": "forward",
        "times faster than": {"eager": 1.0},
        "spread": {"llmcore": 0, "eager": 0},
    }
    assert compare.regressions({"records": [row]}, {"records": []}) == ["a b forward: no longer measured"]
    wrong = {"records": [{"op": "a", "case": "b", "error": "x"}]}
    assert compare.regressions({"records": [row]}, wrong) == ["a b forward: wrong (x)"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["compare", "one.json"], "compare takes two records, old and new, but 1 were given"),
        (["compare", "none.json", "none.json"], "none.json cannot be read: No such file or directory"),
        (["compare", "README.md", "README.md"], "README.md is not a record of python -m bench"),
        (["ops", "rms_nrom"], "rms_nrom is not an op; allowed: apply_rotary, attention, rms_norm, swiglu"),
    ],
)
def test_bad_arguments_get_one_sentence(arguments, sentence):
    done = subprocess.run([sys.executable, "-m", "bench", *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0 and sentence in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("name", report.WORDS)
def test_the_readmes_figures_are_those_of_the_records(name):
    text = (ROOT / name).read_text()
    assert report.MARKED.search(text), f"{name} names no folder of records"
    assert report.with_figures(text, report.WORDS[name], RESULTS) == text, "python -m bench report makes them again"


def test_every_record_names_its_machine_and_command():
    records = [path for path in RESULTS.glob("*/*.json") if path.parent.name != "compile"]
    assert records
    for path in records:
        machine = json.loads(path.read_text())["machine"]
        assert {"commit", "command", "date", "torch", "python"} <= machine.keys(), path
