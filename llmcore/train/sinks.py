"""Where a run's figures go besides log.jsonl: TensorBoard and Weights & Biases, each only if it is asked for."""

import importlib.util
import uuid
from pathlib import Path
from typing import Any, Protocol

from llmcore.train.config import ConfigError, LogConfig


class Sink(Protocol):
    def write(self, step: int, values: dict[str, float]) -> None: ...
    def close(self) -> None: ...


class TensorBoard:
    """Event files in run/tensorboard."""

    def __init__(self, run: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # what a run that was cut off wrote after its checkpoint is not shown
        self.writer = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class WeightsAndBiases:
    """One W&B run for all that is resumed in the same folder; WANDB_MODE=offline writes to the folder only."""

    def __init__(self, run: Path, config: dict[str, Any], project: str, name: str | None) -> None:
        import wandb

        path = run / "wandb_id"
        if not path.exists():
            path.write_text(uuid.uuid4().hex[:8])
        try:
            self.run = wandb.init(
                project=project, name=name or run.name, id=path.read_text(), resume="allow", dir=str(run), config=config
            )
        except wandb.errors.Error as error:
            reason = " ".join(str(error).split()).rstrip(".")
            raise ConfigError(
                f"log.wandb is true, but Weights & Biases cannot start: {reason}; log in by `wandb login`, or set "
                "WANDB_MODE=offline."
            ) from error

    def write(self, step: int, values: dict[str, float]) -> None:
        self.run.log(values, step=step)

    def close(self) -> None:
        self.run.finish()


def require_sinks(config: LogConfig) -> None:
    """Raise a ConfigError if what is asked for is not installed."""
    for asked, package in ((config.tensorboard, "tensorboard"), (config.wandb, "wandb")):
        if asked and importlib.util.find_spec(package) is None:
            raise ConfigError(f"log.{package} is true, but {package} is not installed: pip install 'llmcore[log]'.")


def open_sinks(run: Path, step: int, config: LogConfig, values: dict[str, Any]) -> list[Sink]:
    """values: the run's configuration, for W&B to show."""
    sinks: list[Sink] = []
    if config.tensorboard:
        sinks.append(TensorBoard(run, step))
    if config.wandb:
        sinks.append(WeightsAndBiases(run, values, config.wandb_project, config.wandb_name))
    return sinks
