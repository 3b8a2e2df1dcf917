"""Triton kernels against the reference: on a GPU, elsewhere under Triton's interpreter.

Integers are compared bit by bit, in memory that is poisoned and has guard bands around it.
"""

import os

import pytest
import torch

from arbitor.ops.random_bits import random_bits
from arbitor.ops.trit_codec import trit_pack
from arbitor.ternary import VoteOptimizer
from testing.small_net import SmallNet, train

pytest.importorskip("triton", reason="needs Triton, which the extra `test` installs on Linux")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(1, 1, 1), (2, 3, 40), (1, 7, 161), (3, 5, 320), (1, 2, 33), (2, 31, 96), (1, 1, 479)]
GUARD = 64

each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


@pytest.fixture
def triton_backend(monkeypatch):
    monkeypatch.setenv("ARB_TERNARY_BACKEND", "triton")


class Guarded:
    """Tensors that lie between guard bands, which must stay as they are."""

    def __init__(self):
        self.bands = []

    def __call__(self, tensor):
        size = tensor.numel()
        storage = torch.full((size + 2 * GUARD,), 77, dtype=tensor.dtype, device=DEVICE)
        self.bands += [(storage, slice(0, GUARD)), (storage, slice(GUARD + size, None))]
        inner = storage[GUARD : GUARD + size].view(tensor.shape)
        inner.copy_(tensor)
        return inner

    def check(self):
        for storage, band in self.bands:
            assert (storage[band] == 77).all(), "a kernel wrote outside of its tensor"


def keys(n):
    return torch.randint(-(2**31), 2**31 - 1, (n, 2), dtype=torch.int32)


def moved(*tensors):
    return [tensor.to(DEVICE) for tensor in tensors]


@each_shape
@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize(
    ("span", "threshold", "rail", "reset"), [(128, 64, 63, False), (128, 80, 64, False), (64, 32, 32, True)]
)
def test_state_update_equals_the_reference(shape, by_row, span, threshold, rail, reset):
    from arbitor.ops.state_update import reference, triton

    torch.manual_seed(hash(shape) % 1000)
    n, rows, columns = shape
    guarded = Guarded()
    packed = trit_pack(torch.randint(-1, 2, shape, dtype=torch.int8))
    accumulator = torch.randint(-127, 128, shape, dtype=torch.int8)
    direction = torch.randn(shape) * torch.exp2(torch.randint(-3, 12, (n, rows, 1)).float())
    stream = keys(n)
    active = torch.rand(n, rows if by_row else 1, 1) > 0.3
    bits = random_bits(stream, rows * columns).view(shape)
    step, *constants = torch.tensor(12.8), span, threshold, rail, reset
    expected = packed.clone(), accumulator.clone()
    flips = reference.update(*expected, direction, bits, active, step, *constants)
    found = guarded(packed), guarded(accumulator)
    given = moved(direction, stream, active, step)
    found_flips = triton.update(*found, *given, *constants)
    assert torch.equal(found[0].cpu(), expected[0])
    assert torch.equal(found[1].cpu(), expected[1])
    assert torch.equal(found_flips.cpu(), flips)
    guarded.check()


@pytest.mark.parametrize("transposed", [False, True])
def test_state_update_of_some_rows_of_larger_matrices(transposed):
    from arbitor.ops.random_bits import skip
    from arbitor.ops.state_update import reference, triton

    torch.manual_seed(1)
    n, rows, columns = 2, 9, 70
    packed = trit_pack(torch.randint(-1, 2, (n, rows, columns), dtype=torch.int8))
    accumulator = torch.randint(-127, 128, (n, rows, columns), dtype=torch.int8)
    direction, stream, active = torch.randn(n, rows, columns), keys(n), torch.ones(n, 1, 1, dtype=torch.bool)
    bits = random_bits(stream, rows * columns).view(direction.shape)
    expected = packed.clone(), accumulator.clone()
    reference.update(*expected, direction, bits, active, torch.tensor(12.8), 128, 64, 63, False)
    packed, accumulator, direction, stream, active, step = moved(
        packed, accumulator, direction, stream, active, torch.tensor(12.8)
    )
    if transposed:  # as the orthogonalisation of a tall matrix leaves it
        direction = direction.mT.contiguous().mT
    for part in (slice(0, 4), slice(4, 9)):
        triton.update(
            packed[:, part], accumulator[:, part], direction[:, part], skip(stream, part.start * columns),
            active, step, 128, 64, 63, False,
        )  # fmt: skip
    assert torch.equal(packed.cpu(), expected[0])
    assert torch.equal(accumulator.cpu(), expected[1])


