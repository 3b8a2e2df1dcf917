"""Do the layers that are about to be timed compute what the reference computes?

Integers are compared bit by bit. Floats are compared by the norm of the difference over that of the
reference: on a GPU within bf16's 2^-8, the precision of the outputs; on the CPU within eps * sqrt(K) of fp32,
K the terms of a sum.

Shape letters: N tokens, I in, O out, n matrices.
"""

from typing import Any

import torch
from torch import Tensor

from arbitor.ops import activations, trit_codec
from arbitor.ops.momentum import momentum_fold_drawn
from arbitor.ops.momentum import reference as momentum_reference
from arbitor.ops.random_bits import reference as random_reference
from arbitor.ops.state_update import reference as update_reference
from arbitor.ops.state_update import state_update_drawn
from arbitor.ops.trit_codec import reference as codec_reference
from arbitor.ternary import TernaryLinear, VoteOptimizer

# Sizes that divide by nothing, for up to four tokens and for up to eight, one that fills tiles, and one
# with tokens enough for the other code path.
SHAPES = ((3, 161, 67), (5, 161, 67), (64, 480, 480), (1100, 320, 160))
TSCALES = ("ROW", "T32")
BF16_PRECISION = 2.0**-8
FP32_EPS = 2.0**-23


class ParityError(Exception):
    """Outputs differ from the reference; figures of such a build mean nothing."""


def check(device: torch.device) -> None:
    """Compare the operations of a training step on `device` with the reference on the CPU.

    Raises:
        ParityError: something differs; names it, with its sizes.
    """
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        for shape in SHAPES:
            for tscale in TSCALES:
                _check_linear(device, *shape, tscale)
            _check_update(device, *shape[1:])
            for bits in (8, 4):
                _check_momentum(device, *shape[1:], bits)


def _check_linear(device: torch.device, tokens: int, inner: int, out: int, tscale: str) -> None:
    """Decoded weights, forward, and the gradient of the input."""
    where = f"linear {tokens} x {inner} -> {out} {tscale}"
    layer = TernaryLinear(inner, out, tscale=tscale, device=device)
    layer.E.add_(torch.randint(-2, 3, layer.E.shape, device=device, dtype=torch.int8))
    packed, exponent = layer.T_packed.detach(), layer.E.detach()
    weight_OI = codec_reference.decode(packed.cpu(), exponent.cpu(), inner, layer.group, torch.float32)
    decoded_OI = trit_codec.ternary_decode(packed, exponent, inner, layer.group, torch.float32)
    _same(f"{where}, decoded", decoded_OI, weight_OI)
    optimizer = VoteOptimizer(layer)  # so that the forward is that of training
    x_NI = torch.randn(tokens, inner, device=device).requires_grad_()
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        y_NO = layer(x_NI)
    dy_NO = torch.randn(tokens, out).to(torch.bfloat16)
    y_NO.backward(dy_NO.to(device=device, dtype=y_NO.dtype))
    optimizer.detach()
    expected_NO, _, _, rstd_N1 = activations.linear(
        x_NI.detach().cpu(), weight_OI, layer.input_norm, True, torch.float32
    )
    _near(f"{where}, forward", y_NO, expected_NO, inner)
    dx_NI = activations.linear_backward(
        dy_NO.float(), x_NI.detach().cpu(), rstd_N1, weight_OI, layer.input_norm
    )
    assert x_NI.grad is not None
    _near(f"{where}, gradient of the input", x_NI.grad, dx_NI, out)


def _check_update(device: torch.device, inner: int, out: int) -> None:
    """Votes, flips and repacking, bit by bit."""
    trits = torch.randint(-1, 2, (2, out, inner), dtype=torch.int8)
    packed = trit_codec.trit_pack(trits)
    accumulator = torch.randint(-60, 61, trits.shape, dtype=torch.int8)
    direction, active = torch.randn(trits.shape), torch.tensor([True, True]).view(2, 1, 1)
    keys = torch.randint(-(1 << 31), 1 << 31, (2, 2), dtype=torch.int64).to(torch.int32)
    rule: Any = (30.0, 128, 64, 63, False)  # step, span, threshold, rail, reset
    bits = random_reference.random_bits(keys, out * inner).view(trits.shape)
    expected = (packed.clone(), accumulator.clone())
    flips = update_reference.update(*expected, direction, bits, active, *rule)
    ours = (packed.to(device, copy=True), accumulator.to(device, copy=True))
    our_flips = state_update_drawn(*ours, direction.to(device), keys.to(device), active.to(device), *rule)
    for name, own, reference in zip(
        ("trits", "accumulators", "flips"), (*ours, our_flips), (*expected, flips), strict=True
    ):
        _same(f"state update of {out} x {inner}, {name}", own, reference)


def _check_momentum(device: torch.device, inner: int, out: int, bits: int) -> None:
    """Codes and exponents after two steps, bit by bit."""
    keys = torch.randint(-(1 << 31), 1 << 31, (1, 2), dtype=torch.int64).to(torch.int32)
    zero = torch.zeros((1, out, inner))
    codes, exponent = momentum_reference.encode(zero, torch.zeros(zero.shape, dtype=torch.int32), bits)
    ours, expected = (codes.to(device, copy=True), exponent.to(device, copy=True)), (codes, exponent)
    active = torch.ones((1, 1, 1), dtype=torch.bool)
    placed = (keys.to(device), active.to(device))
    draws = random_reference.random_bits(keys, out * inner).view(zero.shape)
    for _ in range(2):
        gradient = torch.randn(zero.shape)
        momentum_reference.fold(gradient, *expected, draws, active, bits, 0.9, 0.95)
        momentum_fold_drawn(gradient.to(device), *ours, *placed, bits, 0.9, 0.95)
    for name, own, reference in zip(("codes", "exponents"), ours, expected, strict=True):
        _same(f"{bits}-bit momentum of {out} x {inner}, {name}", own, reference)


def _same(what: str, own: Tensor, reference: Tensor) -> None:
    if own.dtype != reference.dtype or not torch.equal(own.cpu(), reference):
        raise ParityError(f"{what}: differs from the reference")


def _near(what: str, own: Tensor, reference: Tensor, terms: int) -> None:
    allowed = BF16_PRECISION if own.is_cuda else FP32_EPS * terms**0.5
    error = float((own.detach().cpu().double() - reference.double()).norm() / reference.double().norm())
    if not error <= allowed:
        raise ParityError(f"{what}: differs from the reference by {error:.2e}, allowed is {allowed:.2e}")
