"""Functions of one number that the scans share, each to the last bits: their errors last for many steps."""

import triton
import triton.language as tl


@triton.jit
def decay_of(x):
    """e^x; near 1, where every rounding lasts for many steps, to better than the processor's own two ulp."""
    near_one = 1 + x * (1 + x * (0.5 + x * (1.0 / 6 + x * (1.0 / 24))))
    return tl.where(tl.abs(x) < 0.0625, near_one, tl.exp(x))


@triton.jit
def softplus(x):
    """max(x, 0) + log(1 + e^-|x|), the logarithm as 2 atanh(e / (2 + e)), so that a small one keeps its digits."""
    e = tl.exp(-tl.abs(x))
    s = e / (2 + e)
    w = s * s
    p = 1.0 / 15
    for i in tl.static_range(6):
        p = p * w + 1.0 / (13 - 2 * i)
    return tl.maximum(x, 0.0) + 2 * (s + s * w * p)


@triton.jit
def sigmoid(x):
    e = tl.exp(-tl.abs(x))
    return tl.where(x < 0, e, 1.0) / (1 + e)
