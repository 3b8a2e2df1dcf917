"""Layers on integer weights: TernaryLinear, TernaryEmbeddingTable, Int8Embedding.

Backward computes the gradient of the input and leaves the weight's gradient to the optimizer's capture;
it changes no weight. Shape letters: N tokens, I in, O out, V rows of a table, D its width.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from arbitor.errors import UserError
from arbitor.ops.activations import backward_dtype, scale_tokens
from arbitor.ops.backend import rounds_gradients, uses_triton
from arbitor.ops.int8_table import Q_MAX, int8_gather, int8_linear, int8_linear_backward
from arbitor.ops.ternary_linear import cpu, ternary_linear, ternary_linear_backward
from arbitor.ops.trit_gather import ternary_gather
from arbitor.ternary.capture import (
    GradientCapture,
    RowCapture,
    needs_root,
    outside_autocast,
    refuse_reentrant_checkpoint,
    wants_weights,
)
from arbitor.ternary.tensor import (
    INIT_CLAMP,
    IntegerModule,
    TernaryScaleTensor,
    TScaleType,
    check_exponents,
)

# There is no float parameter, so this leaf makes autograd record a forward whose input needs no gradient.
# It belongs to no module and never receives a gradient.
_ROOT = torch.zeros(1, requires_grad=True)


def root_of(module: IntegerModule) -> Tensor | None:
    """The leaf that makes autograd record a forward of `module`, or None if nothing is to be captured."""
    if needs_root(module.capture):
        return _ROOT
    if module.capture is not None:
        refuse_reentrant_checkpoint()
    return None


def output_dtype(x: Tensor) -> torch.dtype:
    """The dtype of a linear's output: autocast's where it is on, else that of x."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def scaled_gradient(dy: Tensor, scale: Tensor) -> Tensor:
    """dy [N, O] times the codes' scale [N, 1]; in the dtype of dy, but fp32 for fp16, which may overflow.

    Where gradients are rounded, it is bf16.
    """
    dtype = torch.float32 if dy.dtype == torch.float16 else dy.dtype
    if rounds_gradients(dy):
        dtype = torch.bfloat16
    return scale_tokens(dy, scale, dtype)


def capture_linear(
    capture: GradientCapture,
    codes: Tensor,
    scale: Tensor,
    dy: Tensor,
    scaled: dict[torch.dtype, Tensor] | None = None,
) -> None:
    """Leave a weight's gradient: dy [N, O] beside the input, which is codes [N, I] times scale [N, 1].

    Linears with the same input may share `scaled`, where their product is kept by its dtype.
    """
    if dy.dtype != torch.float16 and uses_triton(dy) and capture.forms_product(codes, dy):
        # The codes become floats for the product in any case; with their scale, dy needs no pass.
        scaled = {} if scaled is None else scaled
        if dy.dtype not in scaled:
            scaled[dy.dtype] = scale_tokens(codes, scale, dy.dtype)
        with outside_autocast():
            capture.add_dense(dy.t() @ scaled[dy.dtype])
    else:
        capture.add_linear(codes, scaled_gradient(dy, scale))


class _TernaryMatmul(torch.autograd.Function):
    """Forward and input gradient of a ternary linear on x [..., I]."""

    @staticmethod
    def forward(
        ctx: Any,
        root: Tensor | None,
        x: Tensor,
        module: "NormedMatrix",
        quantize: bool,
        out_dtype: torch.dtype,
        squared: bool,
        quantized: cpu.Quantized | None,
    ) -> Tensor:
        packed, exponent = module.T_packed, module.E
        x_NI = x.reshape(-1, module.in_features)
        decoded = None
        if cpu.applies(x_NI, exponent, quantize):
            decoded = cpu.decode(packed, exponent, module.in_features)
            if quantized is None:
                quantized = cpu.quantize(x_NI, module.input_norm, squared)
            codes, scale, rstd = quantized
            y = cpu.forward(quantized, decoded, out_dtype)
        else:
            y, codes, scale, rstd = ternary_linear(
                x_NI, packed, exponent, module.group, module.input_norm, quantize, out_dtype, squared
            )
        ctx.module = module
        ctx.squared = squared
        saved_codes = codes if module.capture is not None else None
        # Kept for the backward where they take less than what is kept of the tokens.
        kept = decoded if decoded is not None and len(y) >= len(packed) else (None, None)
        ctx.save_for_backward(x, rstd, packed, exponent, saved_codes, scale, *kept)
        # No view in autograd's sense: a view that is made in here could not be changed in place.
        return torch.ops.aten._unsafe_view(y, (*x.shape[:-1], module.out_features))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, rstd, packed, exponent, codes, scale, trits, row_scale = ctx.saved_tensors
        module = ctx.module
        dy_NO, x_NI = dy.reshape(-1, module.out_features), x.reshape(-1, module.in_features)
        if module.capture is not None and codes is not None and wants_weights(ctx):
            capture_linear(module.capture, codes, scale, dy_NO)
        dx = None
        if ctx.needs_input_grad[1]:
            norm, squared = module.input_norm, ctx.squared
            if trits is not None:
                dx = cpu.backward(dy_NO, x_NI, rstd, cpu.Decoded(trits, row_scale), norm, squared)
            else:
                dx = ternary_linear_backward(dy_NO, x_NI, rstd, packed, exponent, module.group, norm, squared)
            dx = dx.view(x.shape)
        return None, dx, None, None, None, None, None


