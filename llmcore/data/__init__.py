"""Text in, batches of tokens out."""

from llmcore.data.batches import Batches, gather, validation_windows
from llmcore.data.corpus import Corpus, DataError, load_corpus
from llmcore.data.prefetch import Prefetch

__all__ = ["Batches", "Corpus", "DataError", "Prefetch", "gather", "load_corpus", "validation_windows"]
