"""The one matrix product of all kernels, and the base of their exponents.

Operands are rounded to ``COMPUTE`` and summed in ``ACC`` (float32, or float64 where the inputs are). ``DOT`` is ``COMPUTE``, but
float32 for bfloat16 in Triton's interpreter, whose ``tl.dot`` takes its bits for integers; a product of two bfloat16 numbers is
exact in float32.
"""

import triton
import triton.language as tl

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def dot(a, b, acc, COMPUTE: tl.constexpr, DOT: tl.constexpr, ACC: tl.constexpr):
    """acc + a @ b (acc may be None), never in TF32."""
    return tl.dot(a.to(COMPUTE).to(DOT), b.to(COMPUTE).to(DOT), acc, input_precision="ieee", out_dtype=ACC)
