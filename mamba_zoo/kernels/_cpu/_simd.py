"""Explicit SIMD for numba: a vector type of W float32 lanes, its arithmetic, and exp, log1p and memory on it.

numba leaves vectorisation to LLVM's guesswork, and its `exp` stays scalar without Intel's SVML. Here every operation
is one LLVM vector instruction (or a short fixed sequence), so the code is the same on AVX-512, AVX2 and NEON: LLVM
splits a vector that is wider than the registers. Addresses are plain int64 numbers, in bytes.
"""

from __future__ import annotations

import operator
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba import extending, types
from numba.core import cgutils
from numba.core import config as numba_config
from numba.extending import models, overload, register_model


def _features() -> set[str]:
    """The instruction sets that numba compiles for: this machine's, unless its NUMBA_CPU_* settings say otherwise."""
    config: Any = numba_config  # its attributes are set when it is imported
    if config.CPU_NAME or config.CPU_FEATURES is not None:
        return {name[1:] for name in (config.CPU_FEATURES or "").split(",") if name.startswith("+")}
    return {name for name, present in llvm.get_host_cpu_features().items() if present and config.ENABLE_AVX}


_AVX512 = {"avx512f", "avx512dq"} <= _features()
W = 16 if _AVX512 else 8

# An intrinsic is written with a typing context in front that its callers do not pass; type checkers cannot know.
intrinsic: Any = extending.intrinsic

_F32, _I32, _I64 = ir.FloatType(), ir.IntType(32), ir.IntType(64)
_VF, _VI, _MASK = (ir.VectorType(t, W) for t in (_F32, _I32, ir.IntType(1)))

LOG2E = 1.4426950408889634
# Minimax over [-0.5, 0.5] of (2^x - 1) / x; relative error of 1 + x p(x) is 1.0e-7. The constant is exactly 1, so that
# a state under tiny steps does not drift over a million of them.
_EXP2 = (0.6931469775990557, 0.2402224208530347, 0.055507337434069874, 0.009671512642936647, 0.0013264727150666712)
# Minimax over [0, 1] of (log1p(x) / x - 1) / x; relative error of x (1 + x p(x)) is 5e-9.
_LOG1P = (
    -0.4999993276390722, 0.3333051132701301, -0.24958587478896171, 0.19695400795160778, -0.153553969832908,
    0.10680556619693288, -0.05766445492680131, 0.020204590566509754, -0.003318473789163783,
)  # fmt: skip
_ROUND = 1.5 * 2.0**23  # adding it leaves the nearest integer in the low bits of a float32


class VecType(types.Type):
    """W float32 lanes."""

    def __init__(self) -> None:
        super().__init__(name=f"f32x{W}")


vec = VecType()


@register_model(VecType)
class _VecModel(models.PrimitiveModel):
    def __init__(self, dmm, fe_type):
        super().__init__(dmm, fe_type, _VF)


def _splat(builder, value):
    one = builder.insert_element(ir.Constant(ir.VectorType(value.type, W), ir.Undefined), value, _I32(0))
    return builder.shuffle_vector(one, ir.Constant(one.type, ir.Undefined), ir.Constant(_VI, [0] * W))


def _const(value: float) -> ir.Constant:
    return ir.Constant(_VF, [value] * W)


def _fma(builder, a, b, c):
    """`a * b + c`, fused where the machine can."""
    fn = cgutils.get_or_insert_function(builder.module, ir.FunctionType(_VF, [_VF] * 3), f"llvm.fmuladd.v{W}f32")
    return builder.call(fn, [a, b, c])


def _polynomial(builder, x, coefficients):
    total = _const(coefficients[-1])
    for c in coefficients[-2::-1]:
        total = _fma(builder, total, x, _const(c))
    return total


def _at_least(builder, x, low):
    # In this order a NaN in x passes, and x86 has it as one instruction.
    low = _const(low)
    return builder.select(builder.fcmp_ordered(">", low, x), low, x)


def _at_most(builder, x, high):
    high = _const(high)
    return builder.select(builder.fcmp_ordered("<", high, x), high, x)


def _scaled_by_power(builder, fraction, power):
    """`2^fraction * 2^power`, the power being in the low bits of `power` (a float that had _ROUND added)."""
    p = _fma(builder, _polynomial(builder, fraction, _EXP2), fraction, _const(1.0))
    exponent = builder.shl(builder.bitcast(power, _VI), ir.Constant(_VI, [23] * W))
    return builder.bitcast(builder.add(builder.bitcast(p, _VI), exponent), _VF)


def _exp2_avx512(builder, x):
    """With the instructions for `x - round(x)` and `p 2^floor(n)`, without clamping: saves a sixth of the scan."""

    def call(name, a, b):
        kind = ir.FunctionType(_VF, [_VF, b.type, _VF, ir.IntType(16), _I32])
        fn = cgutils.get_or_insert_function(builder.module, kind, f"llvm.x86.avx512.mask.{name}.ps.512")
        every_lane, current_rounding = ir.Constant(ir.IntType(16), -1), _I32(4)
        return builder.call(fn, [a, b, a, every_lane, current_rounding])

    fraction = call("reduce", x, _I32(8))  # to the nearest integer, no exceptions
    p = _fma(builder, _polynomial(builder, fraction, _EXP2), fraction, _const(1.0))
    return call("scalef", p, builder.fsub(x, fraction))


