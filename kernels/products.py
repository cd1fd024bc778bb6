"""The one matrix product of all kernels, the types that it rounds to and sums in, and the base of exponents.

These types follow from a kernel's tensors. What it loads for products is in one type, or rounded to it; ``dot`` rounds what was
computed to the type of what it meets, and sums in ``sum_type``.
"""

import os

import triton
import triton.language as tl

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@triton.constexpr_function
def sum_type(dtype):
    """What numbers of a type, and their products, are summed in."""
    return tl.float64 if dtype == tl.float64 else tl.float32


@triton.constexpr_function
def operand_type(dtype, acc):
    """What operands are rounded to: a type of 16 bits, else ``acc``, that of the sums."""
    return dtype if dtype.primitive_bitwidth == 16 else acc


@triton.constexpr_function
def _narrower(a, b):
    return a if a.primitive_bitwidth < b.primitive_bitwidth else b


@triton.constexpr_function
def _multiplied(dtype):
    """What tl.dot is given; Triton's interpreter takes the bits of bfloat16 for integers, whose products are exact in float32."""
    return tl.float32 if _INTERPRETED and dtype == tl.bfloat16 else dtype


@triton.jit
def dot(a, b, acc):
    """acc + a @ b (acc may be None), never in TF32. The wider one of a and b is first rounded to the other's type."""
    ROUNDED: tl.constexpr = _narrower(a.dtype, b.dtype)
    DOT: tl.constexpr = _multiplied(ROUNDED)
    ACC: tl.constexpr = sum_type(ROUNDED) if acc is None else acc.dtype
    return tl.dot(a.to(ROUNDED).to(DOT), b.to(ROUNDED).to(DOT), acc, input_precision="ieee", out_dtype=ACC)
