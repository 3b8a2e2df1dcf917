"""One run of the race.

Shape letters: B windows of a step, L bytes of a window.
"""

import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from arbitor.config import RunConfig
from arbitor.errors import UserError
from arbitor.evaluate import bits_per_byte
from arbitor.model.arb import ARBOutput
from arbitor.train.device import Device, peak_memory
from arbitor.train.schedule import learning_rate
from benchmarks.counts import counts
from benchmarks.learning.contestants import Run, Trainee, build
from benchmarks.learning.training import stepper
from benchmarks.speed.clock import matmul_peak, seconds_of

WARM_UP = 8  # steps that compile and record, ahead of those that are timed
TIMED = 10
EVALUATIONS = 10  # on the way
TRACKED_SHARE = 5  # a fifth of the held-out bytes is measured at each of them
EVAL_BATCH = 32


@dataclass(frozen=True, slots=True)
class Result:
    """What a run came to.

    Attributes:
        steps: that were taken.
        bytes_seen: bytes trained on.
        seconds_per_step: training alone, without what compiles and without evaluation.
        share_of_peak: 6 operations an active weight and byte, over the measured `matmul_peak` of the device.
        peak_bytes: what torch allocated at most on a GPU, what the process held at most on the CPU.
        bytes_per_weight: kept between two steps for a trunk weight.
        trunk_weights: logical weights of all matrices.
        bits_per_byte: at the end.
        curve: bits per byte on the way, on less text, by the step that was taken last.
    """

    steps: int
    bytes_seen: int
    seconds_per_step: float
    share_of_peak: float
    peak_bytes: int
    bytes_per_weight: float
    trunk_weights: int
    bits_per_byte: float
    curve: dict[int, float]


def steps_in(run: Run, config: RunConfig, text: Tensor, device: Device, seconds: float) -> int:
    """How many steps of a run take that long, by the time of a few steps of a model that is then dropped.

    Raises:
        UserError: they are too few to time.
    """
    trainee, take_step = _made(run, config, device)
    batches = _batches(text, config, run.seed)
    each = seconds_of(lambda: take_step(0.0, next(batches)), device, warmup=WARM_UP, repeats=1, calls=TIMED)
    del trainee
    steps = int(seconds / each)
    if steps < 2 * WARM_UP:
        raise UserError(
            f"a step of {run.contestant} takes {each:.2f} s: give more --minutes or a smaller --preset"
        )
    return steps


def raced(
    run: Run,
    config: RunConfig,
    text: Tensor,
    held_out: np.ndarray,
    device: Device,
    steps: int,
    held_out_bytes: int,
    progress: Callable[[int, float], None] = lambda step, bits_per_byte: None,
) -> Result:
    """Train for `steps` steps, at least two times `WARM_UP`, and measure.

    Args:
        run: contestant, learning rate and seed.
        config: the model, and the windows of a step.
        text: uint8 [bytes] on the device.
        held_out: uint8 [bytes] to measure on.
        device: where.
        steps: of the whole cosine.
        held_out_bytes: measured at the end.
        progress: told of each figure on the way.
    """
    peak = matmul_peak(device)
    gc.collect()  # of the run before this one
    if device.is_cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device.device)
    trainee, take_step = _made(run, config, device)
    ctx = config.model.ctx
    batches = _batches(text, config, run.seed)
    every = -(-steps // EVALUATIONS)
    curve = {}
    seconds = 0.0
    for step in range(1, steps + 1):
        if step == WARM_UP + 1:
            device.synchronize()
            began = time.perf_counter()
        take_step(learning_rate(step - 1, steps, 1.0), next(batches))
        if step % every and step < steps:
            continue
        device.synchronize()
        if step > WARM_UP:
            seconds += time.perf_counter() - began
        if step < steps:
            curve[step] = _measured(trainee, held_out, ctx, held_out_bytes // TRACKED_SHARE)
            progress(step, curve[step])
        began = time.perf_counter()
    seconds /= steps - WARM_UP
    bytes_per_step = config.train.batch * ctx
    weights = trainee.trunk_weights()
    return Result(
        steps=steps,
        bytes_seen=steps * bytes_per_step,
        seconds_per_step=seconds,
        share_of_peak=6 * counts(config.model).active * bytes_per_step / seconds / peak,
        peak_bytes=peak_memory(device),
        bytes_per_weight=trainee.trunk_bytes() / weights,
        trunk_weights=weights,
        bits_per_byte=_measured(trainee, held_out, ctx, held_out_bytes),
        curve=curve,
    )


def _made(run: Run, config: RunConfig, device: Device) -> tuple[Trainee, Callable[..., None]]:
    """A fresh trainee and its step; a float twin is compiled on a GPU, trits are recorded there."""
    trainee = build(run, config.model, device.device)
    trainee.model.train()
    if not any(parameter.requires_grad for parameter in trainee.model.parameters()):
        return trainee, stepper(trainee, lambda ids_BL: _loss(trainee.model, ids_BL))
    forward = torch.compile(trainee.model) if device.is_cuda else trainee.model

    def take_step(share: float, ids_BL: Tensor) -> None:
        trainee.prepare(share)
        _loss(forward, ids_BL).backward()
        trainee.apply()

    return trainee, take_step


def _loss(model: Callable[..., ARBOutput], ids_BL: Tensor) -> Tensor:
    loss = model(ids_BL, targets=ids_BL).loss
    assert loss is not None
    return loss


def _batches(text: Tensor, config: RunConfig, seed: int) -> Iterator[Tensor]:
    """Windows int64 [B, L] at places that a generator on the host draws: the same for all contestants."""
    generator = torch.Generator().manual_seed(seed)
    ctx = config.model.ctx
    within_L = torch.arange(ctx, device=text.device)
    while True:
        starts_B1 = torch.randint(len(text) - ctx + 1, (config.train.batch, 1), generator=generator)
        yield text[starts_B1.to(text.device) + within_L].long()


def _measured(trainee: Trainee, held_out: np.ndarray, ctx: int, max_bytes: int) -> float:
    evaluation = bits_per_byte(trainee.model, held_out, ctx, max_bytes=max_bytes, batch=EVAL_BATCH)
    return evaluation.bits_per_byte
