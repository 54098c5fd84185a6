"""Two machines, each of them a network namespace with an address of its own, train as one process does, and one of them
may fail. They are started by scripts/launch/two_nodes.sh."""

import os
import shutil
import signal
import subprocess
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import train_minimal
from llmcore import models
from llmcore.train.run import read_log

ROOT = Path(__file__).parents[2]
ENGINES = {"ddp": ["--engine", "ddp", "--deepspeed", "null"], "zero2": []}  # zero2 is the script's own
GONE = "train_minimal.py: another process of the run is gone; --resume {} goes on from its last checkpoint, step_"


class Node:
    """A machine. Rank `number`, because torchrun numbers machines in the order of their addresses."""

    def __init__(self, number: int, network: str, folder: Path) -> None:
        self.number, self.namespace, self.cable = number, f"{network}n{number}", f"{network}c{number}"
        self.address = f"10.77.0.{number + 1}"
        self.out, self.error = folder / f"node{number}.out", folder / f"node{number}.err"
        self.process: subprocess.Popen[bytes] | None = None
        ip("netns", "add", self.namespace)

    def connect(self) -> None:
        ip("link", "set", self.cable, "netns", self.namespace)
        ip("-n", self.namespace, "addr", "add", f"{self.address}/24", "dev", self.cable)
        for device in ("lo", self.cable):
            ip("-n", self.namespace, "link", "set", device, "up")

    def start(self, master: "Node", argv: list[str], **environment: str) -> None:
        environment = {
            **os.environ, "PATH": f"{sysconfig.get_path('scripts')}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": self.cable, "GPUS": "1", "MASTER": f"{master.address}:29500",
            # the host name, of which there is but one here, says nothing about the address
            "PET_LOCAL_ADDR": self.address, "PET_RDZV_CONF": f"join_timeout=200,is_host={int(self is master)}",
            **environment,
        }  # fmt: skip
        environment.pop("WORLD_SIZE", None)
        command = ["ip", "netns", "exec", self.namespace, str(ROOT / "scripts/launch/two_nodes.sh"), *argv]
        with self.out.open("ab") as out, self.error.open("ab") as error:
            self.process = subprocess.Popen(command, env=environment, stdout=out, stderr=error)

    def wait(self) -> int:
        assert self.process is not None
        return self.process.wait(timeout=300)

    def kill(self) -> None:
        """All that runs there, at once."""
        while processes := ip("netns", "pids", self.namespace).split():
            for process in processes:
                try:
                    os.kill(int(process), signal.SIGKILL)
                except ProcessLookupError:
                    pass
            if self.process is not None:
                self.process.wait(timeout=60)

    def said(self) -> list[str]:
        """What train_minimal.py said; nothing from its depths may stand beside it."""
        text = self.error.read_text()
        assert "[rank" not in text and "Traceback" not in text, text
        return [line for line in text.splitlines() if line.startswith("train_minimal.py: ")]


def ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[list[Node]]:
    if shutil.which("ip") is None or not hasattr(os, "geteuid") or os.geteuid() != 0:
        pytest.skip("network namespaces are made by root, with the command `ip`")
    if not (Path(sysconfig.get_path("scripts")) / "torchrun").exists():
        pytest.skip("torchrun is not installed beside this Python")
    network, made = f"ll{os.getpid()}", []
    try:
        try:
            for number in (0, 1):
                made.append(Node(number, network, tmp_path))
            ip("link", "add", made[0].cable, "type", "veth", "peer", "name", made[1].cable)
        except subprocess.CalledProcessError as error:
            pytest.skip(f"network namespaces cannot be made here: {error.stderr.strip()}")
        for node in made:
            node.connect()
        yield made
    finally:
        for node in made:
            node.kill()
        subprocess.run(["ip", "link", "del", f"{network}c0"], capture_output=True)  # where a test has not got that far
        for node in made:
            ip("netns", "del", node.namespace)


@pytest.fixture
def options(small: list[str]) -> list[str]:
    return [*small, "--batch_size", "2"]


def engine(name: str) -> list[str]:
    if name != "ddp":
        pytest.importorskip("deepspeed", reason="needs deepspeed")
    return ENGINES[name]


def both(nodes: list[Node], argv: list[str], name: str, master: int = 0) -> None:
    for node in nodes:
        node.start(nodes[master], argv, NAME=name)


