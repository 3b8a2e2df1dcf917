"""Input side of a linear on integer weights: RMS norm without gain and int8 codes per token.

Shape letters: N tokens, I in, O out.
"""

import torch
from torch import Tensor

RMS_EPS = 1e-6
INT8_MAX = 127


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which norms and codes are computed: fp64 for fp64 input, else fp32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def normalize_and_quantize(x: Tensor, input_norm: bool, quantize: bool) -> tuple[Tensor, Tensor, Tensor]:
    """RMS norm and absmax int8 quantisation of every token, fused: x / rms(x) ~ codes * scale.

    The codes do not depend on the norm, since a positive factor leaves x / absmax(x) as it is.

    Args:
        x: float [N, I].
        input_norm: divide by the root mean square over I (epsilon 1e-6), else by 1.
        quantize: round to codes in [-127, 127] with one scale a token; else codes are the normalised floats.

    Returns:
        codes: [N, I] integers in the compute dtype (or the normalised floats).
        scale: [N, 1] compute dtype, what one code unit is worth.
        rstd: [N, 1] compute dtype, 1 / rms(x), or ones.
    """
    x = x.to(compute_dtype(x))
    if input_norm:
        mean_square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        rstd = mean_square.add_(RMS_EPS).rsqrt_()
    else:
        rstd = x.new_ones((x.shape[0], 1))
    if not quantize:
        return x * rstd, torch.ones_like(rstd), rstd
    absmax = x.abs().amax(dim=-1, keepdim=True).clamp_min_(torch.finfo(torch.float32).tiny * INT8_MAX)
    codes = (x * (INT8_MAX / absmax)).round_()
    return codes, absmax * rstd / INT8_MAX, rstd


def norm_backward(dxn: Tensor, x: Tensor, rstd: Tensor) -> Tensor:
    """Gradient of x through xn = x * rstd(x), the RMS norm without gain.

    Args:
        dxn: [N, I], gradient of xn, overwritten.
        x: [N, I], the norm's input.
        rstd: [N, 1].

    Returns:
        [N, I] in the dtype of dxn: rstd * (dxn - xn * mean(dxn * xn)).
    """
    x = x.to(dxn.dtype)
    coefficient = (dxn * x).sum(dim=-1, keepdim=True).mul_(rstd.pow(3) / x.shape[-1])
    return dxn.mul_(rstd).addcmul_(x, coefficient, value=-1)


def _no_autocast(x: Tensor) -> torch.autocast:
    """Autocast would reach into an op and round an exact product; the caller has chosen the dtypes."""
    return torch.autocast(x.device.type, enabled=False)


def exact_matmul(codes: Tensor, weight: Tensor, quantized: bool) -> Tensor:
    """codes @ weight^T; exact where both hold integers times powers of two.

    int8 codes times trits (or int8 table entries) sum to integers below 2^24 for any width in use, so an fp32
    accumulator holds them exactly and the result depends neither on the order of summation nor on the
    number of tokens. On CUDA the operands are bf16, which holds both exactly.

    Args:
        codes: [N, I] compute dtype.
        weight: [O, I], bf16 on CUDA when `quantized`, else the compute dtype.
        quantized: codes are integers.

    Returns:
        [N, O] compute dtype.
    """
    if quantized and codes.is_cuda:
        return torch.mm(codes.to(torch.bfloat16), weight.t(), out_dtype=torch.float32)
    return codes @ weight.t()


def weight_dtype(x: Tensor, quantized: bool) -> torch.dtype:
    """The dtype to decode weights to for `exact_matmul`."""
    return torch.bfloat16 if quantized and x.is_cuda else compute_dtype(x)


def linear(
    x: Tensor, weight: Tensor, input_norm: bool, quantize: bool, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Forward of a linear on decoded integer weights.

    Args:
        x: float [N, I].
        weight: [O, I] in `weight_dtype(x, quantize)`.
        input_norm, quantize: as in `normalize_and_quantize`.
        out_dtype: of y.

    Returns:
        y [N, O]; codes [N, I], int8 when `quantize`; scale [N, 1]; rstd [N, 1].
    """
    codes, scale, rstd = normalize_and_quantize(x, input_norm, quantize)
    with _no_autocast(x):
        y = exact_matmul(codes, weight, quantize).mul_(scale).to(out_dtype)
    return y, codes.to(torch.int8) if quantize else codes, scale, rstd


def linear_backward(dy: Tensor, x: Tensor, rstd: Tensor, weight: Tensor, input_norm: bool) -> Tensor:
    """Gradient of x through `linear`; rounding passes the gradient straight through.

    Args:
        dy: [N, O].
        x: [N, I], the forward's input.
        rstd: [N, 1].
        weight: [O, I].
        input_norm: as in the forward.

    Returns:
        [N, I] in the dtype of x.
    """
    with _no_autocast(x):
        dxn = (dy.to(weight.dtype) @ weight).to(compute_dtype(x))
    return (norm_backward(dxn, x, rstd) if input_norm else dxn).to(x.dtype)
