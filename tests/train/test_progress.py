"""A reading is the mean over steps and ranks, waits for the device once, and counts what is known of the hardware only."""

import math
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from llmcore.train import progress
from llmcore.train.distributed import World
from llmcore.train.progress import Meter, Reading, Report, peak_memory_gb
from llmcore.train.run import read_log

CPU = torch.device("cpu")
ALONE = World(0, 1, CPU)


class Twins(World):
    """Two ranks with the same values."""

    def sum(self, value):
        return 2 * value


def meter_of(*losses: float, norm: float = 3.0) -> Meter:
    meter = Meter(100, 1e9, CPU, 1)
    for loss in losses:
        meter.add(torch.tensor(loss), torch.tensor(norm))
    return meter


@pytest.mark.parametrize("world", [ALONE, Twins(0, 2, CPU)], ids=["one rank", "two ranks"])
def test_the_loss_is_a_mean_and_the_norm_is_the_last_ones(world: World):
    meter = meter_of(1.0, math.nan, 2.0)
    meter.add(torch.tensor(6.0), torch.tensor(5.0))
    reading = meter.read(world)
    assert (reading.loss, reading.grad_norm) == (3.0, 5.0)
    meter.add(torch.tensor(7.0), torch.tensor(4.0))
    assert meter.read(world).loss == 7.0, "the reading before is over"
    assert math.isnan(meter_of(math.inf).read(world).loss)


def test_a_reading_is_one_transfer(monkeypatch: pytest.MonkeyPatch):
    fetched = []
    for name in ("tolist", "item", "__bool__", "__float__", "__int__", "cpu", "numpy"):
        original = getattr(torch.Tensor, name)

        def counted(tensor, *arguments, name=name, original=original):
            fetched.append(name)
            return original(tensor, *arguments)

        monkeypatch.setattr(torch.Tensor, name, counted)
    meter_of(1.0, 2.0).read(ALONE)
    assert fetched == ["tolist"]


def test_speed_and_share_of_the_peak(monkeypatch: pytest.MonkeyPatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    meter = meter_of(1.0, 1.0)
    with meter.paused():
        now[0] += 100.0
    now[0] += 0.5
    meter.peak = 2 * 0.5  # TFLOP/s of two devices
    reading = meter.read(ALONE)
    assert (reading.tokens_per_second, reading.tflops) == (400.0, 0.4)
    assert reading.mfu == pytest.approx(0.4)
    assert str(reading).startswith("400 tokens/s  0.400 TFLOP/s  MFU 40.0 %  ")


def test_the_peak_is_that_of_all_devices(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch, "zeros", lambda *_, **__: torch.tensor(0.0))
    for name, peak in (("NVIDIA A100-SXM4-40GB", 8 * 312.0), ("another GPU", None)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert Meter(1, 1.0, torch.device("cuda", 0), 8).peak == peak
    assert Meter(1, 1.0, CPU, 8).peak is None


def test_what_is_not_known_is_not_shown():
    assert str(Reading(1.0, 1.0, 12345.0, 1.2345, None, None)) == "12,345 tokens/s  1.234 TFLOP/s"
    assert str(Reading(1.0, 1.0, 12345.0, 1.2345, 0.4321, 5.06)) == "12,345 tokens/s  1.234 TFLOP/s  MFU 43.2 %  5.1 GB"


def test_sinks_get_numbers_only(tmp_path: Path):
    class Sink:
        def __init__(self):
            self.written = {}

        def write(self, step, values):
            self.written |= values

        def close(self):
            pass

    sink = Sink()
    with Report(tmp_path, True, [sink]) as report:
        report.log(step=1, **asdict(meter_of(1.0).read(ALONE)))
    assert all(isinstance(value, float) for value in sink.written.values())
    assert {"loss", "tflops", "memory_gb"} <= set(sink.written) and "mfu" not in sink.written
    assert read_log(tmp_path)[0]["mfu"] is None


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_is_the_processs_peak():
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    highest = int(line.split()[1]) * 1024 / 1e9
    assert 0.9 * highest <= peak_memory_gb(CPU) < 100 * highest, "a process inherits its parent's peak"


def test_memory_where_the_system_does_not_tell(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(progress, "resource", None)
    assert peak_memory_gb(CPU) is None and meter_of(1.0).read(ALONE).memory_gb is None
