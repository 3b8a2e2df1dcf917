"""Goals of single operations: a linear with few and with many rows, and the state update.

Shape letters: N rows, I in, O out, n matrices.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence

import torch

from arbitor.ops.state_update import state_update_drawn
from arbitor.ternary import TernaryLinear
from arbitor.train.device import Device
from benchmarks.speed.clock import copy_bandwidth, seconds_of

FEW_ROWS, FEW_ROWS_SIZE = (1, 8), 16384
MANY_ROWS, MANY_ROWS_SIZE = 4096, 8192
# A matrix of 16384^2 trits fits into the cache of a large GPU, so several take turns.
LAYERS_IN_TURN = 4
UPDATE_SHAPE = (8, 4096, 4096)
CALLS = 4


@torch.no_grad()
def few_rows(device: Device, size: int = FEW_ROWS_SIZE) -> Mapping[str, float]:
    """G1: ternary linears of size x size on 1 and 8 rows against a copy and against `torch.mm` in bf16."""
    bandwidth = copy_bandwidth(device)
    layers = [TernaryLinear(size, size, device=device.device) for _ in range(LAYERS_IN_TURN)]
    dense = [
        torch.randn(size, size, device=device.device, dtype=torch.bfloat16) for _ in range(LAYERS_IN_TURN)
    ]
    figures = {}
    for rows in FEW_ROWS:
        x_NI = torch.randn(rows, size, device=device.device, dtype=torch.bfloat16)
        ours = _in_turn(layers, x_NI, device)
        theirs = _each(dense, lambda weight, x_NI=x_NI: torch.mm(x_NI, weight.t()), device)
        moved = layers[0].T_packed.nbytes + layers[0].E.nbytes + 2 * x_NI.nbytes
        plural = "" if rows == 1 else "s"
        figures[f"share of copy bandwidth, {rows} row{plural}"] = moved / ours / bandwidth
        figures[f"speed over torch.mm bf16, {rows} row{plural}"] = theirs / ours
    return figures


@torch.no_grad()
def many_rows(device: Device, rows: int = MANY_ROWS, size: int = MANY_ROWS_SIZE) -> Mapping[str, float]:
    """G2: the forward of ternary linears on many rows over the time of `torch.mm` in bf16."""
    x_NI = torch.randn(rows, size, device=device.device, dtype=torch.bfloat16)
    weight = torch.randn(size, size, device=device.device, dtype=torch.bfloat16)
    theirs = _each([weight], lambda weight: torch.mm(x_NI, weight.t()), device)
    return {
        f"time over torch.mm bf16, {tscale}": _in_turn(
            [TernaryLinear(size, size, tscale=tscale, device=device.device)], x_NI, device
        )
        / theirs
        for tscale in ("ROW", "T32")
    }


@torch.no_grad()
def state_update(device: Device, shape: tuple[int, int, int] = UPDATE_SHAPE) -> Mapping[str, float]:
    """G6: bytes that votes, flips and repacking must move, over their time, as a share of a copy's."""
    matrices, out, inner = shape
    bandwidth = copy_bandwidth(device)
    layers = [TernaryLinear(inner, out, device=device.device) for _ in range(matrices)]
    packed = torch.stack([layer.T_packed for layer in layers])
    accumulator = torch.randint(-60, 61, shape, dtype=torch.int8, device=device.device)
    direction = torch.randn(shape, device=device.device)
    keys = torch.randint(0, 1 << 30, (matrices, 2), dtype=torch.int32, device=device.device)
    active = torch.ones((matrices, 1, 1), dtype=torch.bool, device=device.device)

    def update() -> object:
        return state_update_drawn(packed, accumulator, direction, keys, active, 6.4, 128, 64, 63, False)

    moved = 2 * packed.nbytes + 2 * accumulator.nbytes + direction.nbytes
    return {"share of copy bandwidth": moved / graphed_seconds(update, device) / bandwidth}


def _in_turn(layers: Sequence[TernaryLinear], x_NI: torch.Tensor, device: Device) -> float:
    """Seconds of one forward."""
    with torch.autocast(device.device.type, torch.bfloat16):
        return _each(layers, lambda layer: layer(x_NI), device)


def _each(
    parts: Sequence[torch.Tensor | TernaryLinear], work: Callable[..., object], device: Device
) -> float:
    """Seconds of `work` on one of the parts, which take turns."""
    rounds = list(itertools.chain.from_iterable([parts] * (LAYERS_IN_TURN // len(parts))))

    def all_of_them() -> None:
        for part in rounds:
            work(part)

    return graphed_seconds(all_of_them, device) / len(rounds)


def graphed_seconds(work: Callable[[], object], device: Device) -> float:
    """Seconds of `work`; on a GPU of its replay as a CUDA graph, so that Python's overhead does not count.

    What cannot be captured is timed as it is, and a line says so.
    """
    if not device.is_cuda:
        return seconds_of(work, device)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            work()
    except RuntimeError as error:
        print(f"not captured as a CUDA graph, so timed with its launches: {str(error).splitlines()[0]}")
        torch.cuda.synchronize()
        return seconds_of(work, device, calls=CALLS)
    return seconds_of(graph.replay, device, calls=CALLS)
