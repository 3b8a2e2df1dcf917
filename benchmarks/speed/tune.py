"""Times every configuration of the kernels of single operations, so that the quickest can be chosen.

    python -m benchmarks.speed.tune
    python -m benchmarks.speed.tune --only "state update" "few tokens"

A configuration is first compared with the reference on a small case. One that does not compile, or is wrong,
is written down with what went wrong, and the others are timed. Rows go to
`benchmarks/results/tune-<device>.csv`; shares are of the bandwidth of a copy, or of the peak of a matrix
product in bf16, in the same run.

Shape letters: N tokens, I in, O out, P packed bytes a row, G groups, n matrices.
"""

import argparse
import datetime
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from arbitor.errors import UserError
from arbitor.ops import trit_codec
from arbitor.ops.int8_matmul import reference as matmul_reference
from arbitor.ops.momentum import reference as momentum_reference
from arbitor.ops.random_bits import reference as random_reference
from arbitor.ops.state_update import reference as update_reference
from arbitor.train.device import Device, resolve_device
from benchmarks.common import RESULTS, commit, device_name, slug
from benchmarks.learning.table import Table
from benchmarks.speed.clock import copy_bandwidth, matmul_peak
from benchmarks.speed.kernels import graphed_seconds

COLUMNS = (
    "kernel", "shape", "configuration", "microseconds", "of", "share", "problem", "device", "date", "commit",
)  # fmt: skip
KEY = ("kernel", "shape", "configuration", "device")
COMPILERS = 8  # at once; each runs its passes and the assembler outside of Python's lock
FEW_TOKENS = (1, 8, 16, 32)
LARGE, SMALL = (16384, 16384), (2048, 2048)  # O, I
CACHE_BYTES = 1 << 28  # matrices that take turns are larger than this together, so that no cache holds them
MANY = (4096, 8192, 8192)  # N, I, O
SOME = (512, 4096, 4096)
UPDATE = (8, 4096, 4096)
# Compared with the reference; divides by 16 as UPDATE does, so that nothing is compiled twice.
SMALL_STATE = (2, 48, 512)
RULE: Any = {"span": 128, "threshold": 64, "rail": 63, "reset": False}


@dataclass(frozen=True, slots=True)
class Candidate:
    """A configuration of a kernel.

    Attributes:
        kernel: name of what is computed.
        shape: sizes that it is timed on.
        configuration: as text.
        right: whether it equals the reference, on a small case.
        work: makes what is timed; takes memory only when called, and gives the number of calls in it too.
        of: "bandwidth" or "matmul".
        amount: bytes or operations of a call.
    """

    kernel: str
    shape: str
    configuration: str
    right: Callable[[], bool]
    work: Callable[[], tuple[Callable[[], object], int]]
    of: str
    amount: float


def few_tokens(device: torch.device) -> Iterator[Candidate]:
    """Products of few tokens with packed trits, of one exponent a row."""
    from arbitor.ops.ternary_linear import triton

    for rows, columns in (LARGE, SMALL):
        packed = rows * trit_codec.packed_width(columns)
        for tokens, tile in itertools.product(FEW_TOKENS, triton.TILES):
            if tile.tokens != max(8, tokens):
                continue
            yield Candidate(
                "few tokens",
                f"{tokens} x {columns} -> {rows}",
                str(tuple(tile)),
                partial(_few_tokens_right, device, tokens, tile),
                partial(_few_tokens_work, device, tokens, rows, columns, tile),
                "bandwidth",
                packed + rows + tokens * (columns + 2 * rows),
            )


def many_tokens(device: torch.device) -> Iterator[Candidate]:
    """Products of int8 codes and int8 weights."""
    from arbitor.ops.int8_matmul import triton

    for sizes, tiles in ((MANY, triton.MANY_TILES), (SOME, triton.SOME_TILES)):
        tokens, columns, rows = sizes
        for tile in tiles:
            yield Candidate(
                "int8 product",
                f"{tokens} x {columns} -> {rows}",
                str(tuple(tile)),
                partial(_matmul_right, device, tile),
                partial(_matmul_work, device, *sizes, tile),
                "matmul",
                2.0 * tokens * columns * rows,
            )