def _exp2(builder, x):
    if _AVX512:
        return _exp2_avx512(builder, x)
    x = _at_most(builder, _at_least(builder, x, -126.0), 127.49)
    power = builder.fadd(x, _const(_ROUND))
    return _scaled_by_power(builder, builder.fsub(x, builder.fsub(power, _const(_ROUND))), power)


def _exp_minus_abs(builder, x):
    """exp(-|x|) with the product by log2(e) in two parts: 40 log2(e) rounded to float32 is 2e-6 off."""
    fn = cgutils.get_or_insert_function(builder.module, ir.FunctionType(_VF, [_VF]), f"llvm.fabs.v{W}f32")
    x = _at_least(builder, builder.fneg(builder.call(fn, [x])), -87.0)
    high = 1.44269502162933349609375  # log2(e) in float32
    power = _fma(builder, x, _const(high), _const(_ROUND))
    whole = builder.fsub(power, _const(_ROUND))
    fraction = _fma(builder, x, _const(high), builder.fneg(whole))
    return _scaled_by_power(builder, _fma(builder, x, _const(LOG2E - high), fraction), power)


def _pointer(builder, address, kind):
    return builder.inttoptr(address, kind.as_pointer())


def _tail_mask(builder, count):
    """True in the first `count` lanes."""
    lanes = ir.Constant(_VI, list(range(W)))
    return builder.icmp_signed("<", lanes, _splat(builder, builder.trunc(count, _I32)))


@intrinsic
def load(typingctx, address):
    """W floats at an address."""

    def codegen(context, builder, signature, args):
        return builder.load(_pointer(builder, args[0], _VF), align=4)

    return vec(types.int64), codegen


@intrinsic
def load_part(typingctx, address, count):
    """The first `count` of W floats at an address, then zeros."""

    def codegen(context, builder, signature, args):
        pointer = _pointer(builder, args[0], _VF)
        kind = ir.FunctionType(_VF, [pointer.type, _I32, _MASK, _VF])
        fn = cgutils.get_or_insert_function(builder.module, kind, f"llvm.masked.load.v{W}f32.p0")
        return builder.call(fn, [pointer, _I32(4), _tail_mask(builder, args[1]), _const(0.0)])

    return vec(types.int64, types.int64), codegen


@intrinsic
def store(typingctx, address, value):
    """Write W floats to an address."""

    def codegen(context, builder, signature, args):
        builder.store(args[1], _pointer(builder, args[0], _VF), align=4)
        return context.get_dummy_value()

    return types.void(types.int64, vec), codegen


@intrinsic
def store_part(typingctx, address, value, count):
    """Write the first `count` lanes to an address."""

    def codegen(context, builder, signature, args):
        pointer = _pointer(builder, args[0], _VF)
        kind = ir.FunctionType(ir.VoidType(), [_VF, pointer.type, _I32, _MASK])
        fn = cgutils.get_or_insert_function(builder.module, kind, f"llvm.masked.store.v{W}f32.p0")
        builder.call(fn, [args[1], pointer, _I32(4), _tail_mask(builder, args[2])])
        return context.get_dummy_value()

    return types.void(types.int64, vec, types.int64), codegen


@intrinsic
def load_f32(typingctx, address):
    """One float at an address."""

    def codegen(context, builder, signature, args):
        return builder.load(_pointer(builder, args[0], _F32), align=4)

    return types.float32(types.int64), codegen


@intrinsic
def store_f32(typingctx, address, value):
    """Write one float to an address."""

    def codegen(context, builder, signature, args):
        builder.store(args[1], _pointer(builder, args[0], _F32), align=4)
        return context.get_dummy_value()

    return types.void(types.int64, types.float32), codegen


@intrinsic
def prefetch(typingctx, address):
    """Ask for the cache line at an address, which need not be valid."""

    def codegen(context, builder, signature, args):
        pointer = _pointer(builder, args[0], ir.IntType(8))
        fn = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(ir.VoidType(), [pointer.type, _I32, _I32, _I32]), "llvm.prefetch.p0"
        )
        to_read, to_all_caches, data = _I32(0), _I32(3), _I32(1)
        builder.call(fn, [pointer, to_read, to_all_caches, data])
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@intrinsic
def load_i32(typingctx, address):
    """One int32 at an address, as int64."""

    def codegen(context, builder, signature, args):
        return builder.sext(builder.load(_pointer(builder, args[0], _I32), align=4), _I64)

    return types.int64(types.int64), codegen


@intrinsic
def load_i64(typingctx, address):
    """One int64 at an address."""

    def codegen(context, builder, signature, args):
        return builder.load(_pointer(builder, args[0], _I64), align=8)

    return types.int64(types.int64), codegen


