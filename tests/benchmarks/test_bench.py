"""The benchmarks catch what they are there to catch: a wrong kernel, a slower one, a peer that is not there."""

import dataclasses
import json
import subprocess
import sys
import time

import pytest
import torch

from bench import compare, measure, mine, report, run_curves, run_errors, run_hugging_face, run_lengths, run_loop
from bench.__main__ import RESULTS, ROOT
from bench.ceilings import Ceilings
from bench.ops import bench_attention, bench_rms_norm, bench_selective_state_update
from bench.peers import load_peers
from bench.timing import Rotated, peak_memory
from llmcore import ops
from llmcore.train import distributed
from llmcore.train.config import TrainConfig

CEILINGS = Ceilings(1e9, {torch.float32: 1e9, torch.bfloat16: 1e9}, 1e-6)


def records(case, ceilings, device):
    return [found.record for found in measure.measure(case, ceilings, device)]


@pytest.fixture
def case():
    case = bench_rms_norm.case(8, 32, torch.float32, residual=False)
    return dataclasses.replace(case, ours=case.eager, peers={})


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Few and short rounds; nothing is compiled."""
    usual = measure.interleaved
    monkeypatch.setattr(measure, "LARGEST_ROTATION", 1)
    monkeypatch.setattr(
        measure, "interleaved", lambda calls, device: usual(calls, device=device, rounds=5, round_seconds=1e-4)
    )
    monkeypatch.setattr(torch, "compile", lambda function: function)


def test_a_record_has_times_ratios_and_rates(case):
    forward, training = records(case, CEILINGS, "cpu")
    assert (forward["pass"], training["pass"]) == ("forward", "forward + backward")
    assert set(forward["microseconds"]) == {"llmcore", "eager", "torch.compile"}
    assert set(training["times faster than"]) == {"eager", "torch.compile"}
    moved = 2 * 8 * 32 * 4
    assert forward["GB/s"]["eager"] == pytest.approx(moved / forward["microseconds"]["eager"] / 1e3, rel=0.01)


def test_an_op_that_changes_its_input_and_has_no_gradient_is_measured():
    (record,) = records(bench_selective_state_update.case(1, 32, 4, torch.float32), CEILINGS, "cpu")
    assert record["pass"] == "forward" and record["times faster than"]["eager"] > 0


def test_a_planted_wrong_result_is_found_and_not_timed(case):
    def wrong(x, weight):
        return case.eager(x, weight) * 1.0001

    (record,) = records(dataclasses.replace(case, ours=wrong), CEILINGS, "cpu")
    assert "WRONG" in record["error"] and "microseconds" not in record


def test_a_planted_wrong_gradient_is_found(case):
    def wrong(x, weight):
        return case.eager(x, weight) + 0 * x.sum() + (x - x.detach()) * 1e-3

    (record,) = records(dataclasses.replace(case, ours=wrong), CEILINGS, "cpu")
    assert "gradient of x" in record["error"]


def test_peers_that_do_not_load_or_agree_are_named(case):
    def missing():
        raise ImportError("no such package")

    peers = {"absent": missing, "other": lambda: lambda x, weight: 2 * case.eager(x, weight)}
    forward, _ = records(dataclasses.replace(case, peers=peers), CEILINGS, "cpu")
    assert forward["absent"]["absent"] == "ImportError: no such package"
    assert forward["absent"]["other"].startswith("disagrees: relative distance")
    assert set(forward["microseconds"]) == {"llmcore", "eager", "torch.compile"}


def test_a_planted_slow_kernel_is_found(case):
    def slow(x, weight):
        for _ in range(20):
            case.eager(x, weight)
        return case.eager(x, weight)

    old, new = (
        {"records": [{"op": "rms_norm", **r} for r in records(dataclasses.replace(case, ours=f), CEILINGS, "cpu")]}
        for f in (case.eager, slow)
    )
    for record in (*old["records"], *new["records"]):
        record["spread"] = dict.fromkeys(record["spread"], 0.05)  # so short a run has no quartiles to speak of
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


def test_inputs_are_rotated_over_copies(case, monkeypatch):
    monkeypatch.setattr(measure, "LARGEST_ROTATION", 10 * 3 * 8 * 32 * 4)  # of x and its cotangent, and a weight
    inputs, cotangents = case.inputs("cpu"), [torch.ones(8, 32)]
    sets = measure.sets_of(inputs, cotangents, "cpu")
    assert 10 <= len(sets) <= 15
    assert len({s[0]["x"].data_ptr() for s in sets} | {s[1][0].data_ptr() for s in sets}) == 2 * len(sets)
    seen = []
    rotated = Rotated([lambda i=i: seen.append(i) for i in range(3)])
    for _ in range(6):
        rotated()
    assert sorted(seen[:3]) == [0, 1, 2] and seen[:3] == seen[3:]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the CPU's peak memory is read from Linux")
def test_peak_memory_is_that_of_the_call():
    x = torch.randn(2048, 2048)
    peak = peak_memory(lambda: x + 1, "cpu")
    if peak is None:
        pytest.skip("this system does not let a process reset its peak memory")
    assert x.nbytes <= peak < 1.3 * x.nbytes


def test_an_in_place_peer_leaves_the_inputs_of_the_others_alone(case):
    def spoils(x, weight):
        y = case.eager(x, weight)
        x.detach().zero_()
        return y

    inputs, cotangents = case.inputs("cpu"), [torch.ones(8, 32)]
    before = inputs["x"].detach().clone()
    peers, absent = load_peers(dataclasses.replace(case, peers={"spoils": lambda: spoils}), inputs, cotangents)
    assert torch.equal(inputs["x"], before) and "eager" in peers


def test_a_peer_with_a_wrong_gradient_or_nan_is_named(case):
    inputs, cotangents = case.inputs("cpu"), [torch.randn(8, 32)]
    wrong = {
        "gradient": lambda: lambda x, weight: case.eager(x, weight) + (x - x.detach()),
        "nan": lambda: lambda x, weight: case.eager(x, weight) * float("nan"),
    }
    peers, absent = load_peers(dataclasses.replace(case, peers=wrong), inputs, cotangents)
    assert not set(wrong) & set(peers) and all("disagrees" in absent[name] for name in wrong)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("config.json", '{"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "architectures": ["X"]}'),
        ("config.json", '{"text_config": {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}}'),
        ("run.yaml", "preset: tiny\nmodel: {hidden_size: 64, intermediate_size: 128, num_key_value_heads: 2}\n"),
    ],
)  # fmt: skip
def test_the_shapes_of_a_model_are_read(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    config = mine.read_shapes(str(tmp_path if name == "config.json" else tmp_path / name))
    cases = mine.cases_of_model(config, 2, 8, torch.float32, "cpu")
    assert set(cases) == set(ops.registry)
    q, k = (cases["attention"][0].inputs("cpu")[n].shape for n in "qk")
    assert (q, k) == ((2, 8, 4, 16), (2, 8, 2, 16))
    assert cases["swiglu"][0].inputs("cpu")["gate"].shape == (16, 128)


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("a.json", None, "is neither a preset (tiny"),
        ("a.json", "{", "cannot be parsed"),
        ("a.yaml", "{", "cannot be parsed"),
        ("a.json", "[]", "holds no names and values, but list"),
        ("a.json", '{"hidden_size": 64}', "has no intermediate_size"),
        ("a.json", '{"hidden_size": 64, "intermediate_size": 8, "num_attention_heads": 3}', "ModelConfig: "),
    ],
)
def test_a_model_that_cannot_be_read_gets_one_sentence(tmp_path, name, text, sentence):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError) as caught:
        mine.read_shapes(str(tmp_path / name))
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


def test_pytest_bench_shows_what_was_measured(tmp_path):
    pytest.importorskip("pytest_benchmark", reason="pytest bench needs pytest-benchmark")
    path = tmp_path / "bench.json"
    command = ["-m", "pytest", "bench", "--short", "-q", "-k", "2048x384_float32 and not compile"]
    done = subprocess.run(
        [sys.executable, *command, f"--benchmark-json={path}"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:]
    rows = json.loads(path.read_text())["benchmarks"]
    assert {(r["extra_info"]["pass"], r["extra_info"]["candidate"]) for r in rows} == {
        (direction, candidate) for direction in report.PASSES for candidate in ("llmcore", "eager")
    }
    for row in rows:
        recorded = row["extra_info"]["microseconds"][row["extra_info"]["candidate"]]
        assert row["stats"]["median"] * 1e6 == pytest.approx(recorded, rel=0.01)


def test_every_plot_is_drawn_from_records(case, tmp_path):
    pytest.importorskip("matplotlib", reason="the plots need matplotlib")
    rows = []
    for op, module, sizes in (("attention", bench_attention, (16, 32)), ("rms_norm", bench_rms_norm, (32, 64))):
        for size in sizes:
            small = module.of_size(size, torch.float32, "cpu")
            small = dataclasses.replace(small, ours=small.eager, peers={})
            rows += [{"op": op, **record} for record in records(small, CEILINGS, "cpu")]
    where = {"processor": "p", "threads": 1, "torch": "2", "date": "today"}
    made = {
        "ops": [{"ceilings": CEILINGS.as_record()}, *rows],
        "scaling": [{"threads": n, "precision": "fp32", "tokens per second": {"llmcore": n}} for n in (1, 2)],
        "lengths": [
            {"op": op, "length": n, "nanoseconds a token": {"forward": 3.0, "forward + backward": n}}
            for op in ("a", "b") for n in (1024, 2048)
        ],
        "errors": [
            {"op": "a", "dtype": "float32", "size": n, "value": v, "rms": {"llmcore": 1e-7, "eager": 2e-7 * n}}
            for n in (1, 2) for v in ("output 0", "gradient of x")
        ],
        "curves": [
            {"candidate": c, "name": f"{c}, fp32", "precision": "fp32", "steps": 20, "every": 10, "loss": [2.0, x],
             "held-out bits per byte": x} for c, x in zip(run_curves.CANDIDATES, (1.5, 1.4, 1.2), strict=True)
        ],
    }  # fmt: skip
    for name, found in made.items():
        (tmp_path / f"{name}.json").write_text(json.dumps({"machine": where, "records": found}))
    written = report.report_of(tmp_path)
    names = {path.stem for path in written if path.suffix == ".png"}
    assert {"ratios", "throughput", "bandwidth", "roofline", "scaling", "lengths", "errors", "curves"} <= names
    text = (tmp_path / "report.md").read_text()
    assert "4.00e-07" in text and "llmcore, fp32: 0.0707 rms over 20 steps, 0.1000 over the last tenth" in text


def test_the_cost_by_length():
    rows = list(run_lengths.run((4, 8)))
    assert {(r["op"], r["length"]) for r in rows} == {(op, n) for op in run_lengths.CASES for n in (4, 8)}
    assert all(cost > 0 for r in rows for cost in r["nanoseconds a token"].values())


def test_a_step_against_hugging_face():
    pytest.importorskip("transformers", reason="the peer is transformers")
    (row,) = run_hugging_face.run(("tiny_mamba",), batch_size=1, seq_len=16)
    assert row["milliseconds"].keys() == {"llmcore", "transformers"} and row["logits apart"] < 1e-4


def test_one_ulp_is_the_smallest_step():
    weights = {"w": torch.randn(1000)}
    moved = run_curves.moved_by_one_ulp(weights, 0)["w"]
    assert (moved != weights["w"]).all()
    assert ((moved - weights["w"]).abs() <= torch.finfo(torch.float32).eps * weights["w"].abs()).all()


def test_curves_start_alike(monkeypatch):
    config = TrainConfig(batch_size=2, seq_len=64, final_eval_tokens=256)
    found = list(run_curves.run(20, {f"{c}, bf16" for c in run_curves.CANDIDATES}, config))
    assert [r["candidate"] for r in found] == list(run_curves.CANDIDATES)
    ours, plain, away = (r["loss"] for r in found)
    assert ours == pytest.approx(plain, abs=1e-3) and away == pytest.approx(plain, abs=1e-3)


def test_the_loops_share_is_what_its_parts_leave(monkeypatch):
    def slow(*arguments):
        time.sleep(0.02)
        return seed_step(*arguments)

    seed_step = distributed.seed_step
    monkeypatch.setattr(distributed, "seed_step", slow)
    before = [getattr(owner, name) for _, owner, name in run_loop.PARTS]
    few = ["--batch_size", "1", "--seq_len", "64", "--eval_interval", "10", "--eval_tokens", "64"]
    found = run_loop.measure(30, 5, few)
    assert [getattr(owner, name) for _, owner, name in run_loop.PARTS] == before
    spent = found["milliseconds"]
    parts = {part for part, _, _ in run_loop.PARTS}
    assert set(spent) == {"step", *parts} and all(spent[part] > 0 for part in parts)
    assert spent["step"] == pytest.approx(sum(spent[part] for part in parts), abs=0.01)
    assert 20 < spent["outside"] < 40, "the sleep, and neither validations nor checkpoints"
    assert found["share outside"] == pytest.approx(spent["outside"] / spent["step"], abs=0.001)


def test_time_in_a_part_that_another_calls_is_its_own_alone(monkeypatch):
    class Work:
        def outer(self):
            time.sleep(0.03)
            self.inner()

        def inner(self):
            time.sleep(0.06)

    parts = (("outer", Work, "outer"), ("outside", Work, "inner"))
    monkeypatch.setattr(run_loop, "PARTS", parts)
    with run_loop.timers() as begun:
        for _ in range(2):
            Work().outer()
    assert begun[1]["outside"] == pytest.approx(0.06, abs=0.02) and begun[1]["outer"] == pytest.approx(0.03, abs=0.02)


def test_errors_are_relative_to_the_exact_values():
    exact = torch.tensor([3.0, -4.0, 0.0, 0.0], dtype=torch.float64)
    rms, worst = run_errors.relative_errors(exact.float() + torch.tensor([0.0, 0.0, 0.5, 0.0]), exact)
    assert (rms, worst) == pytest.approx((0.1, 0.2))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["compare", "one.json"], "compare takes two records, old and new, but 1 were given"),
        (["compare", "none.json", "none.json"], "none.json cannot be read: No such file or directory"),
        (["compare", "README.md", "README.md"], "README.md is not a record of python -m bench"),
        (["mine"], "mine takes one model, but 0 were given"),
        (["mine", "README.md"], "README.md cannot be parsed"),
        (["ops", "--threads", "0"], "--threads is 0; allowed: whole numbers from 1"),
        (
            ["ops", "rms_nrom"],
            f"rms_nrom is not an op; allowed: {', '.join(sorted(ops.registry))}.",
        ),
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
