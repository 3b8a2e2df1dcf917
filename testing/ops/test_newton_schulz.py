"""The kernels of the Newton-Schulz iteration against torch's products: on a GPU, or under the interpreter."""

import os

import pytest
import torch

from arbitor.ops.newton_schulz import newton_schulz, reference
from arbitor.ternary import update
from arbitor.ternary.rules import spectral
from testing.guards import DEVICE, moved

pytest.importorskip("triton", reason="needs Triton, which the extra `test` installs on Linux")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# The interpreter's products of bf16 are wrong.
DTYPE = torch.float32 if INTERPRETED else torch.bfloat16
TOLERANCE = 1e-5 if INTERPRETED else 2e-2
SHAPES = [(2, 40, 72), (1, 72, 40), (2, 8, 8), (1, 24, 24)]

each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """The interpreter runs one after the other."""
    from arbitor.ops.newton_schulz import triton

    monkeypatch.setattr(triton, "PROGRAMS", 2)
    monkeypatch.setattr(triton, "NUMBERS", 512)


def gaussian(shape, scale=1.0):
    generator = torch.Generator().manual_seed(sum(shape))
    return moved((torch.randn(shape, generator=generator) * scale).to(DTYPE))[0]


def largest(x):
    """Bits of the largest magnitude of each matrix."""
    return x.to(torch.float32).abs().amax(dim=(1, 2)).view(torch.int32)


def expected(x):
    wide = x.to(torch.float32)
    unit = reference.brought_to_unit_norm(wide, wide.abs().amax(dim=(1, 2), keepdim=True), torch.float32)
    return reference.newton_schulz(unit)


def error(found, wanted):
    return float((found.to(torch.float32) - wanted).norm() / wanted.norm())