class NormedMatrix(TernaryScaleTensor):
    """A single ternary matrix whose input may be RMS-normalised: what `ternary_matmul` multiplies by.

    Attributes:
        input_norm: whether it is.
    """

    input_norm: bool


class TernaryLinear(NormedMatrix):
    """y = quantize(rms_norm(x)) W^T on packed trits; no gain, no bias.

    Args:
        in_features, out_features: sizes.
        tscale: weights that share a scale exponent.
        input_norm: divide every token by its root mean square first; False for layers put into models that
            already normalise.
        leading_shape: leading dimensions of the stored matrices.
        device: where to create the parameters.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        tscale: TScaleType | str = TScaleType.ROW,
        input_norm: bool = True,
        leading_shape: tuple[int, ...] = (),
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(
            in_features,
            out_features,
            tscale=tscale,
            leading_shape=leading_shape,
            device=device,
        )
        self.input_norm = input_norm

    def forward(
        self, x: Tensor, quantize: bool = True, squared: bool = False, count: Tensor | None = None
    ) -> Tensor:
        """Apply to x.

        Args:
            x: float [..., I].
            quantize: int8 activations per token; False keeps them float.
            squared: apply to relu(x)^2 in place of x.
            count: int32 [1] on the device of x [N, I]: only so many rows are multiplied, and the results of
                the others are 0, as the gradient that comes back for them must be.

        Returns:
            [..., O] in autocast's dtype where autocast is on, else in the dtype of x.
        """
        if x.shape[-1] != self.in_features:
            raise ValueError(f"expected a last dimension of {self.in_features}, got {tuple(x.shape)}")
        if count is not None:
            from arbitor.ternary.first_rows import first_rows_matmul

            return first_rows_matmul(self, x, count, quantize, squared)
        return ternary_matmul(self, x, quantize, squared)


def ternary_matmul(
    module: "NormedMatrix",
    x: Tensor,
    quantize: bool,
    squared: bool = False,
    quantized: cpu.Quantized | None = None,
) -> Tensor:
    """x float [..., I] times the matrix of `module`, [..., O]; captured, as `TernaryLinear.forward` says.

    Where `cpu.applies`, `quantized` may be what `cpu.quantize` gives of x, if it is there already.
    """
    return _TernaryMatmul.apply(root_of(module), x, module, quantize, output_dtype(x), squared, quantized)


def _row_ids(ids: Tensor, rows: int) -> Tensor:
    """ids as int64, checked: uint8 ids would index as a mask, negative ones from the end.

    On CUDA the range is not checked, since the host would have to wait for the device.

    Raises:
        UserError: a dtype that is no integer, or an id outside 0...rows - 1.
    """
    if ids.dtype == torch.bool or ids.is_floating_point() or ids.is_complex():
        raise UserError(f"ids of a table must be integers, got {ids.dtype}")
    if type(ids) is Tensor and ids.device.type == "cpu" and ids.numel() and not torch.compiler.is_compiling():
        low, high = (int(end) for end in ids.aminmax())
        if low < 0 or high >= rows:
            raise UserError(f"the table has rows 0...{rows - 1}, got the id {low if low < 0 else high}")
    return ids.to(torch.int64)


class _Gather(torch.autograd.Function):
    """Rows of a table by id; the gradient of the table goes to the capture."""

    @staticmethod
    def forward(ctx: Any, root: Tensor | None, ids: Tensor, module: IntegerModule) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.module = module
        return module._rows(ids)  # type: ignore[operator]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[None, None, None]:
        (ids,) = ctx.saved_tensors
        capture = ctx.module.capture if wants_weights(ctx) else None
        if isinstance(capture, RowCapture):
            capture.add_rows(ids.flatten(), dy.flatten(0, -2))
        elif capture is not None:
            capture.add_dense(
                torch.ops.aten.embedding_dense_backward(dy.contiguous(), ids, capture.rows, -1, False)
            )
        return None, None, None


class TernaryEmbeddingTable(TernaryScaleTensor):
    """Rows of trits times powers of two, looked up by id.

    Args:
        num_embeddings, dim: rows and their width.
        tscale: weights that share a scale exponent.
        sparse: for large tables: a step costs time and memory for the rows that were looked up, not for the
            table. The rows then vote one by one, each with its gradient brought to RMS 1, whatever the
            optimizer's rule (`sign` excepted).
        device: where to create the parameters.
    """

    def __init__(
        self,
        num_embeddings: int,
        dim: int,
        *,
        tscale: TScaleType | str = TScaleType.ROW,
        sparse: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(dim, num_embeddings, tscale=tscale, device=device)
        self.sparse = sparse

    def reset_parameters(self) -> None:
        """As for a matrix, with rows of standard deviation near 1."""
        super().reset_parameters()
        if self.E.device.type != "meta":
            with torch.no_grad():
                self.E.zero_()

    def _rows(self, ids: Tensor) -> Tensor:
        return ternary_gather(self.T_packed, self.E, ids, self.in_features, self.group, torch.float32)

    def forward(self, ids: Tensor) -> Tensor:
        """ids int [...] -> fp32 [..., dim]; UserError for an id that is no row (not checked on CUDA)."""
        return _Gather.apply(root_of(self), _row_ids(ids, self.out_features), self)


class _TableMatmul(torch.autograd.Function):
    """Forward and input gradient of a table used as an output layer on x [N, D]."""

    @staticmethod
    def forward(
        ctx: Any,
        root: Tensor | None,
        x: Tensor,
        module: "Int8Embedding",
        quantize: bool,
        out_dtype: torch.dtype,
    ) -> Tensor:
        y, codes, scale, rstd = int8_linear(x, module.q, module.E, quantize, out_dtype)
        ctx.module = module
        saved_codes = codes if module.capture is not None else None
        ctx.save_for_backward(x, rstd, module.q, module.E, saved_codes, scale)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, rstd, q, exponent, codes, scale = ctx.saved_tensors
        # Products of gradients on a GPU are of bf16; that of the table is kept in fp32 all the same.
        rounded = dy.to(backward_dtype(x)) if dy.is_cuda and uses_triton(dy) else dy
        capture = ctx.module.capture
        if capture is not None and codes is not None and wants_weights(ctx):
            if rounded is not dy and capture.forms_product(codes, dy):
                codes = scale_tokens(codes, scale, rounded.dtype)
                with outside_autocast():
                    capture.add_dense(torch.mm(rounded.t(), codes, out_dtype=torch.float32))
            else:
                capture_linear(capture, codes, scale, dy)
        dx = int8_linear_backward(rounded, x, rstd, q, exponent) if ctx.needs_input_grad[1] else None
        return None, dx, None, None, None


class Int8Weights(IntegerModule):
    """Base of weights that are int8 fixed-point numbers and take steps of the sign of their gradient.

    Attributes:
        q: int8 parameter in [-95, 95], [rows, columns] or a vector [columns].
    """

    q: nn.Parameter

    @property
    def stored(self) -> nn.Parameter:
        """q."""
        return self.q

    def numel(self) -> int:
        """Logical weights."""
        return self.q.numel()

    def _check_values(self, key: str, values: Tensor, where: str) -> None:
        """Codes outside [-95, 95] and illegal exponents."""
        if key == "E":
            check_exponents(values, where)
        elif key == "q" and bool((values.to(torch.int16).abs() > Q_MAX).any()):
            raise UserError(f"{where} holds a code outside -{Q_MAX}...{Q_MAX}: the data is damaged")


class _VectorValue(torch.autograd.Function):
    """q / 2^fraction_bits; the gradient goes to the capture."""

    @staticmethod
    def forward(ctx: Any, root: Tensor | None, module: "Int8Vector") -> Tensor:
        ctx.module = module
        return module.q.to(torch.float32).mul_(2.0**-module.fraction_bits)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[None, None]:
        if ctx.module.capture is not None and wants_weights(ctx):
            ctx.module.capture.add_dense(dy[None].clone())
        return None, None


class Int8Vector(Int8Weights):
    """A trained vector of fixed-point numbers, value = q / 2^fraction_bits: biases, decays.

    Args:
        size: numbers.
        fraction_bits: bits after the point; the range is +-95 / 2^fraction_bits.
        value: what every number starts at, rounded to a code.
        device: where to create the parameter.
    """

    def __init__(
        self,
        size: int,
        *,
        fraction_bits: int,
        value: float = 0.0,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        code = round(value * 2**fraction_bits)
        if not -Q_MAX <= code <= Q_MAX:
            raise UserError(
                f"a value of {value} does not fit: with {fraction_bits} fraction bits the range is "
                f"+-{Q_MAX / 2**fraction_bits:g}"
            )
        self.fraction_bits = fraction_bits
        self.q = nn.Parameter(torch.full((size,), code, dtype=torch.int8, device=device), requires_grad=False)

    def forward(self) -> Tensor:
        """The vector as fp32 [size]."""
        return _VectorValue.apply(root_of(self), self)

    def extra_repr(self) -> str:
        """Size and precision."""
        return f"{self.q.numel()}, fraction_bits={self.fraction_bits}"


class Int8Embedding(Int8Weights):
    """Byte table with weight = q * 2^(E - 6), q int8 in [-95, 95], one exponent a row.

    Attributes:
        q: int8 parameter [num_embeddings, dim].
        E: int8 parameter [num_embeddings].

    Args:
        num_embeddings: rows.
        dim: width.
        kind: "embedding" starts with a standard deviation of 1, "head" with dim^-1/2.
        device: where to create the parameters.
    """

    E: nn.Parameter

    def __init__(
        self,
        num_embeddings: int,
        dim: int,
        *,
        kind: str = "embedding",
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if kind not in ("embedding", "head"):
            raise UserError(f"unknown kind of table {kind!r}; choose embedding or head")
        self.num_embeddings = num_embeddings
        self.dim = dim
        self.kind = kind
        q = torch.empty((num_embeddings, dim), dtype=torch.int8, device=device)
        exponent = torch.empty((num_embeddings,), dtype=torch.int8, device=device)
        self.q = nn.Parameter(q, requires_grad=False)
        self.E = nn.Parameter(exponent, requires_grad=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """q = round(64 u) with u ~ N(0, 1) clamped; E by the kind of table."""
        if self.q.device.type == "meta":
            return
        u = torch.randn(self.q.shape, device=self.q.device).clamp_(-INIT_CLAMP, INIT_CLAMP)
        self.q.copy_(u.mul_(64).round_())
        self.E.fill_(0 if self.kind == "embedding" else round(math.log2(self.dim**-0.5)))

    def _rows(self, ids: Tensor) -> Tensor:
        return int8_gather(self.q, self.E, ids)

    def forward(self, ids: Tensor) -> Tensor:
        """ids int [...] -> fp32 [..., dim]; UserError for an id that is no row (not checked on CUDA)."""
        return _Gather.apply(root_of(self), _row_ids(ids, self.num_embeddings), self)

    def logits(self, x: Tensor, quantize: bool = True, dtype: torch.dtype | None = None) -> Tensor:
        """The table as an output layer: x float [..., dim] -> [..., num_embeddings].

        Args:
            x: what is read.
            quantize: int8 activations per token; False keeps them float.
            dtype: of the result; None is autocast's where autocast is on, else that of x.
        """
        x_ND = x.reshape(-1, self.dim)
        dtype = output_dtype(x) if dtype is None else dtype
        y_NV = _TableMatmul.apply(root_of(self), x_ND, self, quantize, dtype)
        return y_NV.view(*x.shape[:-1], self.num_embeddings)

    def extra_repr(self) -> str:
        """Sizes and kind."""
        return f"{self.num_embeddings}, {self.dim}, kind={self.kind}"
