"""Other packages' functions with their names, arguments and order, over `llmcore.ops`: changing an import is enough.

from llmcore.compat.mamba_ssm import selective_scan_fn, mamba_inner_fn, selective_state_update
from llmcore.compat.causal_conv1d import causal_conv1d_fn, causal_conv1d_update
"""