def decoding(device: torch.device) -> Iterator[Candidate]:
    """Decoding to bf16, with one exponent a row and with one for every 32 weights; to int8; and codes."""
    from arbitor.ops.trit_codec import triton

    tokens, columns, rows = MANY
    packed = rows * trit_codec.packed_width(columns)
    shape = f"{rows} x {columns}"
    for group, tile in itertools.product((columns, 32), triton.TILES):
        yield Candidate(
            "decode to bf16" + (", groups" if group == 32 else ""), shape, str(tile),
            partial(_decode_right, device, group, tile),
            partial(_decode_work, device, rows, columns, group, tile),
            "bandwidth", packed + rows * columns * 2 + rows * columns // group,
        )  # fmt: skip
    for group in (columns, 32):
        yield Candidate(
            "decode to int8" + (", groups" if group == 32 else ""), shape, "only one",
            partial(_integers_right, device, group),
            partial(_integers_work, device, rows, columns, group),
            "bandwidth", packed + rows * columns + rows * columns // group,
        )  # fmt: skip
    for count, size in ((1, LARGE[1]), (tokens, columns)):
        yield Candidate(
            "norm and codes", f"{count} x {size}", "only one", partial(_codes_right, device),
            partial(_codes_work, device, count, size), "bandwidth", count * size * 3,
        )  # fmt: skip


def state_update(device: torch.device) -> Iterator[Candidate]:
    """Votes, flips and repacking."""
    from arbitor.ops.state_update import triton

    matrices, rows, columns = UPDATE
    moved = matrices * rows * (2 * trit_codec.packed_width(columns) + 6 * columns)
    for tile in triton.TILES:
        yield Candidate(
            "state update", f"{matrices} x {rows} x {columns}", str(tuple(tile)),
            partial(_update_right, device, tile), partial(_update_work, device, tile),
            "bandwidth", moved,
        )  # fmt: skip


def momentum(device: torch.device) -> Iterator[Candidate]:
    """Folding gradients into momentum of 8 and of 4 bits."""
    from arbitor.ops.momentum import triton

    matrices, rows, columns = UPDATE
    for bits, tile in itertools.product((8, 4), triton.TILES):
        yield Candidate(
            f"momentum of {bits} bits", f"{matrices} x {rows} x {columns}", str(tile),
            partial(_momentum_right, device, bits, tile), partial(_momentum_work, device, bits, tile),
            "bandwidth", matrices * rows * columns * (8 + bits / 4 + 4 / momentum_reference.GROUP),
        )  # fmt: skip


KERNELS: dict[str, Callable[[torch.device], Iterator[Candidate]]] = {
    "state update": state_update,
    "momentum": momentum,
    "few tokens": few_tokens,
    "decoding": decoding,
    "many tokens": many_tokens,
}


def measure(device: Device, kernels: Sequence[str], table: Table) -> None:
    """Compare and time the configurations of some kernels; a row for each, and a line for the quickest."""
    bandwidth, peak = copy_bandwidth(device), matmul_peak(device)
    print(f"copy {bandwidth / 1e12:.2f} TB/s, bf16 product {peak / 1e12:.0f} TFLOP/s", flush=True)
    candidates = [candidate for kernel in kernels for candidate in KERNELS[kernel](device.device)]
    with ThreadPoolExecutor(COMPILERS) as pool:
        problems = list(pool.map(_problem, candidates))
    best: dict[tuple[str, str], tuple[float, str]] = {}
    for candidate, known in zip(candidates, problems, strict=True):
        seconds, problem = (0.0, known) if known else _seconds(candidate, device)
        limit = bandwidth if candidate.of == "bandwidth" else peak
        share = candidate.amount / seconds / limit if seconds else 0.0
        table.put(
            {
                "kernel": candidate.kernel,
                "shape": candidate.shape,
                "configuration": candidate.configuration,
                "microseconds": format(seconds * 1e6, ".4g") if seconds else "",
                "of": candidate.of,
                "share": format(share, ".4g") if seconds else "",
                "problem": problem,
                "device": device_name(device.device),
                "date": datetime.date.today().isoformat(),
                "commit": commit(),
            }
        )
        what = f"{seconds * 1e6:.1f} us, {share:.3f} of {candidate.of}" if seconds else problem
        print(f"{candidate.kernel}, {candidate.shape}, {candidate.configuration}: {what}", flush=True)
        key = candidate.kernel, candidate.shape
        if seconds and (key not in best or seconds < best[key][0]):
            best[key] = seconds, f"{candidate.configuration}, {share:.3f} of {candidate.of}"
    for (kernel, shape), (_, text) in best.items():
        print(f"quickest for {kernel}, {shape}: {text}")


