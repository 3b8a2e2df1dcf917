"""`arbitor smoke` (`python -m arbitor.smoke`): build a model, run it twice, and tell time and memory."""

import dataclasses
import json
import math
import sys
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import TypeVar

import torch
from rich.console import Console
from torch import Tensor

from arbitor import __version__
from arbitor.config import RunConfig, override
from arbitor.config import preset as preset_config
from arbitor.flags import PartFlags
from arbitor.model import ARBModel
from arbitor.ops import compilers, thresholds
from arbitor.ops.precompile import Compiled
from arbitor.ternary import VoteOptimizer
from arbitor.ternary.audit import audit
from arbitor.train.ahead import compile_steps, workers
from arbitor.train.device import (
    Device,
    backend,
    deterministic,
    peak_memory,
    resolve_device,
    uses_kernels,
)
from arbitor.train.report import describe_parts, print_rows

MB = 1e6
FAILED = 1
WORDS_AT_ONCE = 1 << 18  # of 8 bytes; the temporaries of a fingerprint must not show in the peak

Result = TypeVar("Result")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Pass:
    """One pass over one batch.

    Attributes:
        forward_seconds: until the loss was there.
        update_seconds: backward and optimizer step; None if there were none.
        loss: in nats; None if it was not finite.
        problem: what went wrong; empty if nothing did.
    """

    forward_seconds: float
    update_seconds: float | None
    loss: float | None
    problem: str

    @property
    def seconds(self) -> float:
        """Of all of it."""
        return self.forward_seconds + (self.update_seconds or 0.0)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Smoke:
    """What was measured; sizes in bytes, times in seconds.

    `state_bytes` is everything kept between steps, weights included. Peaks are what torch allocated on a GPU,
    and of the whole process on the CPU. `bytes_per_second` is the text of the second pass over its time.
    `warm_up` tells what was compiled ahead, if that was asked for.
    """

    preset: str
    state: str
    seed: int
    batch: int
    ctx: int
    parts: str
    device: str
    back_end: str
    trit_weights: int
    state_bytes: int
    bytes_per_weight: float
    build_seconds: float
    build_peak_bytes: int
    first: Pass
    second: Pass
    peak_bytes: int
    bytes_per_second: float
    warm_up: Compiled | None = None
    torch: str = str(torch.__version__)
    version: str = __version__

    @property
    def problems(self) -> list[str]:
        """What went wrong, a line each."""
        passes = {"first": self.first, "second": self.second}
        return [f"{name} run: {done.problem}" for name, done in passes.items() if done.problem]


def run(
    *,
    preset: str,
    state: str,
    seed: int,
    device: str,
    ctx: int | None,
    batch: int,
    parts: PartFlags,
    backward: bool,
    warmup: bool = False,
    as_json: bool = False,
    note: Callable[[str], None],
) -> int:
    """Build a preset, run two passes, print what they took.

    Args:
        preset: name of the preset.
        state: training state: full, compact or lean.
        seed: of weights, ids and rounding.
        device: auto, cpu or cuda.
        ctx: context in bytes; None takes the preset's.
        batch: windows.
        parts: what is left out of the preset, or changed.
        backward: whether a pass takes an optimizer step as well.
        warmup: compile the kernels of a step first, and measure thresholds if there is no table of this GPU.
        as_json: one line of JSON instead of a table.
        note: is given lines about what the flags do.

    Returns:
        Exit code: 0, or 1 if a loss was not finite, an update changed nothing, or a forward something.

    Raises:
        UserError: a setting that cannot be used.
    """
    base = preset_config(preset)
    own = {} if ctx is None else {"ctx": ctx}
    config = override(base, state=state, seed=seed, batch=batch, **own, **parts.settings(base.model))
    if warmup and device != "cpu":
        compilers.fork_compilers()
    place = resolve_device(device)
    for line in parts.notes(base.model):
        note(line)
    if not as_json:
        patience = "" if place.is_cuda else "; a large model takes minutes on a CPU"
        note(f"two passes over {batch} x {config.model.ctx} bytes on {place.name}{patience}")
    try:
        warm = warm_up(config, place) if warmup else None
    finally:
        compilers.end_compilers()
    if warmup and warm is None:
        note("--warmup does nothing without a GPU and Triton: there are no kernels to compile")
    measured = measure(config, place, backward, warm)
    if as_json:
        print(json.dumps(dataclasses.asdict(measured), allow_nan=False))
    else:
        print_rows(Console(highlight=False), _rows(measured, place))
    for problem in measured.problems:
        print(f"arbitor: error: {problem}", file=sys.stderr)
    return FAILED if measured.problems else 0


def warm_up(config: RunConfig, device: Device) -> Compiled | None:
    """Compile what training steps of `config` launch on a GPU, whatever their batch and context.

    The steps are of a model of its own, which is thrown away. If the thresholds between kernels were never
    measured here, they are first, since they decide on what is launched.

    Returns:
        What was compiled; None where there are no kernels: without a GPU, or without Triton.

    Raises:
        UserError: measured thresholds cannot be stored.
    """
    if not device.is_cuda or not uses_kernels():
        return None
    if not thresholds.table(device.device).source:
        thresholds.write(
            thresholds.path(), thresholds.identity(device.device), thresholds.measure(device.device)
        )
    return compile_steps(config, device)