def until(what: Callable[[], object], nodes: list[Node]) -> None:
    deadline = time.monotonic() + 120
    while not what():
        assert time.monotonic() < deadline, "".join(node.error.read_text() for node in nodes)
        time.sleep(0.02)


def curve(run: Path) -> list[float]:
    """The losses and the validations."""
    return [line[key] for line in read_log(run) for key in ("loss", "val_bpb") if key in line]


@pytest.mark.parametrize("kind", ["ddp", pytest.param("zero2", marks=pytest.mark.slow)])
def test_two_nodes_equal_one_process(kind: str, nodes: list[Node], options: list[str], tmp_path: Path):
    options += ["--max_steps", "10", "--eval_interval", "5"]
    both(nodes, [*options, *engine(kind)], "two")
    assert [node.wait() for node in nodes] == [0, 0], nodes[0].error.read_text()
    assert train_minimal.main([*options, "--batch_size", "4", "--name", "one"]) == 0

    one, two = tmp_path / "runs" / "one", tmp_path / "runs" / "two"
    assert curve(two) == pytest.approx(curve(one), rel=1e-5)
    expected = models.load(one / "step_10").state_dict()
    for name, given in models.load(two / "step_10").state_dict().items():
        # Adam divides by the gradient's size: where a gradient is nothing but rounding, so is its step of up to lr.
        difference = (given - expected[name]).abs()
        assert difference.mean() < 1e-6 and difference.max() < 1e-3, name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "victim", "cable"),
    [("ddp", 1, "stays"), ("ddp", 0, "stays"), ("zero2", 1, "stays"), ("zero2", 0, "stays"), ("ddp", 1, "is pulled")],
)
def test_a_node_fails_and_comes_back(
    kind: str, victim: int, cable: str, nodes: list[Node], options: list[str], tmp_path: Path
):
    """Where the cable is pulled too, as when the power fails, nothing tells the survivor."""
    options += [*engine(kind), "--max_steps", "200", "--checkpoint_interval", "10", "--log_interval", "5"]
    fails, survives = nodes[victim], nodes[1 - victim]
    run, straight = tmp_path / "runs" / "failed", tmp_path / "runs" / "straight"
    both(nodes, options, "failed", master=survives.number)
    until((run / "step_20").exists, nodes)
    if cable == "is pulled":
        ip("-n", fails.namespace, "link", "set", fails.cable, "down")
    fails.kill()
    assert not (run / "final").exists()
    if cable == "is pulled":
        time.sleep(5)
        ip("-n", fails.namespace, "link", "set", fails.cable, "up")
    else:
        until(survives.said, nodes)
    fails.start(survives, options, NAME="failed")
    assert (fails.wait(), survives.wait()) == (0, 0), survives.error.read_text()

    sentences = survives.said()
    assert fails.said() == [] and len(sentences) == 1 and sentences[0].startswith(GONE.format(run))
    starts = [line["step"] for line in read_log(run) if line.get("event") == "start"]
    assert len(starts) == 2 and starts[1] >= 20
    both(nodes, options, "straight", master=survives.number)
    assert [node.wait() for node in nodes] == [0, 0]
    assert (run / "final").resolve().name == (straight / "final").resolve().name == "step_200"
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert (run / "step_200" / name).read_bytes() == (straight / "step_200" / name).read_bytes()
    losses = [{line["step"]: line["loss"] for line in read_log(r) if "loss" in line} for r in (run, straight)]
    assert losses[0] == losses[1]


@pytest.mark.slow
def test_nodes_that_cannot_reach_each_other(nodes: list[Node], options: list[str], tmp_path: Path):
    """Their host name leads gloo to the loopback device, as it does on many machines."""
    for node in nodes:
        node.start(nodes[0], options, NAME="a", GLOO_SOCKET_IFNAME="lo")
    until(lambda: all("could not connect to the other ranks" in node.error.read_text() for node in nodes), nodes)
    for node in nodes:
        sentence = node.error.read_text().split("train_minimal.py: ")[1].splitlines()[0]
        assert sentence.startswith(f"rank {node.number} on ") and "GLOO_SOCKET_IFNAME" in sentence
    assert not (tmp_path / "runs").exists()
