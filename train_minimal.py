"""Train a language model on text: the whole run, from the batch to the sample.

  python train_minimal.py                           the default: a small model of Python's own standard library
  python train_minimal.py --data.train my_texts/    your text: a file, or a folder of files
  python train_minimal.py --config configs/tiny.yaml --optimizer.lr 1e-3
  python train_minimal.py --num_gpus 8              eight processes (or: torchrun --nproc_per_node=8 train_minimal.py)
  python train_minimal.py --num_gpus 8 --deepspeed configs/deepspeed/zero2.json        ... that share the model
  python train_minimal.py --resume auto             go on with the newest run
  python train_minimal.py --dry_run                 check everything and describe the run, train nothing

A run has a directory runs/NAME with its configuration, log.jsonl and checkpoints, which llmcore.models.load reads.
With several machines it must be on a disk that all of them see.

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
from typing import NoReturn

import torch
from torch import Tensor

from llmcore import models
from llmcore.data import Batches, Corpus, DataError, Prefetch, gather, load_corpus, validation_windows
from llmcore.train import distributed, launch
from llmcore.train.checkpoint import CheckpointError, SaveError, point, require_model
from llmcore.train.config import ConfigError, SampleConfig, TrainConfig, model_config
from llmcore.train.describe import describe
from llmcore.train.distributed import World
from llmcore.train.engine import Engine, Plan, build_engine, make_plan
from llmcore.train.guard import Guard, Spikes
from llmcore.train.machine import be_deterministic, keep_freed_memory, out_of_memory, require_backends
from llmcore.train.parse import flat, parse
from llmcore.train.profile import Profile
from llmcore.train.progress import Meter, Report
from llmcore.train.run import Start, find_start, how_to_go_on, open_run
from llmcore.train.saver import Saver
from llmcore.train.schedule import learning_rate, progress
from llmcore.train.sinks import Sink, open_sinks, require_sinks
from llmcore.train.stop import Stop, Stopped


class TrainingError(RuntimeError):
    """The training cannot go on; the message says why and what to do."""


def train(
    config: TrainConfig, plan: Plan, start: Start, run: Path, corpus: Corpus, world: World, stop: Stop, report: Report
) -> None:
    """One run, from `start` to the sample, or to a signal. All ranks call it; only the first writes and prints."""
    # The model, with the same weights on all ranks; the engine shares out the work, and the model if it is asked to.
    torch.manual_seed(config.seed)
    model = models.build(model_config(config))
    engine = build_engine(model, config, plan, world)
    if start.checkpoint is not None:
        engine.restore(start.checkpoint, start.scale)

    global_batch, max_steps = config.global_batch(world.size), config.steps(corpus.train.size, world.size)
    batches = Batches(corpus.train, global_batch, config.seq_len, config.seed)
    batch_of = Prefetch(batches, world.device, world.rank, world.size, config.data.workers)
    guard, spikes = Guard(world.device, start.skipped), Spikes()
    flops_per_token = model.flops_per_token(config.seq_len)
    meter = Meter(global_batch * config.seq_len, flops_per_token, world.device, world.size)
    saver = Saver(run, world, model.config, config.keep_checkpoints, report.say)
    profile = Profile(run, config.profile_steps, world.rank == 0, report.say)
    report.say(f"run     {run}, from {start}")
    report.log(event="start", step=start.step, processes=world.size, engine=plan.engine, precision=plan.precision,
               config=config.to_dict())  # fmt: skip
    step, saved, best = start.step, start.step if start.run else None, start.best
    began = time.perf_counter() - start.seconds

    def elapsed() -> float:
        return time.perf_counter() - began - meter.seconds_paused

    def require_finite(name: str, value: float) -> None:
        if not math.isfinite(value):
            fail_training(f"{name} is {value}")

    def fail_training(reason: str) -> NoReturn:
        saver.finish()  # the last healthy checkpoint is whole before it is named
        also = " or the loss scale that fp16 starts with" if plan.precision == "fp16" else ""
        raise TrainingError(f"{reason} at step {step}; lower optimizer.lr{also}")

    def validate(max_tokens: int) -> float:
        seconds = elapsed()
        with meter.paused(), engine.averaged():
            bits = bits_per_byte(engine, corpus, max_tokens, config.seq_len, config.batch_size)
        report.log(step=step, seconds=seconds, val_bpb=bits)
        report.say(f"step {step}  held-out text: {bits:.4f} bits per byte")
        require_finite("the loss on the held-out text", bits)
        return bits

    def save(wait: bool = False) -> None:
        nonlocal saved
        meta = {"seconds": elapsed(), "config": config.to_dict(), "text": corpus.fingerprint, "best": asdict(best),
                "global_batch": global_batch, "skipped": int(guard.skipped)}  # fmt: skip
        with meter.paused():
            if step != saved:
                saver.finish()  # before there is a second copy of everything in memory
                require_finite("the largest weight", engine.largest_weight())
                saver.save(step, engine.snapshot(), meta, best)  # is written while training goes on
                saved = step
            if wait:
                saver.finish()

    with saver, batch_of, profile:
        while True:
            seconds = elapsed()
            if config.max_seconds is not None:
                seconds = world.from_first(seconds)  # all ranks must stop at the same step
            done = progress(step, seconds, max_steps, config.max_seconds)
            if done >= 1:
                break
            if best.is_lost(config.patience):
                report.say(f"step {step}  no better validation since step {best.step}: the run stops here")
                break

            # The batch: a function of the seed and the step, of which this rank takes its slice.
            inputs, targets = batch_of(step)

            # The loss and its gradient, averaged over the tokens of all ranks.
            loss = forward_backward(engine, inputs, targets, step)

            # The step; not made, on any rank, where the gradient is not finite.
            lr = learning_rate(config.optimizer, step, done)
            norm = engine.step(lr, step)
            guard.check(norm)
            step += 1
            profile.step()

            meter.add(loss, norm)
            if step % config.log_interval == 0 or step == max_steps:
                now = meter.read(world)
                skipped, in_a_row = guard.read()
                report.log(step=step, seconds=elapsed(), lr=lr, skipped=skipped, **asdict(now), **engine.read_experts())
                report.show(f"step {step}  loss {now.loss:.4f}  lr {lr:.2e}  {now}", done)
                if in_a_row >= config.max_skipped:
                    fail_training(f"the gradient was not finite in {in_a_row} steps in a row, the last one")
                if (usual := spikes.find(now.loss)) is not None:
                    report.say(f"step {step}  the loss jumped from about {usual:.4f} to {now.loss:.4f}")
            is_best = False
            if config.eval_interval and step % config.eval_interval == 0:
                is_best = best.update(validate(config.eval_tokens), step)
            if is_best or (config.checkpoint_interval and step % config.checkpoint_interval == 0):
                save()
            if number := world.most(stop.number or int(saver.poll())):
                save(wait=True)  # or raises why the one before failed
                raise Stopped(number)

        report.close()
        save(wait=True)
        world.on_first(lambda: point(run, "final", step))
        validate(config.final_eval_tokens)
        if config.sample.tokens:
            with engine.averaged():
                text = sample(model, config.sample, config.seed)
            report.say(f"\n{text}")


def forward_backward(engine: Engine, inputs: Tensor, targets: Tensor, step: int) -> Tensor:
    """This rank's share of the mean loss over all tokens of the step, and its gradient. The mean of the ranks' shares
    is the loss, whatever the number of ranks and of forward passes. The gradient is also that of what balances experts,
    which the loss is without."""
    config, world = engine.config, engine.world
    pairs = list(zip(inputs.split(config.batch_size), targets.split(config.batch_size), strict=True))
    tokens = torch.stack([(y != -100).sum() for _, y in pairs])
    weights = tokens * world.size / world.sum(tokens.sum()).clamp(min=1)
    total = torch.zeros((), device=world.device)
    for i, (x, y) in enumerate(pairs):
        distributed.seed_step(config.seed, step, i, world.rank)
        with engine.micro_step(last=i == len(pairs) - 1):
            loss = engine.loss(x, y) * weights[i]
            engine.backward(loss)
        total += loss.detach() - engine.routing_loss * weights[i]
    return total


@torch.no_grad()
def bits_per_byte(engine: Engine, corpus: Corpus, max_tokens: int, seq_len: int, batch_size: int) -> float:
    """Mean loss, in bits, on windows of the held-out text, always the same ones, shared out to the ranks, which make
    equally many forward passes."""
    world = engine.world
    windows = validation_windows(corpus.valid, seq_len, max_tokens)
    engine.model.eval()
    total = torch.zeros((), device=world.device)
    for i in range(0, len(windows), world.size * batch_size):
        mine = windows[i:][world.rank * batch_size :][:batch_size]
        inputs, targets = gather(corpus.valid, mine if len(mine) else windows[:1], seq_len)
        total += engine.loss(inputs.to(world.device), targets.to(world.device)) * len(mine)
    engine.model.train()
    return world.sum(total).item() / len(windows) / math.log(2)


def sample(model: models.Decoder, config: SampleConfig, seed: int) -> str:
    """The prompt and what the model makes of it."""
    torch.manual_seed(seed)
    model.eval()
    prompt = torch.tensor([list(config.prompt.encode())], device=next(model.parameters()).device)
    new = model.generate(prompt, config.tokens, config.temperature, config.top_k, config.top_p, stream=True)
    tokens = [*prompt[0].tolist(), *(int(token) for token in new)]
    return bytes(token for token in tokens if token < 256).decode(errors="replace")


def main(argv: list[str] | None = None) -> int:
    """What the command line asks for; the exit code."""
    argv = launch.adopt_launcher(sys.argv[1:] if argv is None else argv)
    run: Path | None = None
    world: World | None = None
    until_said = contextlib.ExitStack()
    try:
        # Whatever can be wrong with the input shows here, before a process is started or a file is written.
        config = parse(argv, __doc__)
        start = find_start(config)
        run = start.run
        if start.config is not None:
            config = parse(argv, __doc__, start.config)
        config.check()
        world_size = launch.world_size(config.num_gpus, config.engine)
        if start.global_batch is not None and config.same_batch(start.config):
            config = config.share(start.global_batch, world_size)
        if start.checkpoint is not None:
            require_model(start.checkpoint, model_config(config))
        corpus = load_corpus(config.data.train, config.data.valid)
        corpus.require(config.seq_len)
        if not any(argument.startswith(("--data.train", "--data.valid")) for argument in argv):
            start.require_text(corpus)
        start = start.on_text(corpus)
        device = launch.device(world_size)
        plan = make_plan(config, world_size, device)
        require_backends(device)
        require_sinks(config.log)
        overview = describe(config, plan, corpus, world_size, device)

        if world_size > 1 and not launch.launched() and not config.dry_run:
            return launch.launch(world_size, [sys.executable, os.path.abspath(__file__), *argv])
        if launch.is_first():
            print(overview, flush=True)
        if config.dry_run:
            return 0
        keep_freed_memory()
        be_deterministic(config.deterministic)
        alone = plan.engine == "single"
        with distributed.join(device, alone) as world, contextlib.ExitStack() as held:
            # A launcher that ends all processes because one has ended waits until they have said why.
            stop = until_said.enter_context(Stop(alone=world.size == 1))
            world.agree(
                {
                    "source code": distributed.code_digest(Path(__file__))[:12],
                    "PyTorch": torch.__version__,
                    "text": distributed.digest(corpus.fingerprint)[:12],
                    **{key: str(value) for key, value in flat(config.to_dict()).items()},
                    "precision in use": plan.precision,
                    "DeepSpeed configuration": distributed.digest(plan.zero)[:12],
                    "checkpoint": start.digest[:12],
                }
            )
            run = world.on_first(lambda: open_run(config, start, held))
            sinks: list[Sink] = []
            world.on_first(lambda: sinks.extend(open_sinks(run, start.step, config.log, config.to_dict())))
            with Report(run, world.rank == 0, sinks) as report:
                train(config, plan, start, run, corpus, world, stop, report)
        return 0
    except (ConfigError, CheckpointError, DataError) as error:
        return fail(error, 2, world)
    except (TrainingError, SaveError, distributed.Unreachable) as error:
        return fail(f"{error}; {how_to_go_on(run)}.", 1, world)
    except distributed.Lost:
        return fail(f"another process of the run is gone; {how_to_go_on(run)}.", 1, world)
    except Stopped as stopped:
        return fail(f"interrupted by {stopped}; {how_to_go_on(run)}.", 128 + stopped.number, world)
    except KeyboardInterrupt:
        return fail(f"interrupted; {how_to_go_on(run)}.", 130, world)
    except (MemoryError, RuntimeError) as error:
        if (reason := out_of_memory(error)) is None:
            raise
        advice = "lower --batch_size and raise --gradient_accumulation as much, or give --activation_checkpointing all"
        return fail(f"the memory is full: {reason}; {advice}; {how_to_go_on(run)}.", 1, world)
    finally:
        until_said.close()


def fail(message: object, code: int, world: World | None) -> int:
    """Say what is wrong, once a machine."""
    if world is None and not launch.is_first():
        time.sleep(5)  # the first one says the same and ends, and the launcher then ends this one
    if world is None or world.is_first_to_say(str(message)):
        print(f"train_minimal.py: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]  # a model may write what a terminal cannot show
    launch.leave(main())
