"""What a decoder keeps of the tokens so far."""

from dataclasses import dataclass

from llmcore.nn import KVCache, MambaState


@dataclass
class Cache:
    """Keys and values of the attention layers, and a state for each Mamba layer, in the layers' order."""

    kv: KVCache
    states: list[MambaState]

    @property
    def length(self) -> int:
        """Tokens that every layer has seen."""
        return self.kv.length
