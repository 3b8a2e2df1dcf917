"""Linears that read a residual stream and add to it, in fewer passes over the stream where kernels run.

What such a part of a model computes is

    stream, a, b = read_stream(stream, first, second)
    stream = add_to_stream(stream, f(a, b))

which is a = first(stream), b = second(stream), stream + f(a, b). In a chain of such parts a sum can wait for
the part that reads it, which is then one pass:

    stream, a = read_stream(Stream(stream, y), third)

Shape letters: N tokens, I in, O out.
"""

from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor, nn

from arbitor.ops import activations, trit_codec
from arbitor.ops.backend import uses_triton
from arbitor.ops.ternary_linear import cpu
from arbitor.ternary.capture import outside_autocast, wants_weights
from arbitor.ternary.layers import TernaryLinear, capture_linear, output_dtype, root_of, ternary_matmul


class Stream(NamedTuple):
    """A residual stream and what is still to be added to it.

    Attributes:
        total: float [..., I].
        added: float [..., I]; None if nothing is.
    """

    total: Tensor
    added: Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        """Of the stream."""
        return self.total.shape

    def settled(self) -> Tensor:
        """The stream as one tensor."""
        return self.total if self.added is None else add_to_stream(self.total, self.added)


def stream_dtype(x: Tensor) -> torch.dtype:
    """The dtype that a model keeps its residual stream in, made of x: autocast's for kernels on a GPU.

    A sum is then rounded once, as it is written, after it was formed in fp32. Elsewhere it is the dtype of x.
    """
    device = x.device.type
    narrow = torch.is_autocast_enabled(device) and not torch.compiler.is_compiling()
    if narrow and x.dtype != torch.float64 and uses_triton(x):
        return torch.get_autocast_dtype(device)
    return x.dtype


def widened(x: Tensor) -> Tensor:
    """x in fp32 at least, for what must not be rounded more than that."""
    return x.to(activations.compute_dtype(x))


def deferring(stream: Tensor) -> Tensor | Stream:
    """The stream for a chain of parts in which sums wait for their reader, where that is faster."""
    return Stream(stream) if _kernels_run(stream) else stream


def settled(stream: Tensor | Stream) -> Tensor:
    """The stream as one tensor."""
    return stream.settled() if isinstance(stream, Stream) else stream


def read_stream(stream: Tensor | Stream, *linears: nn.Module) -> tuple[Tensor, ...]:
    """The stream, and what each of the linears gives for it.

    Where kernels run, and on a CPU, the stream is normalised and quantised once for all of them. Kernels also
    add up the stream and the gradients of all its uses in that pass and in one, for which the caller goes on
    with the stream that is returned.

    Args:
        stream: float [..., I].
        linears: modules from [..., I] to [..., O].
    """
    if _are_plain(linears) and _kernels_run(stream.total if isinstance(stream, Stream) else stream):
        return _read(stream if isinstance(stream, Stream) else Stream(stream), linears)
    stream = settled(stream)
    if _are_plain(linears) and (quantized := _quantized_once(stream, linears)) is not None:
        return stream, *(ternary_matmul(linear, stream, True, quantized=quantized) for linear in linears)
    return stream, *(linear(stream) for linear in linears)


def add_to_stream(stream: Tensor, y: Tensor) -> Tensor:
    """stream + y, of one shape, in the dtype of the stream."""
    if stream.dtype != y.dtype and stream.shape == y.shape and _kernels_run(stream):
        return _Add.apply(stream, y)
    return stream + y


def _read(stream: Stream, linears: tuple[TernaryLinear, ...]) -> tuple[Tensor, ...]:
    """`read_stream` by kernels."""
    root = next((root for root in map(root_of, linears) if root is not None), None)
    shape = stream.shape
    if stream.added is not None and stream.added.shape != shape:
        stream = Stream(stream.settled())
    x_NI, added_NI = (None if part is None else part.reshape(-1, shape[-1]) for part in stream)
    assert x_NI is not None
    x_NI, *outputs = _Read.apply(root, x_NI, added_NI, linears, output_dtype(x_NI))
    return x_NI.view(shape), *(y_NO.view(*shape[:-1], -1) for y_NO in outputs)


def _kernels_run(stream: Tensor) -> bool:
    fits = stream.dtype in (torch.float32, torch.bfloat16)
    return fits and not torch.compiler.is_compiling() and uses_triton(stream)


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
    """x [N, I] as it is or with what is added to it, and the outputs [N, O] of one or two linears on it."""

    @staticmethod
    def forward(
        ctx: Any,
        root: Tensor | None,
        x: Tensor,
        added: Tensor | None,
        linears: tuple[TernaryLinear, ...],
        out_dtype: torch.dtype,
    ) -> tuple[Tensor, ...]:
        from arbitor.ops.ternary_linear import triton

        total, codes, scale, rstd, sums = triton.sum_quantized(x, added)
        weights = [(linear.T_packed, linear.E) for linear in linears]
        with outside_autocast():
            outputs = [
                triton.product(codes, scale, packed, exponent, linear.group, out_dtype, sums)
                for linear, (packed, exponent) in zip(linears, weights, strict=True)
            ]
        captures = any(linear.capture is not None for linear in linears)
        ctx.linears = linears
        ctx.added_dtype = None if added is None else added.dtype
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(total, rstd, codes if captures else None, scale, *sum(weights, ()))
        return x.view_as(x) if added is None else total, *outputs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dstream: Tensor | None, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        from arbitor.ops.activations import triton

        x, rstd, codes, scale, *weights = ctx.saved_tensors
        wanted = codes is not None and wants_weights(ctx)
        needs_gradient = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        scaled: dict[torch.dtype, Tensor] = {}
        normed = []
        for i, (linear, dy) in enumerate(zip(ctx.linears, gradients, strict=True)):
            if dy is None:
                continue
            if wanted and linear.capture is not None:
                capture_linear(linear.capture, codes, scale, dy, scaled)
            if needs_gradient:
                packed, exponent = weights[2 * i : 2 * i + 2]
                normed.append(_gradient_of_normed(dy, x, packed, exponent, linear.group))
        dx = dstream
        if normed:
            scaled.clear()
            dx = triton.norm_backward(
                normed[0], x, rstd, more=normed[1] if len(normed) > 1 else None, beside=dstream
            )
        dadded = None if dx is None or not ctx.needs_input_grad[2] else dx.to(ctx.added_dtype)
        return None, dx, dadded, None, None


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
