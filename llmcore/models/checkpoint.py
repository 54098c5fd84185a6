"""A model on disk: a directory with config.json and weights, in llmcore's own layout or in another's."""

import os
from pathlib import Path

import torch
from torch import Tensor

from llmcore.models import files, foreign
from llmcore.models.config import ModelConfig
from llmcore.models.decoder import Decoder, build

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def save(model: Decoder, path: str | os.PathLike[str], format: str = foreign.OWN) -> None:
    """Writes the model into the directory `path`, which is made when missing.

    Args:
        format: "llmcore", model.safetensors beside ModelConfig's fields; "hugging_face", what `transformers` reads;
            "state_spaces", what the mamba_ssm package reads.

    Raises:
        FileExistsError: the directory already holds a model; nothing is overwritten.
        ValueError: the format is unknown, or cannot say what this model computes; or the model has a part of its
            experts only.
    """
    write(model.state_dict(), model.config, path, format)


def write(
    weights: dict[str, Tensor], config: ModelConfig, path: str | os.PathLike[str], format: str = foreign.OWN
) -> None:
    """As `save`, from the model's state dict."""
    folder, architecture = Path(path), foreign.choose(format, config)
    files.require_free(folder)
    _require_experts(weights, config)
    state = dict(weights)
    if config.tie_word_embeddings:
        state[HEAD] = state[EMBEDDING]
    if config.tie_word_embeddings and (architecture is None or not architecture.writes_tied_head):
        del state[HEAD]
    if architecture is None:
        files.write_model(folder, state, config.to_dict())
    else:
        values = architecture.to_theirs(config, [tensor.dtype for tensor in state.values()])
        state = architecture.split({architecture.name_of(name): tensor for name, tensor in state.items()})
        files.write_model(folder, state, values, architecture.weights)


def load(path: str | os.PathLike[str]) -> Decoder:
    """Reads the model in the directory `path` onto the CPU, with the dtypes that its weights have there. It is in
    training mode, as every new module: call `eval()` for a loss without dropout, jitter and what balances experts.

    config.json tells the layout: llmcore's own, Hugging Face's (it names a model_type) or state-spaces' (it names a
    d_model). Weights are model.safetensors, pytorch_model.bin, or several files with an index; no code in them is run.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged or does not fit the other, or config.json asks for what llmcore does not compute.
    """
    folder = Path(path)
    values = files.read_config(folder)
    architecture = foreign.recognise(values, folder / files.CONFIG)
    if architecture is None:
        config = ModelConfig.from_dict(values)
    else:
        config = architecture.to_ours(values, folder / files.CONFIG)
    with torch.device("meta"):
        model = build(config)
    state, source = files.read_weights(folder)
    if architecture is not None:
        state = {architecture.aliases.get(name, name): tensor for name, tensor in state.items()}
        state = architecture.join(state, source)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    theirs = {name: name if architecture is None else architecture.name_of(name) for name in shapes}
    if config.tie_word_embeddings and theirs[EMBEDDING] in state:
        state.setdefault(theirs[HEAD], state[theirs[EMBEDDING]])
    _require_fit(state, {theirs[name]: shape for name, shape in shapes.items()}, source)
    if config.tie_word_embeddings and not _same_bits(state[theirs[HEAD]], state[theirs[EMBEDDING]]):
        raise ValueError(
            f"load: {theirs[HEAD]} in {source} is not {theirs[EMBEDDING]}, though config.json ties the two."
        )
    model.load_state_dict({name: state[theirs[name]] for name in shapes}, assign=True)
    model.tie_weights()
    model.reset_buffers(torch.device("cpu"))
    return model


def _require_experts(weights: dict[str, Tensor], config: ModelConfig) -> None:
    for name, tensor in weights.items():
        if ".experts." in name and tensor.shape[0] != config.num_experts:
            raise ValueError(
                f"save: {name} has {tensor.shape[0]} of the {config.num_experts} experts; save on one rank inside "
                "`with llmcore.nn.expert_parallel.gather_experts(model):`, which all ranks enter."
            )


def _require_fit(state: dict[str, Tensor], shapes: dict[str, tuple[int, ...]], source: Path) -> None:
    for name, shape in shapes.items():
        if name not in state:
            raise ValueError(f"load: {source} lacks {name}, which its config.json asks for.")
        if tuple(state[name].shape) != shape:
            raise ValueError(
                f"load: {name} in {source} has shape {tuple(state[name].shape)}; config.json asks for {shape}."
            )
        if not state[name].is_floating_point():
            given = str(state[name].dtype).removeprefix("torch.")
            raise ValueError(f"load: {name} in {source} is of {given}; allowed: floating-point numbers.")
    for name in state:
        if name not in shapes:
            raise ValueError(f"load: {source} holds {name}, unknown to its config.json.")


def _same_bits(a: Tensor, b: Tensor) -> bool:
    """Bits, because a NaN is not equal to itself."""
    return a is b or (
        a.dtype == b.dtype and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
    )
