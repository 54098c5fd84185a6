"""bfloat16 for Triton's interpreter. Test-only; call install() before the first kernel runs under TRITON_INTERPRET=1.

The interpreter keeps a bfloat16 as its bits in a uint16 array and forgets so in most operations: products and sums act on the
bits, float32 -> bfloat16 truncates, reductions compare bits. Here every such operation converts its bfloat16 operands to
float32, computes there, and rounds the result to nearest, ties to even, as the hardware does. Matrix products take bfloat16
operands and accumulate in float32. bfloat16 atomics are an error instead of a wrong number.
Also mended: scans with a function of one's own go slice by slice; numpy >= 2.4 no longer turns arrays of one element into an index, as `range(0, argument)` needs; and numpy warns
of overflows and divisions by zero, where the hardware is silent.
"""

import functools

import numpy as np
import triton.language as tl
import triton.runtime.interpreter as interpreter
from triton.runtime.interpreter import InterpreterBuilder, ReduceOps, ScanOps, TensorHandle

COMPARED_OR_COMPUTED = (
    "fadd fsub fmul fdiv frem precise_divf minimumf maximumf minnumf maxnumf "
    "fcmpOLT fcmpOGT fcmpOLE fcmpOGE fcmpOEQ fcmpONE fcmpULT fcmpUGT fcmpULE fcmpUGE fcmpUEQ fcmpUNE "
    "clampf fma cos sin exp exp2 floor ceil log log2 sqrt precise_sqrt rsqrt erf"
).split()