def small(tile):
    """A tile in the same proportions that a small matrix has several of."""
    return tile._replace(rows=max(16, tile.rows // 8), columns=max(16, tile.columns // 8), depth=32)


@each_shape
@pytest.mark.parametrize("scale", [1.0, 2.0**-100, 2.0**100], ids=["1", "2^-100", "2^100"])
def test_kernels_equal_the_reference_whatever_the_magnitude(shape, scale):
    from arbitor.ops.newton_schulz import triton

    x = gaussian(shape)
    (scaled,) = moved(x * scale)
    found = triton.newton_schulz(scaled, largest(scaled), small(triton.SMALL_TILES[0]))
    assert error(found, expected(x)) <= TOLERANCE


def test_every_tile_of_the_kernels_equals_the_reference():
    from arbitor.ops.newton_schulz import triton

    every = (small(tile) for tile in (*triton.SMALL_TILES, *triton.LARGE_TILES))
    tiles = {(tile.rows, tile.columns): tile for tile in every}.values()
    for shape in ((1, 40, 56), (1, 56, 40)):
        x = gaussian(shape)
        wanted = expected(x)
        found = [triton.newton_schulz(x.clone(), largest(x), tile) for tile in tiles]
        assert max(error(one, wanted) for one in found) <= TOLERANCE


def test_kernels_keep_zeros_and_show_what_is_no_number():
    from arbitor.ops.newton_schulz import triton

    x = gaussian((3, 24, 40))
    wanted = expected(x[2:])
    x[0] = 0
    x[1, 3, 7] = torch.nan
    found = triton.newton_schulz(x, largest(x), small(triton.SMALL_TILES[0]))
    assert found[0].eq(0).all()
    assert found[1].isnan().any()
    assert error(found[2:], wanted) <= TOLERANCE


def test_matrices_that_kernels_cannot_multiply():
    """On a GPU in bf16, which costs what it costs on a CPU; sums are rounded elsewhere."""
    x = gaussian((2, 7, 5))
    wanted = expected(x)
    narrow = x.to(torch.bfloat16).cpu()
    magnitude = narrow.float().abs().amax(dim=(1, 2), keepdim=True)
    unit = reference.brought_to_unit_norm(narrow, magnitude, torch.bfloat16)
    costs = error(reference.newton_schulz(unit), wanted.cpu())
    assert 0 < costs < 0.03
    assert error(newton_schulz(x, largest(x)), wanted) <= (TOLERANCE if INTERPRETED else 2 * costs)


@pytest.mark.parametrize("shape", [(72, 40), (2, 40, 72)], ids=str)
def test_the_rule_takes_matrices_that_lie_turned_in_memory(shape, monkeypatch):
    from arbitor.ops.newton_schulz import triton

    monkeypatch.setattr("arbitor.ops.newton_schulz.iterates_narrow", lambda _: True)  # as on a GPU
    monkeypatch.setattr(triton, "can_multiply", lambda _: True)
    turned = gaussian(shape).to(torch.float32).mT
    before = turned.clone()
    assert error(spectral(turned), spectral(turned.contiguous())) <= TOLERANCE
    assert torch.equal(turned, before)


def test_matrices_are_brought_to_unit_norm_in_the_dtype_asked_for():
    """Also where their largest magnitude is wider than they are."""
    x = gaussian((2, 7, 5)).to(torch.bfloat16)
    magnitude = x.float().abs().amax(dim=(-2, -1), keepdim=True)
    brought = reference.brought_to_unit_norm(x, magnitude, x.dtype)
    assert brought.dtype == reference.newton_schulz(brought).dtype == torch.bfloat16
    assert brought.float().norm(dim=(-2, -1)).sub(1).abs().max() <= torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("bits", [0, 8, 4])
def test_gradients_beyond_bf16_move_trits_as_their_halves_do(bits, monkeypatch):
    """The largest numbers of fp32 would be infinite in bf16."""
    from arbitor.ops.momentum.reference import encode
    from arbitor.ops.trit_codec import trit_pack

    monkeypatch.setenv("ARB_TERNARY_BACKEND", "triton")
    monkeypatch.setattr(update, "iterates_narrow", lambda _: True)  # as on a GPU
    constants = update.VoteConstants(
        rule="spectral", span=128, threshold=64, rail=63, momentum_bits=bits, beta=0.9, votes_on_scales=False,
        scale_threshold=64, workspace_weights=1 << 20,
    )  # fmt: skip
    n, rows, columns = shape = (2, 24, 40)
    numbers = update.StepNumbers(torch.device(DEVICE))
    numbers.write(1, 40.0, 0.0, 0.0)
    gradient = gaussian(shape).to(torch.float32)
    gradient *= torch.finfo(torch.float32).max / gradient.abs().max()
    outcomes = []
    for factor in (0.5, 1.0):
        start = torch.zeros(shape, dtype=torch.int8)
        zeros = torch.zeros(shape), torch.zeros(shape, dtype=torch.int32)
        momentum = moved(*encode(*zeros, bits)) if bits else []
        batch = update.ApartBatch(
            packed=list(*moved(trit_pack(start))),
            accumulator=list(*moved(start)),
            momentum=list(zip(*momentum, strict=True)),
            exponent=torch.zeros(n, rows, 1, dtype=torch.int8, device=DEVICE),
            group=columns,
            keys=torch.arange(2 * n, dtype=torch.int32, device=DEVICE).view(n, 2),
            numbers=numbers,
        )
        active = torch.ones(n, 1, 1, dtype=torch.bool, device=DEVICE)
        flips = update.update_apart(batch, list(gradient * factor), active, constants)
        assert flips.gt(0).all()
        outcomes.append(torch.cat([flips, *(part.flatten() for part in (*batch.packed, *batch.accumulator))]))
    assert torch.equal(*outcomes)


def test_large_tiles_are_for_gpus_with_room_for_them(monkeypatch):
    from arbitor.ops.newton_schulz import triton

    for room, large in ((232_448, True), (101_376, False)):  # of an H100 and of a GPU for one's desk
        monkeypatch.setattr(triton, "shared_memory", lambda _, room=room: room)
        tiles = triton.LARGE_TILES if large else triton.SMALL_TILES
        assert triton._tile(960, torch.device("cuda")) == tiles[0]
        assert triton._tile(320, torch.device("cuda")) == triton.SMALL_TILES[0]
