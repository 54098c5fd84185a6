"""A run in words before it starts: model, text, batch, cost in arithmetic and in memory."""

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from llmcore import models
from llmcore.data import Corpus
from llmcore.train.config import TrainConfig, model_config

BYTES_PER_PARAMETER = 16  # weight, gradient and AdamW's two moments, fp32 each


def describe(config: TrainConfig, corpus: Corpus, world_size: int, device: torch.device, bf16: bool) -> str:
    model = model_config(config)
    size, count = config.micro_batches(world_size)
    tokens = config.batch_size * config.seq_len
    limits = []
    steps = config.steps(corpus.train.size)
    if steps is not None:
        limits.append(f"{steps:,} steps = {steps * tokens / corpus.train.size:.2f} epochs")
    if config.max_seconds is not None:
        limits.append(f"{config.max_seconds:g} s")
    weights = model.num_parameters() * (BYTES_PER_PARAMETER + (4 if config.ema_decay else 0))
    activations = saved_for_backward(model, size, config.seq_len, device, bf16)
    return "\n".join(
        [
            f"model   {config.preset}, {model.num_parameters():,} parameters",
            f"text    {corpus.describe()}",
            f"batch   {config.batch_size} sequences x {config.seq_len} = {tokens:,} tokens, {count} x {size} a process",
            f"length  {' or '.join(limits)}",
            f"device  {_devices(world_size, device)}, {'bf16' if bf16 else 'fp32'}",
            f"cost    {tokens * model.flops_per_token(config.seq_len) / 1e9:,.1f} GFLOP a step",
            f"memory  about {(weights + activations) / 1e6:,.0f} MB per process: weights, gradients and AdamW "
            f"{weights / 1e6:,.0f}, kept for the backward pass {activations / 1e6:,.0f}",
        ]
    )


def _devices(world_size: int, device: torch.device) -> str:
    if device.type == "cuda":
        return f"{world_size} x {torch.cuda.get_device_name(device)}" + (", DDP over NCCL" if world_size > 1 else "")
    processes = "" if world_size == 1 else f" with {world_size} processes, DDP over gloo"
    return f"the CPU (no GPU was found){processes}"


def saved_for_backward(
    config: models.ModelConfig, batch_size: int, seq_len: int, device: torch.device, bf16: bool
) -> int:
    """Bytes that autograd keeps of one forward pass, weights aside: counted on tensors without data."""
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage
        return tensor

    with FakeTensorMode(), torch.device(device):
        model = models.build(config)
        tokens = torch.zeros(batch_size, seq_len, dtype=torch.int64)
        autocast = torch.autocast(device.type, torch.bfloat16, enabled=bf16)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), autocast:
            model(tokens, tokens)
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    return sum(storage.nbytes() for key, storage in kept.items() if key not in weights)