def _problem(candidate: Candidate) -> str:
    """What is wrong with a candidate, in one line; empty if nothing is."""
    try:
        return "" if candidate.right() else "differs from the reference"
    except Exception as error:  # whatever the compiler or the driver says; the other candidates go on
        return _line(error)


def _seconds(candidate: Candidate, device: Device) -> tuple[float, str]:
    """Seconds of a call, or 0 and the problem."""
    try:
        work, calls = candidate.work()
        return graphed_seconds(work, device) / calls, ""
    except Exception as error:
        return 0.0, _line(error)


def _line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:200]


def _dtype(device: torch.device) -> torch.dtype:
    """Of inputs and results: bf16, which Triton's interpreter does not have."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def _generator() -> torch.Generator:
    """Each case has its own, since cases are made by several threads."""
    return torch.Generator().manual_seed(0)


def _on(device: torch.device, *tensors: Tensor) -> Any:
    """The tensors there, as arguments; copies."""
    return tuple(tensor.to(device, copy=True) for tensor in tensors)


def _random_bytes(device: torch.device, *shape: int) -> Tensor:
    """uint8: of those that packing produces."""
    legal = torch.arange(256, dtype=torch.uint8, device=device)[trit_codec.legal_bytes(device)]
    return legal[torch.randint(len(legal), shape, dtype=torch.int32, device=device)]


def _small_case(tokens: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """codes int8 [N, I], trits int8 [O, I], scale fp32 [N, 1], exponents int8 [O, 1] on the CPU."""
    generator = _generator()
    codes = torch.randint(-127, 128, (tokens, 1664), dtype=torch.int8, generator=generator)
    trits = torch.randint(-1, 2, (208, 1664), dtype=torch.int8, generator=generator)
    exponent = torch.randint(-9, 3, (208, 1), dtype=torch.int8, generator=generator)
    return codes, trits, torch.rand(tokens, 1, generator=generator), exponent


def _few_tokens_right(device: torch.device, tokens: int, tile: Any) -> bool:
    from arbitor.ops.ternary_linear import triton

    codes, trits, scale, exponent = _small_case(tokens)
    expected = matmul_reference.int8_matmul(
        codes, trits, scale, torch.exp2(exponent[:, 0].float()), _dtype(device)
    )
    codes, packed, exponent, scale = _on(device, codes, trit_codec.trit_pack(trits), exponent, scale)
    found = triton.few_tokens(codes, packed, exponent, scale, _dtype(device), tile=tile)
    return torch.equal(found.cpu(), expected)


def _few_tokens_work(
    device: torch.device, tokens: int, rows: int, columns: int, tile: Any
) -> tuple[Callable[[], object], int]:
    from arbitor.ops.ternary_linear import triton

    width = trit_codec.packed_width(columns)
    turns = -(-CACHE_BYTES // (rows * width))
    packed = _random_bytes(device, turns, rows, width)
    exponent = torch.zeros((rows, 1), dtype=torch.int8, device=device)
    codes = torch.randint(-127, 128, (tokens, columns), dtype=torch.int8, device=device)
    scale, sums = torch.rand((tokens, 1), device=device), codes.sum(dim=1, dtype=torch.int32)

    def work() -> None:
        for part in packed:
            triton.few_tokens(codes, part, exponent, scale, _dtype(device), sums, tile)

    return work, turns


def _matmul_right(device: torch.device, tile: Any) -> bool:
    from arbitor.ops.int8_matmul import triton

    codes, trits, scale, exponent = _small_case(400)
    row_scale = torch.exp2(exponent[:, 0].float())
    expected = matmul_reference.int8_matmul(codes, trits, scale, row_scale, _dtype(device))
    codes, trits, scale, row_scale = _on(device, codes, trits, scale, row_scale)
    found = triton.int8_matmul(codes, trits, scale, row_scale, _dtype(device), tile)
    return torch.equal(found.cpu(), expected)


def _matmul_work(
    device: torch.device, tokens: int, columns: int, rows: int, tile: Any
) -> tuple[Callable[[], object], int]:
    from arbitor.ops.int8_matmul import triton

    codes = torch.randint(-127, 128, (tokens, columns), dtype=torch.int8, device=device)
    weight = torch.randint(-1, 2, (rows, columns), dtype=torch.int8, device=device)
    scale, row_scale = torch.rand((tokens, 1), device=device), torch.rand(rows, device=device)
    return lambda: triton.int8_matmul(codes, weight, scale, row_scale, _dtype(device), tile), 1


def _grouped_case(group: int) -> tuple[Tensor, Tensor, int, int]:
    """packed [O, P], exponents [O, G], I and the group, on the CPU."""
    _, trits, _, exponent = _small_case(1)
    trits, exponent, columns = trits[:16, :1536], exponent[:16], 1536
    if group == 32:
        exponent = torch.randint(-5, 2, (len(trits), columns // 32), dtype=torch.int8, generator=_generator())
    return trit_codec.trit_pack(trits), exponent, columns, min(group, columns)


def _random_state(device: torch.device, rows: int, columns: int, group: int) -> tuple[Tensor, Tensor]:
    packed = _random_bytes(device, rows, trit_codec.packed_width(columns))
    return packed, torch.zeros((rows, -(-columns // group)), dtype=torch.int8, device=device)


def _decode_right(device: torch.device, group: int, tile: int) -> bool:
    from arbitor.ops.trit_codec import reference, triton

    packed, exponent, columns, group = _grouped_case(group)
    expected = reference.decode(packed, exponent, columns, group, _dtype(device))
    found = triton.decode(packed.to(device), exponent.to(device), columns, group, _dtype(device), tile=tile)
    return torch.equal(found.cpu(), expected)


def _decode_work(
    device: torch.device, rows: int, columns: int, group: int, tile: int
) -> tuple[Callable[[], object], int]:
    from arbitor.ops.trit_codec import triton

    state = _random_state(device, rows, columns, group)
    return lambda: triton.decode(*state, columns, group, _dtype(device), tile=tile), 1


def _integers_right(device: torch.device, group: int) -> bool:
    from arbitor.ops.trit_codec import reference, triton

    packed, exponent, columns, group = _grouped_case(group)
    expected = reference.decode(packed, exponent, columns, group, torch.float64)
    found, scale, _ = triton.decode_integers(packed.to(device), exponent.to(device), columns, group)
    return torch.equal(found.cpu() * scale.cpu()[:, None].double(), expected)


def _integers_work(
    device: torch.device, rows: int, columns: int, group: int
) -> tuple[Callable[[], object], int]:
    from arbitor.ops.trit_codec import triton

    state = _random_state(device, rows, columns, group)
    return lambda: triton.decode_integers(*state, columns, group), 1


def _codes_right(device: torch.device) -> bool:
    from arbitor.ops.activations import reference, triton

    x = torch.randn(3, 1664, generator=_generator()).to(_dtype(device))
    codes, _, _ = reference.normalize_and_quantize(x.float(), True, True)
    return torch.equal(triton.quantize(x.to(device), True)[0].cpu(), codes.to(torch.int8))


def _codes_work(device: torch.device, tokens: int, columns: int) -> tuple[Callable[[], object], int]:
    from arbitor.ops.activations import triton

    x = torch.randn(tokens, columns, device=device, dtype=_dtype(device))
    sums = torch.empty((tokens, 1), dtype=torch.int32, device=device) if tokens == 1 else None
    return lambda: triton.quantize(x, True, sums=sums), 1


def _update_right(device: torch.device, tile: Any) -> bool:
    from arbitor.ops.state_update import triton

    generator, shape = _generator(), SMALL_STATE
    trits = torch.randint(-1, 2, shape, dtype=torch.int8, generator=generator)
    state = trit_codec.trit_pack(trits), torch.randint(-60, 61, shape, dtype=torch.int8, generator=generator)
    direction, keys = torch.randn(shape, generator=generator), torch.tensor([[3, -7], [1 << 30, 5]]).int()
    active, step = torch.ones((2, 1, 1), dtype=torch.bool), torch.tensor(30.0)
    bits = random_reference.random_bits(keys, shape[1] * shape[2]).view(shape)
    packed, accumulator = _on(device, *state)
    flips = update_reference.update(*state, direction, bits, active, step, **RULE)
    direction, keys, active, step = _on(device, direction, keys, active, step)
    found = triton.update(packed, accumulator, direction, keys, active, step, **RULE, tile=tile)
    return all(
        torch.equal(a.cpu(), b) for a, b in zip((packed, accumulator, found), (*state, flips), strict=True)
    )


def _update_work(device: torch.device, tile: Any) -> tuple[Callable[[], object], int]:
    from arbitor.ops.state_update import triton

    matrices, rows, columns = UPDATE
    packed = _random_bytes(device, matrices, rows, trit_codec.packed_width(columns))
    accumulator = torch.randint(-60, 61, UPDATE, dtype=torch.int8, device=device)
    direction = torch.randn(UPDATE, device=device)
    keys = torch.randint(0, 1 << 30, (matrices, 2), dtype=torch.int32, device=device)
    active = torch.ones((matrices, 1, 1), dtype=torch.bool, device=device)
    step = torch.tensor(6.4, device=device)
    return lambda: triton.update(packed, accumulator, direction, keys, active, step, **RULE, tile=tile), 1


def _momentum_right(device: torch.device, bits: int, tile: int) -> bool:
    from arbitor.ops.momentum import triton

    generator, shape = _generator(), SMALL_STATE
    gradient, keys = torch.randn(shape, generator=generator), torch.tensor([[3, -7], [1 << 30, 5]]).int()
    random = random_reference.random_bits(keys, shape[1] * shape[2]).view(shape)
    codes, exponent = momentum_reference.encode(torch.randn(shape, generator=generator), random, bits)
    our_codes, our_exponent = _on(device, codes, exponent)
    active = torch.ones((2, 1, 1), dtype=torch.bool)
    expected = momentum_reference.fold(gradient, codes, exponent, random, active, bits, 0.9, 0.95)
    gradient, keys, active = _on(device, gradient, keys, active)
    found = triton.fold(gradient, our_codes, our_exponent, keys, active, bits, 0.9, 0.95, tile)
    both = zip((found, our_codes, our_exponent), (expected, codes, exponent), strict=True)
    return all(torch.equal(ours.cpu(), reference) for ours, reference in both)


def _momentum_work(device: torch.device, bits: int, tile: int) -> tuple[Callable[[], object], int]:
    from arbitor.ops.momentum import triton

    matrices, rows, columns = UPDATE
    gradient = torch.randn(UPDATE, device=device)
    width, dtype = (columns, torch.int8) if bits == 8 else (columns // 2, torch.uint8)
    codes = torch.randint(17, 120, (matrices, rows, width), dtype=dtype, device=device)
    exponent = torch.zeros((matrices, rows, columns // 32), dtype=torch.int16, device=device)
    keys = torch.randint(0, 1 << 30, (matrices, 2), dtype=torch.int32, device=device)
    active = torch.ones((matrices, 1, 1), dtype=torch.bool, device=device)
    return lambda: triton.fold(gradient, codes, exponent, keys, active, bits, 0.9, 0.95, tile), 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Time the configurations; exit code 2: bad arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed.tune", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--device", default="cuda", help="a GPU")
    parser.add_argument("--only", nargs="+", default=list(KERNELS), choices=KERNELS, help="of these")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the CSV file")
    options = parser.parse_args(arguments)
    try:
        device = resolve_device(options.device)
        if not device.is_cuda:
            raise UserError(f"the kernels run on a GPU, this is {device.device.type}")
    except UserError as error:
        print(f"benchmarks.speed.tune: error: {error}", file=sys.stderr)
        return 2
    table = Table(options.results / f"tune-{slug(device.device)}.csv", COLUMNS, KEY)
    measure(device, options.only, table)
    print(f"written to {table.path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
