"""Product of int8 codes and int8 weights on a CPU, by the library's integer product.

With instructions for sums of bytes (VNNI, AMX) it is several times as fast as the fp32 product, without them
slower. Both give the same integers, so which one runs may be chosen by the clock.

Shape letters: N tokens, I in, O out.
"""

import time
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from arbitor.ops import native
from arbitor.ops.rows import row_parts

_PROBE = (512, 320, 320)  # N, I, O
_ROUNDS = 5


@cache
def pays() -> bool:
    """Whether the integer product is faster here than that of floats; measured once, in milliseconds."""
    tokens, columns, rows = _PROBE
    codes = torch.arange(tokens * columns).remainder_(255).sub_(127).to(torch.int8).view(tokens, columns)
    weight = torch.arange(rows * columns).remainder_(3).sub_(1).to(torch.int8).view(rows, columns)
    codes_f, weight_f = codes.to(torch.float32), weight.to(torch.float32)
    integers = _seconds(lambda: sums(codes, weight))
    return integers < _seconds(lambda: codes_f @ weight_f.t())


def sums(codes: Tensor, weight: Tensor) -> Tensor:
    """int8 [N, I] @ int8 [O, I]^T as int32 [N, O].

    The library's product can be silently wrong where a dimension is 1, whose stride may be anything
    (github.com/pytorch/pytorch/issues/195066), and takes no empty ones: those are multiplied as floats.
    """
    if min(*codes.shape, *weight.shape) <= 1:
        with torch.autocast("cpu", enabled=False):
            return (codes.to(torch.float32) @ weight.to(torch.float32).t()).to(torch.int32)
    return torch._int_mm(codes, weight.t())


def int8_matmul(
    codes: Tensor, weight: Tensor, scale: Tensor, row_scale: Tensor, out_dtype: torch.dtype
) -> Tensor:
    """See `arbitor.ops.int8_matmul.int8_matmul`; without compiled passes some tokens at a time."""
    compiled = native.passes((scale, torch.float32), (row_scale, torch.float32))
    if compiled is not None and (scale.numel(), row_scale.numel()) == (len(codes), len(weight)):
        y = sums(codes, weight).contiguous()
        compiled.scale_sums(
            y.data_ptr(), row_scale.data_ptr(), scale.data_ptr(), *y.shape, torch.get_num_threads()
        )
        return y.view(torch.float32).to(out_dtype)
    y = torch.empty((len(codes), len(weight)), dtype=torch.float32)
    for y_part, codes_part, scale_part in row_parts(y, codes, scale):
        y_part.copy_(sums(codes_part, weight)).mul_(row_scale).mul_(scale_part)
    return y.to(out_dtype)


def _seconds(work: Callable[[], Tensor]) -> float:
    """The quickest of some calls."""
    taken = []
    for _ in range(_ROUNDS):
        began = time.perf_counter()
        work()
        taken.append(time.perf_counter() - began)
    return min(taken)
