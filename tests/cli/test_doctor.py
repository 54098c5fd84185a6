import json
import os
import subprocess
import sys

from llmcore import ops


def doctor(*arguments, **environment):
    command = [sys.executable, "-m", "llmcore.cli", "doctor", *arguments]
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)


def test_table():
    result = doctor()
    assert result.returncode == 0
    for name in ops.registry:
        assert name in result.stdout


def test_json_says_what_runs_and_why_not():
    rows = json.loads(doctor("--json").stdout)["ops"]
    assert {row["op"] for row in rows} == set(ops.registry)
    for row in rows:
        assert row["backends"]["torch"] == "yes" and row["runs on"] in row["backends"]
    cpu = [row for row in rows if row["device"] == "cpu"]
    assert all("interpreter" in row["backends"]["triton"] for row in cpu if "triton" in ops.registry[row["op"]].kernels)


def test_forced_backend():
    rows = json.loads(doctor("--json", LLMCORE_BACKEND="torch").stdout)["ops"]
    assert {row["runs on"] for row in rows} == {"torch"}
    bad = doctor(LLMCORE_BACKEND="tirton")
    assert bad.returncode == 2 and "LLMCORE_BACKEND is 'tirton'" in bad.stdout + bad.stderr
    assert "Traceback" not in bad.stderr


def test_unknown_command():
    result = subprocess.run([sys.executable, "-m", "llmcore.cli", "docter"], capture_output=True, text=True)
    assert result.returncode == 2 and "doctor" in result.stderr


def test_a_forced_backend_that_cannot_run():
    result = doctor("--json", LLMCORE_BACKEND="cuda")
    rows = [row for row in json.loads(result.stdout)["ops"] if row["device"] == "cpu"]
    assert {row["runs on"] for row in rows} == {"nothing"} and result.returncode == 1
