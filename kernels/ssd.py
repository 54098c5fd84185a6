"""ssd, Mamba-2's scan: chunks of matrix products on the tensor cores, forward and backward.

The forward is in ssd_fwd.py, the backward in ssd_bwd.py, what they share in ssd_tiles.py.
"""

from .ssd_bwd import ssd_bwd
from .ssd_fwd import ssd_fwd

__all__ = ["ssd_bwd", "ssd_fwd"]
