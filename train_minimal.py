"""Train a language model on text: the whole run, from the batch to the sample.

  python train_minimal.py                           the default: a small model of Python's own standard library
  python train_minimal.py --data.train my_texts/    your text: a file, or a folder of files
  python train_minimal.py --config configs/tiny.yaml --optimizer.lr 1e-3
  python train_minimal.py --num_gpus 8              eight processes (or: torchrun --nproc_per_node=8 train_minimal.py)
  python train_minimal.py --resume auto             go on with the newest run
  python train_minimal.py --dry_run                 check everything and describe the run, train nothing

A run has a directory runs/NAME with its configuration, log.jsonl and checkpoints, which llmcore.models.load reads.

Ctrl-C and SIGTERM let the step finish and save it. Exit codes: 0 all is well, 1 the training failed, 2 the input is
wrong, 130 interrupted (143 by SIGTERM).
"""

import contextlib
import math
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from llmcore import models
from llmcore.data import Batches, Corpus, DataError, gather, load_corpus, validation_windows
from llmcore.train import distributed
from llmcore.train.average import Average
from llmcore.train.checkpoint import CheckpointError, load_checkpoint, point, require_model, save_checkpoint, tidy
from llmcore.train.config import ConfigError, SampleConfig, TrainConfig, model_config
from llmcore.train.describe import describe
from llmcore.train.distributed import World
from llmcore.train.guard import Guard, Spikes
from llmcore.train.machine import keep_freed_memory, require_backends, use_bf16
from llmcore.train.optimizer import build_optimizer
from llmcore.train.parse import parse
from llmcore.train.progress import Meter, Report
from llmcore.train.run import Start, find_start, how_to_go_on, open_run
from llmcore.train.schedule import learning_rate, progress
from llmcore.train.sinks import open_sinks, require_sinks
from llmcore.train.stop import Stop, Stopped


class TrainingError(RuntimeError):
    """The training cannot go on; the message says why and what to do."""


def train(
    config: TrainConfig, start: Start, run: Path, corpus: Corpus, world: World, stop: Stop, report: Report
) -> None:
    """One run, from `start` to the sample, or to a signal. All ranks call it; only the first writes and prints."""
    # The model, with the same weights on all ranks.
    torch.manual_seed(config.seed)
    model = models.build(model_config(config)).to(world.device)
    optimizer = build_optimizer(model, config.optimizer)
    average = Average(model, config.ema_decay) if config.ema_decay else None
    if start.checkpoint is not None:
        load_checkpoint(start.checkpoint, model, optimizer, average)
    parallel: nn.Module = distributed.replicate(model, config.seq_len) if world.size > 1 else model
    bf16 = use_bf16(config.precision, world.device)
    autocast = torch.autocast(world.device.type, torch.bfloat16, enabled=bf16)

    batches = Batches(corpus.train, config.batch_size, config.seq_len, config.seed)
    micro_size, _ = config.micro_batches(world.size)
    guard, spikes = Guard(world.device), Spikes()
    meter = Meter(config.batch_size * config.seq_len, model.flops_per_token(config.seq_len), world.device, world.size)
    report.say(f"run     {run}, from {start.checkpoint or 'step 0'}")
    report.log(event="start", step=start.step, processes=world.size, bf16=bf16, config=config.to_dict())

    def elapsed() -> float:
        return time.perf_counter() - began - meter.seconds_paused

    def averaged() -> contextlib.AbstractContextManager[None]:
        return average.applied(model) if average else contextlib.nullcontext()

    def validate(max_tokens: int) -> float:
        seconds = elapsed()
        with meter.paused(), averaged(), autocast:
            bits = bits_per_byte(model, corpus, max_tokens, config.seq_len, micro_size, world)
        report.log(step=step, seconds=seconds, val_bpb=bits)
        report.say(f"step {step}  held-out text: {bits:.4f} bits per byte")
        require_finite("the loss on the held-out text", bits, step)
        return bits

    def save() -> None:
        seconds = elapsed()
        with meter.paused():
            require_finite("the largest weight", world.on_first(lambda: largest_weight(model)), step)
            state = (model, optimizer, config.to_dict(), corpus.fingerprint, average, best)
            path = world.on_first(lambda: save_checkpoint(run, step, seconds, *state))
            world.on_first(lambda: tidy(run, config.keep_checkpoints, best))
            report.say(f"step {step}  checkpoint: {path}")

    best, max_steps = start.best, config.steps(corpus.train.size)
    step = saved = start.step
    began = time.perf_counter() - start.seconds
    while True:
        seconds = elapsed()
        if config.max_seconds is not None:
            seconds = world.from_first(seconds)  # all ranks must stop at the same step
        done = progress(step, seconds, max_steps, config.max_seconds)
        if done >= 1:
            break

        # The batch: a function of the seed and the step, of which this rank takes its slice.
        distributed.seed_step(config.seed, step, world.rank)
        inputs, targets = (tokens.to(world.device) for tokens in batches(step, world.rank, world.size))

        # The loss and its gradients, averaged over the ranks.
        loss = forward_backward(parallel, inputs, targets, micro_size, autocast)
        norm = nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.grad_clip or math.inf)

        # The step; not made, on any rank, where the gradient is not finite.
        lr = learning_rate(config.optimizer, step, done)
        optimizer.set_learning_rate(lr)
        optimizer.step(skip=guard.check(norm))
        optimizer.zero_grad()
        if average:
            average.update(model, step)
        step += 1

        meter.add(loss, norm)
        if step % config.log_interval == 0 or step == max_steps:
            now = meter.read(world)
            skipped, in_a_row = guard.read()
            report.log(step=step, seconds=elapsed(), lr=lr, skipped=skipped, **asdict(now))
            report.show(f"step {step}  loss {now.loss:.4f}  lr {lr:.2e}  {now}", done)
            if in_a_row >= config.max_skipped:
                raise TrainingError(
                    f"the gradient was not finite in {in_a_row} steps in a row, up to step {step}; lower optimizer.lr"
                )
            if (usual := spikes.find(now.loss)) is not None:
                report.say(f"step {step}  the loss jumped from about {usual:.4f} to {now.loss:.4f}")
        if config.eval_interval and step % config.eval_interval == 0:
            best.update(validate(config.eval_tokens), step)
        if best.step == step or (config.checkpoint_interval and step % config.checkpoint_interval == 0):
            save()
            saved = step
        if number := world.most(stop.number):
            if step != saved:
                save()
            raise Stopped(number)
        if best.is_lost(config.patience):
            report.say(f"step {step}  no better validation since step {best.step}: the run stops here")
            break

    report.close()
    if step != saved:
        save()
    world.on_first(lambda: point(run, "final", step))
    validate(config.final_eval_tokens)
    if world.rank == 0 and config.sample.tokens:
        with averaged():
            print(f"\n{sample(model, config.sample, config.seed)}")


