"""Linear on the packed trits of many experts, tokens sorted by expert, in grouped matmuls.

The experts that can have tokens are decoded a slice of output rows at a time, so that the transient weights
stay within a workspace however many experts there are; a slice is one grouped matmul for all experts.

Shape letters: M rows (tokens sorted by expert), I in, O out, E experts, A experts with tokens at most,
P packed bytes a row, G groups.
"""

from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from arbitor.ops import activations, trit_codec
from arbitor.ops.backend import uses_triton

WORKSPACE_BYTES = 16 << 20  # of decoded weights, or as many as the activations take, if that is more
MULTIPLE = 8  # elements that the library's grouped matmul wants rows to be a multiple of (16 bytes in bf16)


def busy_experts(offsets: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """The experts that have rows, found without asking the device how many there are.

    Args:
        offsets: int32 [E], end of each expert's rows; ascending.
        num_rows: M.

    Returns:
        int64 [A] experts in ascending order, A = min(E, M), among them all that have rows; and int32 [A],
        the ends of their rows.
    """
    experts = len(offsets)
    if num_rows >= experts:
        return torch.arange(experts, device=offsets.device), offsets
    counts = torch.diff(offsets, prepend=offsets.new_zeros(1))
    order = torch.argsort((counts == 0).to(torch.int8), stable=True)[:num_rows].sort().values
    return order, offsets[order]


def slices(
    beside: Iterable[Tensor], in_features: int, out_features: int, experts: int, element_size: int
) -> Iterator[tuple[int, int]]:
    """Ranges of output rows whose decoded weights fit into the workspace, in multiples of 16.

    Args:
        beside: tensors of rows that are there in any case; as large as the largest may the workspace be.
        in_features, out_features: I and O.
        experts: A, that are decoded.
        element_size: bytes of a decoded weight.
    """
    workspace = max(WORKSPACE_BYTES, *(tensor.nbytes for tensor in beside))
    rows = workspace // max(1, experts * in_features * element_size)
    rows = max(16, rows // 16 * 16)
    for first in range(0, out_features, rows):
        yield first, min(first + rows, out_features)


def grouped_matmul(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """x [M, K] of group a times weight [A, K, N] -> [M, N] of the same dtype.

    `offsets` int32 [A] are the ends of the groups; what comes of rows behind the last one is undefined.
    """
    if x.dtype == torch.float64:  # only for gradient checks; the library's op has no such kernel
        y = x.new_full((len(x), weight.shape[-1]), torch.nan)
        for group, (first, last) in enumerate(_ranges(offsets)):
            y[first:last] = x[first:last] @ weight[group]
        return y
    columns = weight.shape[-1]
    inner, outer = -x.shape[-1] % MULTIPLE, -columns % MULTIPLE
    if inner or outer:
        x, weight = F.pad(x, (0, inner)), F.pad(weight, (0, outer, 0, inner))
    return F.grouped_mm(x, weight, offs=offsets)[:, :columns]


def grouped_outer(a: Tensor, b: Tensor, offsets: Tensor) -> Tensor:
    """a^T b over the rows of each group: a [M, O], b [M, I] of one dtype -> [A, O, I]; zero without rows."""
    product = _outer(a, b, offsets)
    if uses_triton(a) and product.is_contiguous():
        from arbitor.ops.expert_linear import triton

        return triton.clear_idle(product, offsets)
    return _clear_idle(product, offsets)


def add_grouped_outer(total: Tensor, a: Tensor, b: Tensor, offsets: Tensor) -> None:
    """Add `grouped_outer(a, b, offsets)` to total [A, O, I], in place; only groups with rows are written."""
    product = _outer(a, b, offsets)
    narrow = torch.float64 not in (total.dtype, product.dtype)
    if narrow and uses_triton(total) and product.is_contiguous() and total.is_contiguous():
        from arbitor.ops.expert_linear import triton

        triton.add_busy(total, product, offsets)
    else:
        total.add_(_clear_idle(product, offsets))


def _outer(a: Tensor, b: Tensor, offsets: Tensor) -> Tensor:
    """As `grouped_outer`, with anything for groups without rows."""
    if a.dtype == torch.float64:
        return torch.stack([a[first:last].t() @ b[first:last] for first, last in _ranges(offsets)])
    rows, columns = a.shape[1], b.shape[1]
    # Padding by nothing would copy.
    a, b = (F.pad(t, (0, pad)) if (pad := -t.shape[1] % MULTIPLE) else t for t in (a, b))
    return F.grouped_mm(a.t(), b, offs=offsets)[:, :rows, :columns]


def _clear_idle(product: Tensor, offsets: Tensor) -> Tensor:
    """The product with zeros for groups without rows."""
    idle = torch.diff(offsets, prepend=offsets.new_zeros(1)) == 0
    return product.masked_fill_(idle[:, None, None], 0)


def clear_behind(rows: Tensor, offsets: Tensor) -> Tensor:
    """rows [M, ...], in place, with zeros behind the last expert's."""
    if rows.device.type == "cpu":
        rows[int(offsets[-1]) :] = 0
        return rows
    return rows.masked_fill_(torch.arange(len(rows), device=rows.device)[:, None] >= offsets[-1], 0)


def _ranges(offsets: Tensor) -> list[tuple[int, int]]:
    ends = offsets.tolist()
    return list(zip([0, *ends[:-1]], ends, strict=True))


def forward(
    x: Tensor,
    offsets: Tensor,
    packed: Tensor,
    exponent: Tensor,
    group: int,
    input_norm: bool,
    quantize: bool,
    out_dtype: torch.dtype,
    squared: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y = quantize(rms_norm(x)) @ (T * 2^E)^T by expert; see `arbitor.ops.expert_linear.expert_linear`."""
    codes, scale, rstd = activations.normalize_and_quantize(x, input_norm, quantize, squared)
    saved = codes.to(torch.int8) if quantize else codes
    # The library's grouped product gives what it takes, and bf16 would round sums.
    exact = out_dtype == torch.float32
    dtype = activations.compute_dtype(x) if exact else activations.weight_dtype(x, quantize)
    operand = saved.to(dtype)
    experts, ends = busy_experts(offsets, x.shape[0])
    out_features = packed.shape[1]
    y: Tensor | None = None
    for first, last in slices([x], x.shape[1], out_features, len(experts), dtype.itemsize):
        weight = trit_codec.decode(
            packed[experts, first:last], exponent[experts, first:last], x.shape[1], group, dtype
        )
        part = activations.scale_tokens(grouped_matmul(operand, weight.mT, ends), scale, out_dtype)
        if last - first == out_features:
            y = part
        else:
            y = x.new_empty((x.shape[0], out_features), dtype=out_dtype) if y is None else y
            y[:, first:last] = part
    assert y is not None, "an expert has at least one row"
    return clear_behind(y, offsets), saved, scale, rstd


def backward(
    dy: Tensor,
    x: Tensor,
    rstd: Tensor,
    offsets: Tensor,
    packed: Tensor,
    exponent: Tensor,
    group: int,
    input_norm: bool,
    squared: bool = False,
) -> Tensor:
    """Gradient of x; see `arbitor.ops.expert_linear.expert_linear_backward`."""
    dtype = activations.backward_dtype(x)
    dy = dy.to(dtype)
    experts, ends = busy_experts(offsets, x.shape[0])
    dxn: Tensor | None = None
    for first, last in slices([x, dy], x.shape[1], packed.shape[1], len(experts), dtype.itemsize):
        weight = trit_codec.decode(
            packed[experts, first:last], exponent[experts, first:last], x.shape[1], group, dtype
        )
        part = grouped_matmul(dy[:, first:last].contiguous(), weight, ends)
        dxn = part if dxn is None else dxn.to(activations.compute_dtype(x)).add_(part)
    assert dxn is not None, "an expert has at least one row"
    return activations.input_gradient(clear_behind(dxn, offsets), x, rstd, input_norm, squared)