@intrinsic
def store_i64(typingctx, address, value):
    """Write one int64 to an address."""

    def codegen(context, builder, signature, args):
        builder.store(args[1], _pointer(builder, args[0], _I64), align=8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def zeros(typingctx):
    """Zero in every lane."""

    def codegen(context, builder, signature, args):
        return _const(0.0)

    return vec(), codegen


@intrinsic
def broadcast(typingctx, address):
    """The float at an address, in every lane."""

    def codegen(context, builder, signature, args):
        return _splat(builder, builder.load(_pointer(builder, args[0], _F32), align=4))

    return vec(types.int64), codegen


@intrinsic
def splat(typingctx, value):
    """A float in every lane."""

    def codegen(context, builder, signature, args):
        return _splat(builder, args[0])

    return vec(types.float32), codegen


@intrinsic
def lane_sum(typingctx, value):
    """The sum of all lanes, added pairwise in a fixed order."""

    def codegen(context, builder, signature, args):
        total, width = args[0], W
        while width > 1:
            width //= 2
            undefined = ir.Constant(total.type, ir.Undefined)
            halves = [
                builder.shuffle_vector(
                    total, undefined, ir.Constant(ir.VectorType(_I32, width), list(range(start, start + width)))
                )
                for start in (0, width)
            ]
            total = builder.fadd(*halves)
        return builder.extract_element(total, _I32(0))

    return types.float32(vec), codegen


def _pick(builder, a, b, lanes):
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(_I32, len(lanes)), lanes))


@intrinsic
def quarter_sums(typingctx, a, b, c, d):
    """One vector of four quarters: `a` folded to W / 4 partial sums, then `b`, `c` and `d`."""

    def codegen(context, builder, signature, args):
        def add(*parts):
            return builder.fadd(*parts)

        a, b, c, d = args
        half, quarter = W // 2, W // 4
        low, high = [*range(half), *range(W, W + half)], [*range(half, W), *range(W + half, 2 * W)]
        ab, cd = (add(_pick(builder, x, y, low), _pick(builder, x, y, high)) for x, y in ((a, b), (c, d)))
        even = [lane for start in range(0, 2 * W, half) for lane in range(start, start + quarter)]
        odd = [lane + quarter for lane in even]
        return add(_pick(builder, ab, cd, even), _pick(builder, ab, cd, odd))

    return vec(vec, vec, vec, vec), codegen


@intrinsic
def store_quarters(typingctx, address, value):
    """Write four floats: the sum of each quarter of a vector."""

    def codegen(context, builder, signature, args):
        total, width = args[1], W // 4
        while width > 1:
            width //= 2
            total = builder.fadd(total, _pick(builder, total, total, [lane ^ width for lane in range(W)]))
        four = _pick(builder, total, total, list(range(0, W, W // 4)))
        builder.store(four, _pointer(builder, args[0], four.type), align=4)
        return context.get_dummy_value()

    return types.void(types.int64, vec), codegen


@intrinsic
def exp2(typingctx, x):
    """2^x, relative error 2e-7. Without AVX-512 x is clamped to [-126, 127.49]."""

    def codegen(context, builder, signature, args):
        return _exp2(builder, args[0])

    return vec(vec), codegen


@intrinsic
def exp_minus_abs(typingctx, x):
    """exp(-|x|), relative error 3e-7 down to |x| = 87, where it stays."""

    def codegen(context, builder, signature, args):
        return _exp_minus_abs(builder, args[0])

    return vec(vec), codegen


@intrinsic
def softplus(typingctx, x, e):
    """log(1 + exp(x)) given `e = exp_minus_abs(x)`; keeps its relative accuracy where it is tiny."""

    def codegen(context, builder, signature, args):
        x, e = args
        series = _fma(builder, _polynomial(builder, e, _LOG1P), e, _const(1.0))
        return _fma(builder, series, e, _at_least(builder, x, 0.0))

    return vec(vec, vec), codegen


@intrinsic
def sigmoid(typingctx, x, e):
    """1 / (1 + exp(-x)) given `e = exp_minus_abs(x)`."""

    def codegen(context, builder, signature, args):
        x, e = args
        one = _const(1.0)
        positive = builder.fcmp_ordered(">=", x, _const(0.0))
        return builder.fdiv(builder.select(positive, one, e), builder.fadd(one, e))

    return vec(vec, vec), codegen


@intrinsic
def fetch_add(typingctx, address):
    """Atomically add one to the int64 at an address; return what it was."""

    def codegen(context, builder, signature, args):
        return builder.atomic_rmw("add", _pointer(builder, args[0], _I64), _I64(1), "seq_cst")

    return types.int64(types.int64), codegen


def _binary(operation: str):
    @intrinsic
    def apply(typingctx, a, b):
        def codegen(context, builder, signature, args):
            # "contract" lets a * b + c become one fused instruction; nothing else is reordered.
            return getattr(builder, operation)(*args, flags=("contract",))

        return vec(vec, vec), codegen

    return apply


def _register(symbol, operation: str) -> None:
    apply = _binary(operation)

    @overload(symbol, inline="never")
    def _(a, b):
        if isinstance(a, VecType) and isinstance(b, VecType):
            return lambda a, b: apply(a, b)
        return None


_register(operator.add, "fadd")
_register(operator.sub, "fsub")
_register(operator.mul, "fmul")
