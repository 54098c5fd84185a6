"""Models in the layouts of other packages: a table for each architecture says how theirs and llmcore's correspond.

To add an architecture: an `Architecture` in its package's module, in `ARCHITECTURES` there. To add a package: a module
with `ARCHITECTURES` and `recognise`, and a line in `FORMATS`.
"""

from pathlib import Path
from typing import Any

from llmcore.models.config import ModelConfig, suggest
from llmcore.models.foreign import hugging_face, state_spaces
from llmcore.models.foreign.architecture import Architecture

OWN = "llmcore"
FORMATS = {"hugging_face": hugging_face, "state_spaces": state_spaces}


def recognise(values: dict[str, Any], where: Path) -> Architecture | None:
    """Whose config.json `values` is: an architecture's, or llmcore's own (None).

    Raises:
        ValueError: another package's, of an architecture that llmcore does not have.
    """
    for package in FORMATS.values():
        architecture = package.recognise(values, where)
        if architecture is not None:
            return architecture
    return None


def choose(format: str, config: ModelConfig) -> Architecture | None:
    """The architecture in which `format` can say what `config` computes; None for llmcore's own layout.

    Raises:
        ValueError: the format is unknown, or none of its architectures can.
    """
    if format == OWN:
        return None
    if format not in FORMATS:
        hint = suggest(str(format), [OWN, *FORMATS])
        raise ValueError(f"save: format is {format!r}; {hint}allowed: {', '.join((OWN, *FORMATS))}.")
    known = FORMATS[format].ARCHITECTURES
    errors = []
    for architecture in known:
        if architecture.has_layers_of(config):
            try:
                architecture.require_expressible(config, format)
                return architecture
            except ValueError as error:
                errors.append(error)
    if errors:
        raise errors[0]
    kinds = sorted({config.mixer(i) for i in range(config.num_hidden_layers)})
    after = sorted({config.feed_forward(i) for i in range(config.num_hidden_layers)} - {"none"})
    also = f" with {' and '.join(after)} feed-forwards" if after else ""
    raise ValueError(
        f"save: format {format!r} has no model of {' and '.join(kinds)} layers{also}; allowed: "
        f"{', '.join(dict.fromkeys(_layers(a) for a in known))}, or format {OWN!r}."
    )


def _layers(architecture: Architecture) -> str:
    if architecture.feed_forwards == ("none",):
        return f"{architecture.mixer} layers alone"
    return f"{architecture.mixer} layers with {' and '.join(architecture.feed_forwards)}"
