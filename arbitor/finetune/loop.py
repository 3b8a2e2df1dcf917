"""The loop of a finetune: steps on batches of its data, evaluations on what is held out, checkpoints.

A step depends on what a checkpoint holds and on nothing else, so a resumed finetune is equal to an
uninterrupted one bit for bit (same device type, versions and thread count).
"""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from arbitor.errors import UserError
from arbitor.finetune.config import FinetuneConfig
from arbitor.finetune.material import HeldOut, Material, in_bits, told
from arbitor.finetune.methods import Method
from arbitor.model import ARBModel
from arbitor.train.crowding import Crowding
from arbitor.train.device import Device, gradient_products
from arbitor.train.display import Display, Pace, Reading, format_bytes, format_seconds
from arbitor.train.metrics import STEP_KEYS, MetricsLog, evaluation_keys, seconds_so_far
from arbitor.train.schedule import learning_rate
from arbitor.train.signals import Interrupted, SignalGuard

LN2 = math.log(2.0)
MAX_DROPPED_IN_A_ROW = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class FinetuneReading(Reading):
    """Figures of one step, without those of trits.

    Attributes:
        measures: what the loss is of, in words.
    """

    measures: str

    def line(self) -> str:
        """All figures but the step, in words."""
        bits = "" if self.bits_per_byte is None else f"  {self.bits_per_byte:.3f} bits/byte"
        return (
            f"{self.measures} {self.loss:.3f}{bits}  "
            f"{format_bytes(self.bytes_per_second)}/s  ETA {format_seconds(self.seconds_left)}  "
            f"memory {format_bytes(self.memory)}"
        )


@dataclass(frozen=True, slots=True)
class Outcome:
    """How the steps ended.

    Attributes:
        finished: the last step was taken.
        diverged: too many steps in a row were dropped.
    """

    finished: bool = False
    diverged: bool = False


