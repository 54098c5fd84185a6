"""A run in words before it starts: model, text, batch, cost in arithmetic and in memory."""

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from llmcore import models
from llmcore.data import Corpus
from llmcore.train.config import TrainConfig, model_config
from llmcore.train.engine import DTYPES, Plan, recompute_layers


def describe(config: TrainConfig, plan: Plan, corpus: Corpus, world_size: int, device: torch.device) -> str:
    model = model_config(config)
    sequences = config.global_batch(world_size)
    tokens = sequences * config.seq_len
    limits = []
    steps = config.steps(corpus.train.size, world_size)
    if steps is not None:
        limits.append(f"{steps:,} steps = {steps * tokens / corpus.train.size:.2f} epochs")
    if config.max_seconds is not None:
        limits.append(f"{config.max_seconds:g} s")
    here, on_cpu = (model.num_parameters() * share for share in bytes_per_parameter(config, plan, world_size))
    activations = saved_for_backward(model, config, plan.precision, device)
    of_a_token = model.num_parameters(active=True)
    active = "" if of_a_token == model.num_parameters() else f", {of_a_token:,} of them active for a token"
    factors = f"{config.batch_size} x {config.gradient_accumulation} forward passes x {world_size} processes"
    lines = [
        f"model   {config.preset}, {model.num_parameters():,} parameters{active}",
        f"text    {corpus.describe()}",
        f"batch   {sequences} sequences x {config.seq_len} = {tokens:,} tokens a step: {factors}",
        f"length  {' or '.join(limits)}",
        f"device  {_devices(world_size, device)}, {_engine(plan, device)}, {plan.precision}",
        f"cost    {tokens * model.flops_per_token(config.seq_len) / 1e9:,.1f} GFLOP a step",
        f"memory  about {(here + activations) / 1e6:,.0f} MB per process: weights, gradients and optimizer "
        f"{here / 1e6:,.0f}, kept for the backward pass {activations / 1e6:,.0f}"
        + (f"; offloaded to the CPU {on_cpu / 1e6:,.0f}" if on_cpu else ""),
    ]
    return "\n".join(lines + [f"note    {note}" for note in (plan.zero.notes if plan.zero else ())])


def bytes_per_parameter(config: TrainConfig, plan: Plan, world_size: int) -> tuple[float, float]:
    """What a process keeps of a parameter (on its device, offloaded to the CPU) in weight, gradient, two moments and
    the average. ZeRO's fp32 weights are apart from those the model computes with, and stage 1 shards them and the
    moments, stage 2 gradients too, stage 3 everything (Rajbhandari et al., arXiv:1910.02054)."""
    average = 4 if config.ema_decay else 0
    if plan.zero is None:
        return 16 + average, 0
    size = 4 if plan.precision == "fp32" else 2
    weight = size / world_size if plan.zero.stage == 3 else size
    gradient = size / world_size if plan.zero.stage >= 2 else size
    optimizer = (12 + average) / world_size
    on_cpu = 0.0
    if plan.zero.offload_optimizer:
        on_cpu, optimizer, gradient = on_cpu + optimizer + gradient, 0, 0
    if plan.zero.offload_parameters:
        on_cpu, weight = on_cpu + weight, 0
    return weight + gradient + optimizer, on_cpu


def _devices(world_size: int, device: torch.device) -> str:
    if device.type == "cuda":
        return f"{world_size} x {torch.cuda.get_device_name(device)}"
    return "the CPU (no GPU was found)" + (f" with {world_size} processes" if world_size > 1 else "")


def _engine(plan: Plan, device: torch.device) -> str:
    if plan.zero is not None:
        return f"DeepSpeed ZeRO {plan.zero.stage}"
    if plan.engine == "ddp":
        return "DDP over " + ("NCCL" if device.type == "cuda" else "gloo")
    return "one process"


def saved_for_backward(
    model_config: models.ModelConfig, config: TrainConfig, precision: str, device: torch.device
) -> int:
    """Bytes that autograd keeps of one forward pass, weights aside: counted on tensors without data."""
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage
        return tensor

    with FakeTensorMode(), torch.device(device):
        model = models.build(model_config)
        recompute_layers(model, config)
        tokens = torch.zeros(config.batch_size, config.seq_len, dtype=torch.int64)
        autocast = torch.autocast(device.type, DTYPES[precision], enabled=precision != "fp32")
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), autocast:
            model(tokens, tokens)
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    return sum(storage.nbytes() for key, storage in kept.items() if key not in weights)
