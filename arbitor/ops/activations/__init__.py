"""Input side of a linear on integer weights: RMS norm without gain and int8 codes per token."""

from arbitor.ops.activations.reference import (
    CODE_SCALE,
    RMS_EPS,
    backward_dtype,
    compute_dtype,
    exact_matmul,
    input_gradient,
    integer_linear,
    linear,
    linear_backward,
    linear_outputs,
    norm_backward,
    normalize_and_quantize,
    scale_tokens,
    squared_relu,
    squared_relu_backward,
    weight_dtype,
)

__all__ = [
    "CODE_SCALE",
    "RMS_EPS",
    "backward_dtype",
    "compute_dtype",
    "exact_matmul",
    "input_gradient",
    "integer_linear",
    "linear",
    "linear_backward",
    "linear_outputs",
    "norm_backward",
    "normalize_and_quantize",
    "scale_tokens",
    "squared_relu",
    "squared_relu_backward",
    "weight_dtype",
]
