"""Functions that several Triton kernels share; imported by the operations' `triton.py` only.

Kernels that must equal the reference bit for bit are launched with `enable_fp_fusion=False`: a fused
multiply-add would round once where the reference rounds twice.
"""

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

CODE_SCALE = tl.constexpr(126.99)
# Programs that a grid may have along its second and third dimension.
MOST_PROGRAMS = 65535


@triton.jit
def shift_right(x, count: tl.constexpr):
    """Logical shift of int32."""
    return (x.to(tl.uint32, bitcast=True) >> count).to(tl.int32, bitcast=True)


@triton.jit
def random_word(index, key_a, key_b):
    """32 random bits of element `index` (int32) of the stream of two int32 keys; see ops/random_bits."""
    x = index + key_a
    x = (x ^ shift_right(x, 16)) * 0x7FEB352D
    # x ^ key_b and then x ^ (x >> 15), as one operation on three numbers: the key's part is that of all.
    x = x ^ shift_right(x, 15) ^ (key_b ^ shift_right(key_b, 15))
    x = x * -2073254261  # 0x846CA68B
    return x ^ shift_right(x, 16)


@triton.jit
def round_even(x):
    """fp32 rounded to the nearest integer, halves to even, without a library call."""
    magic = tl.where(x < 0, -8388608.0, 8388608.0)  # 2^23: above it every fp32 is an integer
    return tl.where(tl.abs(x) < 8388608.0, (x + magic) - magic, x)


@triton.jit
def exp2_int(exponent):
    """2^exponent as fp32 for int32 exponents in [-126, 127]."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def rounded(x, PTX: tl.constexpr):
    """fp32 within int32 rounded to the nearest integer, halves to even, as int32."""
    if PTX:
        return tl.inline_asm_elementwise(
            "cvt.rni.s32.f32 $0, $1;", "=r,r", [x], dtype=tl.int32, is_pure=True, pack=1
        )
    return round_even(x).to(tl.int32)


@triton.jit
def fixed_point(value, factor, PTX: tl.constexpr):
    """value * factor as int32, held to +-2^30; see `stochastic_floor` in ops/state_update."""
    return rounded(tl.minimum(tl.maximum(value * factor, -1073741824.0), 1073741824.0), PTX)


@triton.jit
def digit(byte, plane: tl.constexpr):
    """Base-3 digit number `plane` of a packed byte (int32)."""
    return (((byte * 3**plane) & 255) * 3) >> 8


@triton.jit
def part_of_rows(TURNED: tl.constexpr):
    """Places of a program across and down a grid of `grid_of_rows`."""
    if TURNED:
        return tl.program_id(1), tl.program_id(0)
    return tl.program_id(0), tl.program_id(1)


@triton.jit
def is_legal(byte):
    """Whether packing produces a byte (int32). q = ceil(256 v / 243) is 243 q = 256 v + r with r < 243."""
    return ((byte * 243) & 255) < 243


def has_ptx() -> bool:
    """Whether assembly for NVIDIA's GPUs can be run: not in the interpreter, nor on AMD's."""
    return os.environ.get("TRITON_INTERPRET") != "1" and torch.version.hip is None


def has_halves(device: torch.device) -> bool:
    """Whether assembly may also use instructions on pairs of 16 bits, which came with Hopper."""
    return has_ptx() and (device.type != "cuda" or torch.cuda.get_device_capability(device) >= (9, 0))


def grid_of_rows(across: int, down: int, matrices: int = 1) -> tuple[tuple[int, int, int], bool]:
    """Grid of parts of matrices, neighbours in a row first, and whether it is turned for being too tall."""
    turned = down > MOST_PROGRAMS
    return ((down, across, matrices) if turned else (across, down, matrices)), turned


def dense_rows(x: Tensor) -> Tensor:
    """x [n, O, I] with every matrix dense in memory; copied where it is not (slices of rows are)."""
    return x if x.stride(-1) == 1 and x.stride(-2) == x.shape[-1] else x.contiguous()