def measure(config: RunConfig, device: Device, backward: bool, warm: Compiled | None = None) -> Smoke:
    """Build the model of `config` with its optimizer and run two passes over random bytes.

    Nothing but the two passes and the build is within the times; the device is idle at their ends. `warm` is
    passed on.
    """
    train, ctx = config.train, config.model.ctx
    if device.is_cuda:
        torch.cuda.reset_peak_memory_stats(device.device)
    with deterministic(train.seed, device.device):
        model, build_seconds = _timed(device, lambda: ARBModel(config=config.model, device=device.device))
        build_peak = peak_memory(device)
        optimizer = VoteOptimizer(model, state=train.state, seed=train.seed)
        report = audit(model, optimizer)
        runner = _Runner(model, optimizer, device, backward)
        batches = [torch.randint(0, 256, (train.batch, ctx)) for _ in range(2)]
        first, second = (runner.run_pass(ids_BL) for ids_BL in batches)
    return Smoke(
        preset=config.preset,
        state=train.state,
        seed=train.seed,
        batch=train.batch,
        ctx=ctx,
        parts=describe_parts(config.model),
        device=device.name,
        back_end=backend(device.device),
        trit_weights=report.trit_weights,
        state_bytes=report.total_bytes,
        bytes_per_weight=report.bytes_per_weight,
        build_seconds=build_seconds,
        build_peak_bytes=build_peak,
        first=first,
        second=second,
        peak_bytes=peak_memory(device),
        bytes_per_second=train.batch * ctx / second.seconds,
        warm_up=warm,
    )


class _Runner:
    """Runs passes, and looks whether what they should change did change."""

    def __init__(self, model: ARBModel, optimizer: VoteOptimizer, device: Device, backward: bool) -> None:
        self._model = model
        self._optimizer = optimizer
        self._device = device
        self._backward = backward
        self._known = self._fingerprint()

    def run_pass(self, ids_BL: Tensor) -> Pass:
        """Forward, and backward and step if they are wanted; ids int64 [B, L] on the CPU."""
        loss, forward_seconds = _timed(self._device, partial(self._forward, ids_BL))
        update_seconds = None
        if self._backward:
            _, update_seconds = _timed(self._device, partial(self._update, loss))
        value = float(loss.detach())
        return Pass(
            forward_seconds=forward_seconds,
            update_seconds=update_seconds,
            loss=value if math.isfinite(value) else None,
            problem=self._problem(value),
        )

    def _problem(self, loss: float) -> str:
        before, self._known = self._known, self._fingerprint()
        changed = self._known != before
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if self._backward and not self._optimizer.last_step_applied:
            return "the step was dropped, since a gradient was not finite"
        if changed != self._backward:
            return "the update changed nothing" if self._backward else "a forward changed weights or state"
        return ""

    def _forward(self, ids_BL: Tensor) -> Tensor:
        with torch.set_grad_enabled(self._backward):
            loss = self._model(ids_BL, targets=ids_BL).loss
        assert loss is not None
        return loss

    def _update(self, loss: Tensor) -> None:
        self._optimizer.note_loss(loss)
        loss.backward()
        self._optimizer.step()

    def _fingerprint(self) -> list[int]:
        return fingerprint([*self._model.state_dict().values(), *self._optimizer.named_state().values()])


def fingerprint(tensors: Iterable[Tensor]) -> list[int]:
    """An integer for each tensor that any change of one of its 8-byte words changes, made where it lies.

    It is the sum of the words, each times an odd number of its place, modulo 2^64.
    """
    sums = []
    for tensor in tensors:
        flat = tensor.detach().reshape(-1).view(torch.uint8)
        whole = len(flat) // 8 * 8
        total = torch.zeros((), dtype=torch.int64, device=flat.device)
        for words in (flat[:whole].view(torch.int64), flat[whole:]):
            for part in words.split(WORDS_AT_ONCE):
                odd = torch.arange(len(part), device=flat.device).mul_(2).add_(1)
                # The place of the part counts as well: parts must not be interchangeable.
                total = total * 1_000_003 + odd.mul_(part).sum()
        sums.append(total)
    return [int(total) for total in sums]


def _rows(measured: Smoke, device: Device) -> dict[str, str]:
    """Labels and texts of the table."""
    m = measured
    passes = {f"{name} run": _pass_text(done) for name, done in (("first", m.first), ("second", m.second))}
    return {
        "model": f"{m.preset}: {m.trit_weights / 1e6:,.2f} M trit weights",
        **({"parts": m.parts} if m.parts else {}),
        "batch": f"{m.batch} x {m.ctx} bytes, seed {m.seed}",
        "device": f"{m.device}: {device.reason}",
        "back end": m.back_end,
        "state": f"{m.state}: {m.state_bytes / MB:,.1f} MB ({m.bytes_per_weight:.3f} bytes a weight)",
        **({"kernels": _warm_text(m.warm_up)} if m.warm_up else {}),
        "build": f"{m.build_seconds:.3f} s, peak {m.build_peak_bytes / MB:,.1f} MB",
        **passes,
        "speed": f"{m.bytes_per_second:,.1f} bytes/s in the second run",
        "peak": f"{m.peak_bytes / MB:,.1f} MB" + ("" if device.is_cuda else " of the whole process"),
    }


def _warm_text(warm: Compiled) -> str:
    return (
        f"{warm.kernels} for training steps, {warm.new} of them new and the rest in the cache; "
        f"{warm.seconds:.1f} s with {workers(warm)}"
    )


def _pass_text(done: Pass) -> str:
    update = "" if done.update_seconds is None else f", backward + update {done.update_seconds:.4f} s"
    loss = "not finite" if done.loss is None else f"{done.loss:.4f}"
    return f"forward {done.forward_seconds:.4f} s{update}, loss {loss}"


def _timed(device: Device, work: Callable[[], Result]) -> tuple[Result, float]:
    """What `work` returns, and the seconds until the device had done it."""
    device.synchronize()
    started = time.perf_counter()
    result = work()
    device.synchronize()
    return result, time.perf_counter() - started


if __name__ == "__main__":
    from arbitor.cli import main

    sys.exit(main(["smoke", *sys.argv[1:]]))
