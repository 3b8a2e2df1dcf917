"""Linears that read a residual stream and add to it, in fewer passes over the stream where kernels run.

What such a part of a model computes is

    stream, a, b = read_stream(stream, first, second)
    stream = add_to_stream(stream, f(a, b))

which is a = first(stream), b = second(stream), stream + f(a, b). Shape letters: N tokens, I in, O out.
"""

from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from arbitor.ops import activations, trit_codec
from arbitor.ops.backend import uses_triton
from arbitor.ops.ternary_linear import cpu
from arbitor.ternary.capture import outside_autocast, wants_weights
from arbitor.ternary.layers import TernaryLinear, capture_linear, output_dtype, root_of, ternary_matmul


def read_stream(stream: Tensor, *linears: nn.Module) -> tuple[Tensor, ...]:
    """The stream, and what each of the linears gives for it.

    Where kernels run, and on a CPU, the stream is normalised and quantised once for all of them. Kernels also
    add the gradients of all its uses in one pass, for which the caller goes on with the stream that is
    returned.

    Args:
        stream: float [..., I].
        linears: modules from [..., I] to [..., O].
    """
    if _are_plain(linears):
        if _kernels_run(stream):
            root = next((root for root in map(root_of, linears) if root is not None), None)
            x_NI = stream.reshape(-1, stream.shape[-1])
            x_NI, *outputs = _Read.apply(root, x_NI, linears, output_dtype(stream))
            return x_NI.view(stream.shape), *(y_NO.view(*stream.shape[:-1], -1) for y_NO in outputs)
        if (quantized := _quantized_once(stream, linears)) is not None:
            return stream, *(ternary_matmul(linear, stream, True, quantized=quantized) for linear in linears)
    return stream, *(linear(stream) for linear in linears)


def add_to_stream(stream: Tensor, y: Tensor) -> Tensor:
    """stream + y, of one shape, in the dtype of the stream."""
    if stream.dtype != y.dtype and stream.shape == y.shape and _kernels_run(stream):
        return _Add.apply(stream, y)
    return stream + y


def _kernels_run(stream: Tensor) -> bool:
    return stream.dtype == torch.float32 and not torch.compiler.is_compiling() and uses_triton(stream)


def _are_plain(linears: tuple[nn.Module, ...]) -> TypeGuard[tuple[TernaryLinear, ...]]:
    """Whether there are one or two, and calling them is nothing but the product with their normed input."""
    return 0 < len(linears) <= 2 and all(map(_is_plain, linears))


def _is_plain(linear: nn.Module) -> bool:
    hooks = linear._forward_hooks or linear._forward_pre_hooks or linear._backward_hooks
    replaced = hooks or "forward" in vars(linear)
    return type(linear) is TernaryLinear and linear.input_norm and not replaced


def _quantized_once(stream: Tensor, linears: tuple[TernaryLinear, ...]) -> cpu.Quantized | None:
    """The normalised stream in codes on a CPU, for two linears that both multiply integers; else None."""
    if len(linears) < 2 or stream.device.type != "cpu":
        return None
    if any(linear.in_features != stream.shape[-1] for linear in linears):
        return None
    x_NI = stream.detach().reshape(-1, stream.shape[-1])
    return cpu.quantize(x_NI, True) if all(cpu.applies(x_NI, linear.E, True) for linear in linears) else None


class _Read(torch.autograd.Function):
    """x [N, I] as it is, and the outputs [N, O] of one or two linears on it."""

    @staticmethod
    def forward(
        ctx: Any, root: Tensor | None, x: Tensor, linears: tuple[TernaryLinear, ...], out_dtype: torch.dtype
    ) -> tuple[Tensor, ...]:
        from arbitor.ops.ternary_linear import triton

        codes, scale, rstd, sums = triton.quantized(x, True)
        weights = [(linear.T_packed, linear.E) for linear in linears]
        with outside_autocast():
            outputs = [
                triton.product(codes, scale, packed, exponent, linear.group, out_dtype, sums)
                for linear, (packed, exponent) in zip(linears, weights, strict=True)
            ]
        captures = any(linear.capture is not None for linear in linears)
        ctx.linears = linears
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, rstd, codes if captures else None, scale, *sum(weights, ()))
        return x.view_as(x), *outputs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dstream: Tensor | None, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        from arbitor.ops.activations import triton

        x, rstd, codes, scale, *weights = ctx.saved_tensors
        wanted = codes is not None and wants_weights(ctx)
        normed = []
        for i, (linear, dy) in enumerate(zip(ctx.linears, gradients, strict=True)):
            if dy is None:
                continue
            if wanted and linear.capture is not None:
                capture_linear(linear.capture, codes, scale, dy)
            if ctx.needs_input_grad[1]:
                packed, exponent = weights[2 * i : 2 * i + 2]
                normed.append(_gradient_of_normed(dy, x, packed, exponent, linear.group))
        if not normed or not ctx.needs_input_grad[1]:
            return None, dstream, None, None
        dx = triton.norm_backward(
            normed[0], x, rstd, more=normed[1] if len(normed) > 1 else None, beside=dstream
        )
        return None, dx, None, None


def _gradient_of_normed(dy: Tensor, x: Tensor, packed: Tensor, exponent: Tensor, group: int) -> Tensor:
    dtype = activations.backward_dtype(x)
    weight = trit_codec.decode(packed, exponent, x.shape[-1], group, dtype)
    with outside_autocast():
        return dy.to(dtype) @ weight


class _Add(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, stream: Tensor, y: Tensor) -> Tensor:
        from arbitor.ops.activations import triton

        ctx.dtype = y.dtype
        return triton.add(stream, y)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return gradient, gradient.to(ctx.dtype)
