"""llmcore: kernels for language models behind one set of PyTorch operators, and the lean library on top of them.

`import llmcore` is cheap and harmless: it starts no CUDA context, compiles nothing and loads neither triton nor the
native extension; both are loaded by the first call that needs them.
"""

from llmcore import models, nn, ops
from llmcore._version import __version__
from llmcore.ops import backend

__all__ = ["__version__", "backend", "models", "nn", "ops"]
