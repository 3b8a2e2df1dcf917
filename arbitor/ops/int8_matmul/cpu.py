"""Product of int8 codes and int8 weights on a CPU: by the library, by the compiled passes, or of floats.

With instructions for sums of bytes (VNNI, AMX) the library's product of integers is several times as fast as
that of floats, without them slower. The compiled one, of trits, needs AVX2 and takes about half the time of
floats. All give the same integers, so which one runs may be chosen by the clock.

Shape letters: N tokens, I in, O out.
"""

import math
import time
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from arbitor.ops import native
from arbitor.ops.rows import row_parts

_PROBE = (512, 320, 320)  # N, I, O
_ROUNDS = 5
_HOPELESS = 5.0
_PANEL, _QUAD = 24, 4  # rows and columns that `multiply_trits` of `passes.c` fills up to multiples of


def pays(largest: int = 1) -> bool:
    """Whether a product of integers is faster here than that of floats; `largest`: magnitude of a weight."""
    return library_pays() or (largest == 1 and compiled_pays())


@cache
def library_pays() -> bool:
    """Whether the library's product of integers is faster than that of floats; measured once."""
    codes, weight = _probe()
    return _quicker_than_floats(lambda: torch._int_mm(codes, weight.t()))


@cache
def compiled_pays() -> bool:
    """Whether the compiled product of trits is there and faster than that of floats; measured once."""
    codes, weight = _probe()
    scale, row_scale = torch.ones(len(codes), 1), torch.ones(len(weight))
    if multiplied(codes, weight, scale, row_scale) is None:
        return False
    return _quicker_than_floats(lambda: multiplied(codes, weight, scale, row_scale))


def sums(codes: Tensor, weight: Tensor) -> Tensor:
    """int8 [N, I] @ int8 [O, I]^T as int32 [N, O].

    The library's product can be silently wrong where a dimension is 1, whose stride may be anything
    (github.com/pytorch/pytorch/issues/195066), and takes no empty ones: those are multiplied as floats, as
    are all where that is faster. Floats hold the sums if I times the largest weight is at most
    MAX_IN_FEATURES.
    """
    if min(*codes.shape, *weight.shape) > 1 and library_pays():
        return torch._int_mm(codes, weight.t())
    with torch.autocast("cpu", enabled=False):
        return (codes.to(torch.float32) @ weight.to(torch.float32).t()).to(torch.int32)


def int8_matmul(
    codes: Tensor, weight: Tensor, scale: Tensor, row_scale: Tensor, out_dtype: torch.dtype
) -> Tensor:
    """See `arbitor.ops.int8_matmul.int8_matmul`; without compiled passes some tokens at a time."""
    if not library_pays() and (y := multiplied(codes, weight, scale, row_scale)) is not None:
        return y.to(out_dtype)
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


def multiplied(codes: Tensor, trits: Tensor, scale: Tensor, row_scale: Tensor) -> Tensor | None:
    """The compiled product, fp32 [N, O]; None where there is none, or a weight is no trit."""
    compiled = native.passes(
        (codes, torch.int8), (trits, torch.int8), (scale, torch.float32), (row_scale, torch.float32)
    )
    (tokens, columns), rows = codes.shape, len(trits)
    if compiled is None or (scale.numel(), row_scale.numel()) != (tokens, rows) or not columns:
        return None
    panels = trits.new_empty(-(-rows // _PANEL) * _PANEL * -(-columns // _QUAD) * _QUAD)
    y = scale.new_empty(tokens, rows)
    done = compiled.multiply_trits(
        codes.data_ptr(), trits.data_ptr(), panels.data_ptr(), row_scale.data_ptr(), scale.data_ptr(),
        y.data_ptr(), tokens, columns, rows, torch.get_num_threads(),
    )  # fmt: skip
    return y if done else None


def _probe() -> tuple[Tensor, Tensor]:
    """Codes and trits to measure with."""
    tokens, columns, rows = _PROBE
    codes = torch.arange(tokens * columns).remainder_(255).sub_(127).to(torch.int8).view(tokens, columns)
    weight = torch.arange(rows * columns).remainder_(3).sub_(1).to(torch.int8).view(rows, columns)
    return codes, weight


def _quicker_than_floats(work: Callable[[], object]) -> bool:
    """Whether a product of the probe takes less time than that of floats, each at its quickest."""
    codes, weight = (integers.to(torch.float32) for integers in _probe())
    of_floats = min(_seconds(lambda: codes @ weight.t()) for _ in range(_ROUNDS))
    quickest = math.inf
    for number in range(_ROUNDS):
        quickest = min(quickest, _seconds(work))
        if number and quickest > _HOPELESS * of_floats:  # the first may have had to be prepared
            break
    return quickest < of_floats


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