def bf16_to_fp32(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_bf16(values: np.ndarray) -> np.ndarray:
    """Bits of the nearest bfloat16, ties to even; NaN stays NaN, values beyond the range become infinite."""
    with np.errstate(over="ignore"):
        single = np.asarray(values, dtype=np.float32)
    bits = single.view(np.uint32)
    if values.dtype in (np.float64, np.int32, np.uint32, np.int64, np.uint64):
        # Rounding twice must not turn a value just off a tie into a tie: make the first rounding sticky.
        inexact = np.where(np.isfinite(single), single.astype(values.dtype) != values, False)
        away = np.abs(single.astype(np.float64)) > np.abs(values.astype(np.float64))
        bits = np.where(inexact, (bits - away) | 1, bits).astype(np.uint32)
    rounded = ((bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(single), np.uint16(0x7FC0), rounded)


def _is_bf16(handle: object) -> bool:
    return isinstance(handle, TensorHandle) and handle.dtype.scalar == tl.bfloat16


def _widen(handle):
    return TensorHandle(bf16_to_fp32(handle.data), tl.float32) if _is_bf16(handle) else handle


def _narrow(handle: TensorHandle) -> TensorHandle:
    """The result as bfloat16, unless it is a comparison's."""
    if handle.data.dtype == np.bool_:
        return handle
    return TensorHandle(to_bf16(handle.data), tl.bfloat16)


def _computing_in_fp32(create):
    @functools.wraps(create)
    def wrapped(self, *operands):
        if not any(map(_is_bf16, operands)):
            return create(self, *operands)
        return _narrow(create(self, *map(_widen, operands)))

    return wrapped


def _cast(original):
    @functools.wraps(original)
    def cast_impl(self, source, dst_type):
        if _is_bf16(source):
            return original(self, _widen(source), dst_type)
        if dst_type.scalar == tl.bfloat16:
            return TensorHandle(to_bf16(source.data), tl.bfloat16)
        return original(self, source, dst_type)

    return cast_impl


def _dot(original):
    def create_dot(self, a, b, accumulator, *options):
        return original(self, _widen(a), _widen(b), accumulator, *options)

    return create_dot


def _atomic(original):
    def create_atomic_rmw(self, operation, pointer, value, *rest):
        if _is_bf16(value):
            raise NotImplementedError("Triton's interpreter has no bfloat16 atomics.")
        return original(self, operation, pointer, value, *rest)

    return create_atomic_rmw


def _reducing_in_fp32(original):
    """For reductions and scans that hand whole arrays to numpy."""

    @functools.wraps(original)
    def wrapped(self, values, *options, **keywords):
        tensor = values[0] if isinstance(values, tuple) else values
        if tensor.dtype != tl.bfloat16:
            return original(self, values, *options, **keywords)
        wide = tl.core.tensor(_widen(tensor.handle), tensor.type.with_element_ty(tl.float32))
        results = original(self, wide, *options, **keywords)
        if isinstance(results, (tuple, list)):
            return type(results)(map(_narrow_tensor, results))
        return _narrow_tensor(results)

    return wrapped


def _narrow_tensor(tensor):
    if tensor.dtype != tl.float32:
        return tensor
    return tl.core.tensor(_narrow(tensor.handle), tensor.type.with_element_ty(tl.bfloat16))


def _exp(original):
    """numpy's float32 exp is off by up to 2.5 ulp on processors with AVX-512, PyTorch's by less than one."""

    @functools.wraps(original)
    def create_exp(self, operand):
        if operand.data.dtype != np.float32:
            return original(self, operand)
        return TensorHandle(np.exp(operand.data.astype(np.float64)).astype(np.float32), operand.dtype.scalar)

    return create_exp


def _scan_by_slices(self, values):
    """Steps along the axis with the other axes at once; the interpreter's own goes element by element."""
    arrays = [np.moveaxis(value.handle.data, self.axis, 0) for value in values]
    results = [np.empty_like(array) for array in arrays]
    state = None
    for i in range(len(arrays[0])):
        step = tuple(self.to_tensor(a[i], value.dtype) for a, value in zip(arrays, values, strict=True))
        state = step if state is None else self.combine_fn.fn(*state, *step)
        state = state if isinstance(state, tuple) else (state,)
        for result, part in zip(results, state, strict=True):
            result[i] = part.handle.data.reshape(result[i].shape)
    return [
        self.to_tensor(np.ascontiguousarray(np.moveaxis(result, 0, self.axis)), value.dtype)
        for result, value in zip(results, values, strict=True)
    ]


def _index(original):
    def patch_lang_tensor(tensor, scope):
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    return patch_lang_tensor


def _launch(original):
    @functools.wraps(original)
    def call(self, *arguments, **keywords):
        _patched_modules.clear()
        with np.errstate(all="ignore"):
            return original(self, *arguments, **keywords)

    return call


_patched_modules: set[int] = set()


def _once_per_launch(original):
    """The interpreter patches triton.language anew at every call of a device function, a third of its time."""

    @functools.wraps(original)
    def patch_lang(fn):
        if id(fn.__globals__) in _patched_modules:
            return interpreter._LangPatchScope()
        _patched_modules.add(id(fn.__globals__))
        return original(fn)

    return patch_lang


def _get_bf16(self, value):
    return TensorHandle(to_bf16(np.array([value], dtype=np.float64)), tl.bfloat16)


@functools.cache
def install() -> None:
    for name in COMPARED_OR_COMPUTED:
        attribute = f"create_{name}"
        setattr(InterpreterBuilder, attribute, _computing_in_fp32(getattr(InterpreterBuilder, attribute)))
    InterpreterBuilder.create_exp = _exp(InterpreterBuilder.create_exp)
    InterpreterBuilder.cast_impl = _cast(InterpreterBuilder.cast_impl)
    InterpreterBuilder.create_dot = _dot(InterpreterBuilder.create_dot)
    InterpreterBuilder.create_atomic_rmw = _atomic(InterpreterBuilder.create_atomic_rmw)
    InterpreterBuilder.get_bf16 = _get_bf16
    ReduceOps.sum = _reducing_in_fp32(ReduceOps.sum)
    ReduceOps.min_max = _reducing_in_fp32(ReduceOps.min_max)
    ScanOps.cumsum = _reducing_in_fp32(ScanOps.cumsum)
    ScanOps.cumprod = _reducing_in_fp32(ScanOps.cumprod)
    ScanOps.generic_scan = _scan_by_slices
    interpreter.GridExecutor.__call__ = _launch(interpreter.GridExecutor.__call__)
    interpreter._patch_lang = _once_per_launch(interpreter._patch_lang)
    interpreter._patch_lang_tensor = _index(interpreter._patch_lang_tensor)
