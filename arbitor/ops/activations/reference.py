"""Input side of a linear on integer weights: RMS norm without gain and int8 codes per token.

Shape letters: N tokens, I in, O out.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from arbitor.ops.backend import rounds_gradients, uses_triton
from arbitor.ops.int8_matmul import int8_matmul

RMS_EPS = 1e-6
# Codes of the largest element of a token. Not 127: activations are small integers times one scale, so half
# the largest would land on 63.5, where the last bit of an earlier rounding would choose the code.
CODE_SCALE = 126.99


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which norms and codes are computed: fp64 for fp64 input, else fp32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def squared_relu(x: Tensor) -> Tensor:
    """relu(x)^2, elementwise."""
    positive = x.clamp_min(0)
    return positive * positive


def squared_relu_backward(dy: Tensor, x: Tensor) -> Tensor:
    """Gradient of x through `squared_relu`."""
    return 2 * (dy * x.clamp_min(0))


def normalize_and_quantize(
    x: Tensor, input_norm: bool, quantize: bool, squared: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """RMS norm and absmax int8 quantisation of every token, fused: x / rms(x) ~ codes * scale.

    The codes do not depend on the norm, since a positive factor leaves x / absmax(x) as it is.

    Args:
        x: float [N, I].
        input_norm: divide by the root mean square over I (epsilon 1e-6), else by 1.
        quantize: round to codes in [-127, 127] with one scale a token; else codes are the normalised floats.
        squared: take `squared_relu(x)` for x.

    Returns:
        codes: [N, I] integers in the compute dtype, or int8 (without `quantize`: the normalised floats).
        scale: [N, 1] compute dtype, what one code unit is worth.
        rstd: [N, 1] compute dtype, 1 / rms(x), or ones.
    """
    dtype = compute_dtype(x)
    if quantize and dtype == torch.float32 and uses_triton(x):
        from arbitor.ops.activations import triton

        return triton.quantize(x, input_norm, squared)
    if squared:
        x = squared_relu(x)
    if input_norm:
        rstd = rstd_of(torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=dtype), x.shape[-1])
    else:
        rstd = x.new_ones((x.shape[0], 1), dtype=dtype)
    if not quantize:
        return x * rstd, torch.ones_like(rstd), rstd
    smallest = torch.finfo(torch.float32).tiny * CODE_SCALE
    absmax = x.abs().amax(dim=-1, keepdim=True).to(dtype).clamp_min_(smallest)
    codes = (x * (CODE_SCALE / absmax)).round_()
    return codes, absmax * rstd / CODE_SCALE, rstd


def rstd_of(norm: Tensor, in_features: int) -> Tensor:
    """1 / rms of tokens of `in_features` numbers from their 2-norms [N, 1], which are overwritten."""
    mean_square = norm.square_().div_(in_features).add_(RMS_EPS)
    # The difference is 0, or NaN where the square overflowed: rsqrt alone would make such a token 0.
    return mean_square.rsqrt().add_(mean_square - mean_square)


def norm_backward(dxn: Tensor, x: Tensor, rstd: Tensor) -> Tensor:
    """Gradient of x through xn = x * rstd(x), the RMS norm without gain.

    Args:
        dxn: [N, I] compute dtype, gradient of xn, overwritten.
        x: [N, I], the norm's input.
        rstd: [N, 1].

    Returns:
        [N, I] in the dtype of dxn: rstd * (dxn - xn * mean(dxn * xn)).
    """
    coefficient = (dxn * x).sum(dim=-1, keepdim=True).mul_(rstd.pow(3) / x.shape[-1])
    return dxn.mul_(rstd).addcmul_(x, coefficient, value=-1)


def _no_autocast(x: Tensor) -> AbstractContextManager[None]:
    """Autocast would reach into an op and round an exact product; the caller has chosen the dtypes."""
    if not torch.is_autocast_enabled(x.device.type):
        return nullcontext()
    return torch.autocast(x.device.type, enabled=False)


def exact_matmul(codes: Tensor, weight: Tensor, quantized: bool) -> Tensor:
    """codes @ weight^T; exact where both hold integers times powers of two.

    int8 codes times trits (or int8 table entries) sum to integers below 2^24 for any width in use, so an fp32
    accumulator holds them exactly and the result depends neither on the order of summation nor on the
    number of tokens. On CUDA the operands are bf16, which holds both exactly.

    Args:
        codes: [N, I], int8 or the compute dtype.
        weight: [O, I], on CUDA bf16 when `quantized`, else the compute dtype.
        quantized: codes are integers.

    Returns:
        [N, O] compute dtype.
    """
    if quantized and codes.is_cuda:
        return torch.mm(codes.to(torch.bfloat16), weight.t(), out_dtype=torch.float32)
    return codes.to(weight.dtype) @ weight.t()


def weight_dtype(x: Tensor, quantized: bool) -> torch.dtype:
    """The dtype to decode weights to for `exact_matmul`."""
    return torch.bfloat16 if quantized and x.is_cuda else compute_dtype(x)


def backward_dtype(x: Tensor) -> torch.dtype:
    """The dtype to decode weights to for the gradient of x."""
    return torch.bfloat16 if x.is_cuda or rounds_gradients(x) else compute_dtype(x)


def linear(
    x: Tensor,
    weight: Tensor,
    input_norm: bool,
    quantize: bool,
    out_dtype: torch.dtype,
    squared: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Forward of a linear on decoded integer weights.

    Args:
        x: float [N, I].
        weight: [O, I] in `weight_dtype(x, quantize)`.
        input_norm, quantize, squared: as in `normalize_and_quantize`.
        out_dtype: of y.

    Returns:
        y [N, O]; codes [N, I], int8 when `quantize`; scale [N, 1]; rstd [N, 1].
    """
    codes, scale, rstd = normalize_and_quantize(x, input_norm, quantize, squared)
    saved = codes.to(torch.int8) if quantize else codes
    with _no_autocast(x):
        y = exact_matmul(saved if codes.is_cuda else codes, weight, quantize)
    if y.dtype == out_dtype:
        return y.mul_(scale), saved, scale, rstd
    return scale_tokens(y, scale, out_dtype), saved, scale, rstd


