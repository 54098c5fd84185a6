"""`llmcore bench`: the shapes of one's own model are measured and recorded; what cannot be measured is said."""

import json
from pathlib import Path

import pytest
import torch

from bench import measure, run_ops
from bench.ceilings import Ceilings
from llmcore.cli import bench, main

CEILINGS = Ceilings(1e9, dict.fromkeys((torch.float32, torch.bfloat16, torch.float16), 1e9), 1e-6)


def test_the_shapes_of_ones_own_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    usual = measure.interleaved
    monkeypatch.setattr(measure, "LARGEST_ROTATION", 1)
    monkeypatch.setattr(
        measure, "interleaved", lambda calls, device: usual(calls, device=device, rounds=2, round_seconds=1e-4)
    )
    monkeypatch.setattr(run_ops, "measure_ceilings", lambda device: CEILINGS)
    monkeypatch.setattr(torch, "compile", lambda function: function)
    threads = torch.get_num_threads()
    shape = ["--batch_size", "2", "--seq_len", "8", "--dtype", "float32"]
    assert main(["bench", "--mine", "tiny", *shape, "--results", str(tmp_path)]) == 0
    assert torch.get_num_threads() == threads
    (path,) = tmp_path.glob("*/mine-tiny-2x8-float32.json")
    rows = [row for row in json.loads(path.read_text())["records"] if "op" in row]
    assert {row["op"] for row in rows} == {"apply_rotary", "attention", "rms_norm", "swiglu"}
    assert {row["case"] for row in rows if row["op"] == "swiglu"} == {"16x384 float32"}
    assert all(row["times faster than"]["eager"] > 0 for row in rows)
    assert "written: " in capsys.readouterr().out


def test_a_model_and_an_op_exclude_each_other(capsys):
    assert main(["bench", "swiglu", "--mine", "tiny"]) == 2
    assert "--mine measures every op, so swiglu cannot be named too" in capsys.readouterr().err


def test_a_model_that_is_not_there(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["bench", "--mine", "nowhere.json"])
    assert stopped.value.code == 2
    assert "nowhere.json is neither a preset (tiny" in capsys.readouterr().err


def test_an_installed_package_holds_no_benchmarks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr(bench, "__file__", str(tmp_path / "llmcore" / "cli" / "bench.py"))
    assert main(["bench"]) == 2
    assert "needs the repository's folder bench/" in capsys.readouterr().err