class Finetune:
    """Takes a model through the steps of a finetune and keeps the run's folder.

    Args:
        config: settings.
        model: the base with what the method put onto it.
        method: how it learns.
        data: what it learns from.
        device: where it computes.
        folder: of the run; it exists.
        log: of the run.
        display: where progress is shown.
        guard: open signal guard.

    Attributes:
        step: steps taken.
        before: held-out loss ahead of the first step.
        best: step and loss of the best evaluation so far, or None.
        latest: loss of the last evaluation, or None.
        seconds: what steps and evaluations took, those before a resume included.
        dropped: steps dropped.
    """

    def __init__(
        self,
        config: FinetuneConfig,
        model: ARBModel,
        method: Method,
        data: Material,
        device: Device,
        folder: Path,
        log: MetricsLog,
        display: Display,
        guard: SignalGuard,
    ) -> None:
        self.config, self.model, self.method, self.data, self.device = config, model, method, data, device
        self.folder, self.log, self.display, self.guard = folder, log, display, guard
        self.data_fingerprint = data.fingerprint()
        self.step = 0
        self.before: HeldOut | None = None
        self.best: dict[str, Any] | None = None
        self.latest: HeldOut | None = None
        self.seconds = seconds_so_far(log.path)
        self.dropped = 0
        self._dropped_in_a_row = 0
        self._answer_bytes = 0
        self._evaluated_step: int | None = None
        self._saved_step: int | None = None
        self._pace = Pace()
        self._crowding = Crowding(device)

    def restore(self, folder: Path) -> None:
        """Go on from a checkpoint.

        Raises:
            DamagedError: it is not whole.
            UserError: it is of another model or other data.
        """
        state = self.method.restore(folder)
        if state["data"] != self.data_fingerprint:
            raise UserError(
                f"the {self.data.unit} are not what they were; an exact resume needs the same data (start a "
                "new finetune to learn from other data)"
            )
        self.step = int(state["step"])
        self.data.restore(state["sampler"])
        self.before = HeldOut(*state["before"])
        self.latest = None if state["latest"] is None else HeldOut(*state["latest"])
        self.best = state["best"]
        self.dropped = int(state["dropped"])
        self._answer_bytes = int(state["answer_bytes"])
        self._evaluated_step = state["evaluated_step"]
        self._saved_step = self.step

    @property
    def done(self) -> bool:
        """Whether the last step was taken."""
        return self.step >= self.config.steps

    def run_steps(self) -> Outcome:
        """Learn until the last step, a signal, or too many dropped steps; `latest` is saved in each case."""
        config = self.config
        while True:
            try:
                if self.before is None:
                    self.before = self._measured()
                    self.display.note(f"before: held-out {self._told(self.before)}")
                if self._is_due(config.eval_interval) and self._evaluated_step != self.step:
                    self._evaluate()
            except Interrupted:
                break
            if self._is_due(config.save_interval):
                self.save_latest()
            if self.done or self._diverged or self.guard.received is not None:
                break
            self._take_step()
        diverged = self._diverged
        if self.before is not None:
            self.save_latest()
        return Outcome(self.done and self.guard.received is None and not diverged, diverged)

    def save(self, name: str, *, keep_previous: bool = False) -> None:
        """Write the checkpoint `name`.

        Raises:
            UserError: the disk did not take it; what was there before is still there.
        """
        assert self.before is not None
        state = {
            "step": self.step,
            "seed": self.config.seed,
            "sampler": self.data.state(),
            "data": self.data_fingerprint,
            "before": _plain(self.before),
            "latest": None if self.latest is None else _plain(self.latest),
            "best": self.best,
            "dropped": self.dropped,
            "answer_bytes": self._answer_bytes,
            "evaluated_step": self._evaluated_step,
            "device": self.device.device.type,
            "gradients": gradient_products(self.device.device),
            "threads": torch.get_num_threads(),
            "torch": str(torch.__version__),
        }
        try:
            self.method.save(self.folder / name, state, keep_previous=keep_previous)
        except OSError as error:
            raise UserError(
                f"cannot save {self.folder / name}: {error.strerror or error}; what was saved before stays "
                "as it was"
            ) from error

    def save_latest(self) -> None:
        """Write `latest` unless it is there already."""
        if self._saved_step != self.step:
            self.save("latest", keep_previous=True)
            self._saved_step = self.step

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        """A section that changes nothing, in evaluation mode; a signal ends it by raising Interrupted."""
        self.method.set_training(False)
        try:
            with self.guard.leaving_at_any_point():
                yield
        finally:
            self.method.set_training(True)

    @property
    def has_saved(self) -> bool:
        """Whether there is a checkpoint."""
        return self._saved_step is not None

    @property
    def _diverged(self) -> bool:
        return self._dropped_in_a_row >= MAX_DROPPED_IN_A_ROW

    def _is_due(self, interval: int) -> bool:
        return self.step > 0 and (self.done or (interval > 0 and self.step % interval == 0))

    def _take_step(self) -> None:
        started = time.perf_counter()
        config = self.config
        lr = learning_rate(self.step, config.steps, self.method.peak_lr, config.warmup)
        # Dropout's bits are a function of seed and step, which is what a resume knows.
        torch.manual_seed((config.seed * 1_000_003 + self.step) % (1 << 63))
        learnt = self.data.step_loss(self.model, self.method, self.step)
        whole = learnt.main if learnt.parts is None else learnt.main + learnt.parts
        applied = self.method.step(whole, lr)
        self.step += 1
        loss = float(learnt.main.detach())
        bits = loss / LN2 if self.data.figure == "bits_per_byte" else None
        seconds = time.perf_counter() - started
        self.seconds += seconds
        self._pace.note(seconds)
        self._answer_bytes += learnt.count
        if applied:
            self._dropped_in_a_row = 0
        else:
            self.dropped += 1
            self._dropped_in_a_row += 1
            self.display.note(
                f"step {self.step}: dropped, the loss or a gradient was not finite ({self.dropped} so far)"
            )
        if advice := self._crowding.advice():
            self.display.note(f"step {self.step}: {advice}")
        rate, memory = learnt.count / seconds, self.device.memory()
        flips = self.method.flip_rate()
        values = (self.step, self._answer_bytes, loss, bits, lr, rate, memory, flips)
        self.log.write(dict(zip(STEP_KEYS, values, strict=True)))
        self.display.update(
            FinetuneReading(
                measures=self.data.measures,
                step=self.step,
                loss=loss,
                bits_per_byte=bits,
                bytes_per_second=rate,
                memory=memory,
                flip_rate=0.0,
                seconds_left=self._pace.seconds_of(config.steps - self.step),
            )
        )

    def _measured(self) -> HeldOut:
        """Loss of what is held out, which is also logged."""
        started = time.perf_counter()
        with self.undisturbed():
            result = self.data.measure(self.model)
        seconds = time.perf_counter() - started
        self.seconds += seconds
        figure = self.data.figure
        values = (self.step, in_bits(result.loss, figure), result.count, seconds)
        right = {} if result.right is None else {"captions_right": result.right}
        self.log.write(dict(zip(evaluation_keys(figure), values, strict=True)) | right)
        return result

    def _evaluate(self) -> None:
        """Loss of what is held out; the lowest so far becomes `best`."""
        result = self._measured()
        self.latest = result
        self._evaluated_step = self.step
        self._saved_step = None  # the outcome belongs into `latest`, too
        best = result.loss < (math.inf if self.best is None else self.best["loss"])
        if best:
            self.best = {"step": self.step, "loss": result.loss}
            self.save("best")
        mark = ", the best so far" if best else ""
        self.display.note(f"step {self.step}: held-out {self._told(result)}{mark}")

    def _told(self, result: HeldOut) -> str:
        right = "" if result.right is None else f", {100 * result.right:.1f} % written right"
        return f"{self.data.measures} {told(result.loss, self.data.figure)}{right}"


def _plain(result: HeldOut) -> list[float | None]:
    return [result.loss, result.count, result.num_examples, result.right]
