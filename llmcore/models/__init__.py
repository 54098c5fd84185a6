"""Whole models, their configuration and presets, and their checkpoints."""

from llmcore.models.checkpoint import load, save, write
from llmcore.models.config import ModelConfig
from llmcore.models.decoder import Decoder, build
from llmcore.models.presets import PRESETS

__all__ = ["PRESETS", "Decoder", "ModelConfig", "build", "load", "save", "write"]
