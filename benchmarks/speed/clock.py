"""Times, and the limits of the device that figures are shares of: copy bandwidth and matmul peak."""

import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from arbitor.train.device import Device

COPY_BYTES = {"cuda": 1 << 30, "cpu": 1 << 27}
PEAK_SIZE = {"cuda": 8192, "cpu": 1024}
PEAK_DTYPE = {"cuda": torch.bfloat16, "cpu": torch.float32}  # many CPUs do bf16 a hundred times slower


def seconds_of(
    work: Callable[[], object], device: Device, *, warmup: int = 3, repeats: int = 10, calls: int = 1
) -> float:
    """Median over `repeats` of the time of `work`, of `calls` calls in a row; the device is idle between."""
    for _ in range(warmup):
        work()
    times = []
    for _ in range(repeats):
        device.synchronize()
        began = time.perf_counter()
        for _ in range(calls):
            work()
        device.synchronize()
        times.append((time.perf_counter() - began) / calls)
    return statistics.median(times)


def idle_seconds(work: Callable[[], object], device: Device, calls: int) -> float:
    """Time of a call in which a GPU does nothing, from its first kernel to its last, by torch's profiler."""
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiler:
        for _ in range(calls):
            work()
        device.synchronize()
    spans = [
        (event.time_range.start, event.time_range.end)
        for event in profiler.events()
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation
    ]
    return 1e-6 * uncovered(spans) / calls


def uncovered(spans: Sequence[tuple[float, float]]) -> float:
    """How much between the first begin and the last end lies in none of the spans (begin, end)."""
    gaps, reached = 0.0, None
    for begin, end in sorted(spans):
        gaps += max(0.0, begin - (begin if reached is None else reached))
        reached = end if reached is None else max(reached, end)
    return gaps


def copy_bandwidth(device: Device) -> float:
    """Bytes a second that a copy reads and writes together."""
    source = torch.empty(COPY_BYTES[device.device.type], dtype=torch.uint8, device=device.device).random_()
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds_of(lambda: target.copy_(source), device, calls=5)


def matmul_peak(device: Device) -> float:
    """Operations a second of a large square matrix product: in bf16 on a GPU, in fp32 on the CPU."""
    size, dtype = PEAK_SIZE[device.device.type], PEAK_DTYPE[device.device.type]
    a, b = (torch.randn(size, size, device=device.device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / seconds_of(lambda: a @ b, device, calls=3)