def forward_backward(
    model: nn.Module, inputs: Tensor, targets: Tensor, micro_size: int, autocast: torch.autocast
) -> Tensor:
    """The mean loss of this rank's slice. Gradients add up over micro-batches; in the last, over ranks as well."""
    pairs = list(zip(inputs.split(micro_size), targets.split(micro_size), strict=True))
    total = torch.zeros((), device=inputs.device)
    for count, (x, y) in enumerate(pairs, start=1):
        more = count < len(pairs)
        with model.no_sync() if more and isinstance(model, DistributedDataParallel) else contextlib.nullcontext():
            with autocast:
                loss = model(x, y).loss / len(pairs)
            loss.backward()
        total += loss.detach()
    return total


@torch.no_grad()
def bits_per_byte(
    model: nn.Module, corpus: Corpus, max_tokens: int, seq_len: int, batch_size: int, world: World
) -> float:
    """Mean loss, in bits, on windows of the held-out text, always the same ones, shared out to the ranks."""
    windows = validation_windows(corpus.valid, seq_len, max_tokens)
    model.eval()
    total = torch.zeros((), device=world.device)
    mine = windows[world.rank :: world.size]
    for i in range(0, len(mine), batch_size):
        inputs, targets = gather(corpus.valid, mine[i : i + batch_size], seq_len)
        total += model(inputs.to(world.device), targets.to(world.device)).loss * len(inputs)
    model.train()
    return world.sum(total).item() / len(windows) / math.log(2)


def sample(model: models.Decoder, config: SampleConfig, seed: int) -> str:
    """The prompt and what the model makes of it."""
    torch.manual_seed(seed)
    prompt = torch.tensor([list(config.prompt.encode())], device=next(model.parameters()).device)
    new = model.generate(prompt, config.tokens, config.temperature, config.top_k, config.top_p, stream=True)
    tokens = [*prompt[0].tolist(), *(int(token) for token in new)]
    return bytes(token for token in tokens if token < 256).decode(errors="replace")


def largest_weight(model: nn.Module) -> float:
    """Not a number where one of them is not."""
    return torch.stack([parameter.detach().abs().max() for parameter in model.parameters()]).max().item()


def require_finite(name: str, value: float, step: int) -> None:
    if not math.isfinite(value):
        raise TrainingError(f"{name} is {value} at step {step}; lower optimizer.lr")


def main(argv: list[str] | None = None) -> int:
    """What the command line asks for; the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    run: Path | None = None
    try:
        # Whatever can be wrong with the input shows here, before a process is started or a file is written.
        config = parse(argv, __doc__)
        start = find_start(config)
        if start.config is not None:
            config = parse(argv, __doc__, start.config)
        config.check()
        if start.checkpoint is not None:
            require_model(start.checkpoint, model_config(config))
        corpus = load_corpus(config.data.train, config.data.valid)
        corpus.require(config.seq_len)
        if not any(argument.startswith("--data.") for argument in argv):
            start.require_text(corpus)
        world_size = distributed.world_size(config.num_gpus)
        device = distributed.device(world_size)
        require_backends(device)
        require_sinks(config.log)
        overview = describe(config, corpus, world_size, device, use_bf16(config.precision, device))

        if world_size > 1 and not distributed.launched() and not config.dry_run:
            return distributed.launch(world_size, [sys.executable, os.path.abspath(__file__), *argv])
        if distributed.is_first():
            print(overview, flush=True)
        if config.dry_run:
            return 0
        keep_freed_memory()
        with distributed.join(device) as world, Stop(alone=world.size == 1) as stop:
            run = world.on_first(lambda: open_run(config, start))
            sinks = open_sinks(run, start.step, config.log, config.to_dict()) if world.rank == 0 else []
            with Report(run, world.rank == 0, sinks) as report:
                train(config, start, run, corpus, world, stop, report)
        return 0
    except (ConfigError, CheckpointError, DataError) as error:
        return fail(error, 2)
    except TrainingError as error:
        return fail(f"{error}; {how_to_go_on(run)}.", 1)
    except Stopped as stopped:
        return fail(f"interrupted by {stopped}; {how_to_go_on(run)}.", 128 + stopped.number)
    except KeyboardInterrupt:
        return fail(f"interrupted; {how_to_go_on(run)}.", 130)


def fail(message: object, code: int) -> int:
    """Say what is wrong, once a machine."""
    if distributed.is_first():
        print(f"train_minimal.py: {message}", file=sys.stderr)
    else:
        time.sleep(2)  # the launcher ends all processes when one ends: let the first one speak
    return code


if __name__ == "__main__":
    sys.exit(main())