@each_shape
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize("group", [32, 16])
def test_momentum_equals_the_reference_over_several_steps(shape, bits, by_row, group):
    from arbitor.ops.momentum import reference, triton

    torch.manual_seed(hash(shape) % 1000)
    n, rows, columns = shape
    if bits == 8:
        codes = torch.zeros(shape, dtype=torch.int8)
    else:
        codes = torch.full((n, rows, -(-columns // 2)), 0x88, dtype=torch.uint8)
    exponent = torch.zeros((n, rows, -(-columns // group)), dtype=torch.int16)
    guarded = Guarded()
    expected = codes.clone(), exponent.clone()
    found = guarded(codes), guarded(exponent)
    for _ in range(3):
        gradient = torch.randn(shape) * torch.exp2(torch.randint(-40, 20, (n, rows, 1)).float())
        stream = keys(n)
        active = torch.rand(n, rows if by_row else 1, 1) > 0.3
        random = random_bits(stream, rows * columns).view(shape)
        direction = reference.fold(gradient, *expected, random, active, bits, 0.9, 0.95)
        given = moved(gradient, stream, active)
        found_direction = triton.fold(given[0], *found, *given[1:], bits, 0.9, 0.95)
        assert torch.equal(found_direction.cpu(), direction)
        assert torch.equal(found[0].cpu(), expected[0])
        assert torch.equal(found[1].cpu(), expected[1])
    guarded.check()


@each_shape
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("group", [6, 32, 1000])
def test_decode_equals_the_reference(shape, dtype, group):
    from arbitor.ops.trit_codec import reference, triton

    torch.manual_seed(0)
    columns = shape[-1]
    group = min(group, columns)
    packed = trit_pack(torch.randint(-1, 2, shape, dtype=torch.int8))
    exponent = torch.randint(-62, 32, (*shape[:-1], -(-columns // group)), dtype=torch.int8)
    expected = reference.decode(packed, exponent, columns, group, dtype)
    found = triton.decode(*moved(packed, exponent), columns, group, dtype)
    assert torch.equal(found.cpu(), expected)


def test_decode_of_every_byte():
    from arbitor.ops.trit_codec import reference, triton

    packed = torch.arange(256, dtype=torch.uint8).view(8, 32)
    exponent = torch.zeros(8, 1, dtype=torch.int8)
    expected = reference.decode(packed, exponent, 160, 160, torch.float32)
    found = triton.decode(*moved(packed, exponent), 160, 160, torch.float32).cpu()
    assert expected.isnan().sum() == 5 * 13
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.nan_to_num(7), expected.nan_to_num(7))


@pytest.mark.parametrize(("tokens", "columns"), [(5, 40), (3, 1), (2, 9000), (4, 161), (0, 7)])
@pytest.mark.parametrize("input_norm", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_equal_the_reference(tokens, columns, input_norm, dtype):
    from arbitor.ops.activations import reference, triton

    if dtype == torch.bfloat16 and DEVICE == "cpu":
        pytest.skip("Triton's interpreter has no bf16 of its own")
    torch.manual_seed(0)
    x = (torch.randn(tokens, columns) * torch.exp2(torch.randint(-10, 10, (tokens, 1)).float())).to(dtype)
    codes, scale, rstd = reference.normalize_and_quantize(x.float(), input_norm, True)
    found = triton.quantize(*moved(x), input_norm)
    assert torch.equal(found[0].cpu(), codes.to(torch.int8))
    # Sums of `columns` squares, in another order.
    for mine, theirs in zip(found[1:], (scale, rstd), strict=True):
        torch.testing.assert_close(mine.cpu(), theirs, rtol=2**-23 * (2 + columns**0.5), atol=0)


def test_a_token_that_overflows_shows():
    from arbitor.ops.activations import triton

    x = torch.full((1, 5), 1e30)
    assert triton.quantize(*moved(x), True)[1].isnan().all()


@pytest.mark.parametrize(("tokens", "columns"), [(5, 40), (3, 1), (2, 9000), (4, 161)])
def test_norm_backward_equals_the_reference(tokens, columns):
    from arbitor.ops.activations import reference, triton

    torch.manual_seed(0)
    x, gradient = torch.randn(tokens, columns), torch.randn(tokens, columns)
    rstd = (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    expected = reference.norm_backward(gradient.clone(), x, rstd)
    found = triton.norm_backward(*moved(gradient, x, rstd)).cpu()
    error = (found - expected).norm() / gradient.norm()
    assert error <= 2**-23 * (4 + columns**0.5)


def test_a_model_trains_as_on_the_reference(triton_backend, monkeypatch):
    losses = []
    for backend in ("triton", "torch"):
        monkeypatch.setenv("ARB_TERNARY_BACKEND", backend)
        torch.manual_seed(0)
        net = SmallNet()
        losses.append(train(net, VoteOptimizer(net, lr=0.2), range(3)))
    # The codes' scales may differ in their last bit, and a vote with them.
    assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-5)
    assert losses[0][2] == pytest.approx(losses[1][2], rel=1e-2)
    assert losses[0][2] != losses[0][0]


def test_the_kernels_are_what_runs(triton_backend, monkeypatch):
    from arbitor.ops.state_update import triton

    seen = []
    update = triton.update
    monkeypatch.setattr(triton, "update", lambda *args: seen.append(args[0].shape) or update(*args))
    net = SmallNet().to(DEVICE)
    train(net, VoteOptimizer(net), range(1))
    assert sum(shape[0] for shape in seen) == 5, "every matrix was updated by the kernel"


def test_interpreter_is_on_where_there_is_no_gpu():
    assert DEVICE == "cuda" or os.environ["TRITON_INTERPRET"] == "1"