def integer_linear(
    x: Tensor,
    weight: Tensor,
    row_scale: Tensor,
    input_norm: bool,
    out_dtype: torch.dtype,
    squared: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`linear` with quantised activations on weights that are still integers; equal to the last bit.

    Args:
        x: fp32 [N, I] on a CPU.
        weight: int8 [O, I].
        row_scale: fp32 [O], a power of two that a unit of the row is worth, or NaN.
        input_norm, out_dtype, squared: as in `linear`.
    """
    from arbitor.ops.activations import cpu

    codes, scale, rstd = cpu.quantize(x, input_norm, squared)
    return int8_matmul(codes, weight, scale, row_scale, out_dtype), codes, scale, rstd


def scale_tokens(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """x [N, I] times scale [N, 1], rounded once to `dtype`."""
    if scale.dtype == torch.float32 and uses_triton(x):
        from arbitor.ops.activations import triton

        return triton.scale_tokens(x, scale, dtype)
    if x.device.type == "cpu" and x.dtype == scale.dtype == torch.float32 and dtype == torch.bfloat16:
        from arbitor.ops.activations import cpu

        return cpu.round_scaled(x, scale)
    return torch.mul(x, scale, out=torch.empty_like(x, dtype=dtype))


def linear_backward(
    dy: Tensor, x: Tensor, rstd: Tensor, weight: Tensor, input_norm: bool, squared: bool = False
) -> Tensor:
    """Gradient of x through `linear`; rounding passes the gradient straight through.

    Args:
        dy: [N, O].
        x: [N, I], the forward's input.
        rstd: [N, 1].
        weight: [O, I].
        input_norm, squared: as in the forward.

    Returns:
        [N, I] in the dtype of x.
    """
    with _no_autocast(x):
        dxn = dy.to(weight.dtype) @ weight
    return input_gradient(dxn, x, rstd, input_norm, squared)


def input_gradient(dxn: Tensor, x: Tensor, rstd: Tensor, input_norm: bool, squared: bool = False) -> Tensor:
    """Gradient [N, I] of x, in its dtype, from that of `normalize_and_quantize`'s codes * scale.

    Args:
        dxn: float [N, I], overwritten.
        x: float [N, I].
        rstd: [N, 1].
        input_norm, squared: as in the forward.
    """
    if (input_norm or squared) and compute_dtype(x) == torch.float32 and uses_triton(x):
        from arbitor.ops.activations import triton

        return triton.norm_backward(dxn, x, rstd, input_norm, squared)
    if x.device.type == "cpu" and x.dtype == torch.float32:
        from arbitor.ops.activations import cpu

        return cpu.input_gradient(dxn, x, rstd, input_norm, squared)
    normed = squared_relu(x) if squared else x
    dx = norm_backward(dxn.to(compute_dtype(x)), normed, rstd) if input_norm else dxn
    return squared_relu_backward(dx.to(x.dtype), x) if squared else dx.to(x.dtype)


def linear_outputs(
    x: Tensor, out_features: int, quantize: bool, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Empty tensors of the shapes and dtypes that `linear` gives."""
    dtype = compute_dtype(x)
    per_token = x.new_empty((x.shape[0], 1), dtype=dtype)
    codes = x.new_empty(x.shape, dtype=torch.int8 if quantize else dtype)
    return x.new_empty((x.shape[0], out_features), dtype=out_dtype), codes, per_token, per_token.clone()
