"""The loop of a finetune: steps on batches of conversations, evaluations on held-out answers, checkpoints.

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

import numpy as np
import torch

from arbitor.errors import UserError
from arbitor.finetune.config import FinetuneConfig
from arbitor.finetune.data import Instructions
from arbitor.finetune.instructions import Example, answer_losses, collate, prefix_of
from arbitor.finetune.methods import Method
from arbitor.model import ARBModel
from arbitor.train.device import Device, gradient_products
from arbitor.train.display import Display, Reading, format_bytes, format_seconds
from arbitor.train.metrics import EVALUATION_KEYS, STEP_KEYS, MetricsLog, seconds_so_far
from arbitor.train.schedule import learning_rate
from arbitor.train.signals import Interrupted, SignalGuard

LN2 = math.log(2.0)
MAX_DROPPED_IN_A_ROW = 20


@dataclass(frozen=True, slots=True)
class AnswerLoss:
    """Loss of held-out answers.

    Attributes:
        nats: mean cross entropy of an answer id.
        num_answer_ids: ids that it is the mean of.
        num_examples: conversations that they stand in.
    """

    nats: float
    num_answer_ids: int
    num_examples: int

    @property
    def bits(self) -> float:
        """The same in bits per answer byte."""
        return self.nats / LN2


class AnswerReading(Reading):
    """Figures of one step, without those of trits."""

    __slots__ = ()

    def line(self) -> str:
        """All figures but the step, in words."""
        return (
            f"answer loss {self.loss:.3f}  {self.bits_per_byte:.3f} bits/byte  "
            f"{format_bytes(self.bytes_per_second)}/s  ETA {format_seconds(self.seconds_left)}  "
            f"memory {format_bytes(self.memory)}"
        )


def batch_order(seed: int, step: int, num_examples: int, batch: int) -> np.ndarray:
    """Which examples step `step` (0 for the first) learns from: int64 [batch].

    The examples pass in epochs, each in an order of its own that depends on seed and epoch alone.
    """
    places = np.arange(step * batch, (step + 1) * batch)
    epochs, offsets = np.divmod(places, num_examples)
    chosen = np.empty(batch, dtype=np.int64)
    for epoch in np.unique(epochs):
        order = np.random.Generator(np.random.Philox(key=[seed, int(epoch)])).permutation(num_examples)
        chosen[epochs == epoch] = order[offsets[epochs == epoch]]
    return chosen


@torch.no_grad()
def measure(model: ARBModel, examples: list[Example], batch: int) -> AnswerLoss:
    """Mean loss over all answer ids of `examples`; the model must be in evaluation mode."""
    total, count = 0.0, 0
    # Neighbours of like length share a batch; the sum is over all, so the order does not matter.
    ordered = sorted(examples, key=lambda example: len(example.ids))
    for first in range(0, len(ordered), batch):
        chosen = ordered[first : first + batch]
        ids_BL, is_answer_BN = collate(chosen)
        logits_BNS = model(ids_BL, prefix=prefix_of(model, chosen)).logits
        losses = answer_losses(logits_BNS, ids_BL, is_answer_BN)
        total += float(losses.double().sum())
        count += len(losses)
    return AnswerLoss(total / count, count, len(examples))


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
        data: conversations.
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
        data: Instructions,
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
        self.before: AnswerLoss | None = None
        self.best: dict[str, Any] | None = None
        self.latest: AnswerLoss | None = None
        self.seconds = seconds_so_far(log.path)
        self.dropped = 0
        self._dropped_in_a_row = 0
        self._answer_bytes = 0
        self._evaluated_step: int | None = None
        self._saved_step: int | None = None
        self._first_step = 0
        self._step_seconds = 0.0

    def restore(self, folder: Path) -> None:
        """Go on from a checkpoint.

        Raises:
            DamagedError: it is not whole.
            UserError: it is of another model or other data.
        """
        state = self.method.restore(folder)
        if state["data"] != self.data_fingerprint:
            raise UserError(
                "the conversations are not what they were; an exact resume needs the same data (start a new "
                "finetune to learn from other data)"
            )
        self.step = self._first_step = int(state["step"])
        self.before = AnswerLoss(*state["before"])
        self.latest = None if state["latest"] is None else AnswerLoss(*state["latest"])
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
                    self.display.note(f"before: held-out answers {_told(self.before)}")
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
            "sampler": {"conversations": len(self.data.train)},
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
                f"cannot save {self.folder / name}: {error.strerror or error}; the checkpoint before it "
                "stays as it was"
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
    def _diverged(self) -> bool:
        return self._dropped_in_a_row >= MAX_DROPPED_IN_A_ROW

    def _is_due(self, interval: int) -> bool:
        return self.step > 0 and (self.done or (interval > 0 and self.step % interval == 0))

    def _take_step(self) -> None:
        started = time.perf_counter()
        config = self.config
        lr = learning_rate(self.step, config.steps, self.method.peak_lr, config.warmup)
        chosen = batch_order(config.seed, self.step, len(self.data.train), config.batch)
        examples = [self.data.train[i] for i in chosen]
        ids_BL, is_answer_BN = collate(examples)
        # Dropout's bits are a function of seed and step, which is what a resume knows.
        torch.manual_seed((config.seed * 1_000_003 + self.step) % (1 << 63))
        logits_BNS, parts = self.method.forward(self.model, ids_BL, prefix_of(self.model, examples))
        losses = answer_losses(logits_BNS, ids_BL, is_answer_BN)
        answer_loss = losses.mean()
        applied = self.method.step(answer_loss if parts is None else answer_loss + parts, lr)
        self.step += 1
        loss = float(answer_loss.detach())
        seconds = time.perf_counter() - started
        self.seconds += seconds
        self._step_seconds += seconds
        self._answer_bytes += len(losses)
        if applied:
            self._dropped_in_a_row = 0
        else:
            self.dropped += 1
            self._dropped_in_a_row += 1
            self.display.note(
                f"step {self.step}: dropped, the loss or a gradient was not finite ({self.dropped} so far)"
            )
        rate, memory = len(losses) / seconds, self.device.memory()
        flips = self.method.flip_rate()
        values = (self.step, self._answer_bytes, loss, loss / LN2, lr, rate, memory, flips)
        self.log.write(dict(zip(STEP_KEYS, values, strict=True)))
        taken = self.step - self._first_step
        self.display.update(
            AnswerReading(
                step=self.step,
                loss=loss,
                bits_per_byte=loss / LN2,
                bytes_per_second=rate,
                memory=memory,
                flip_rate=0.0,
                seconds_left=self._step_seconds / taken * (config.steps - self.step),
            )
        )

    def _measured(self) -> AnswerLoss:
        """Loss of the held-out answers, which is also logged."""
        started = time.perf_counter()
        with self.undisturbed():
            result = measure(self.model, self.data.held_out[: self.config.eval_examples], self.config.batch)
        seconds = time.perf_counter() - started
        self.seconds += seconds
        values = (self.step, result.bits, result.num_answer_ids, seconds)
        self.log.write(dict(zip(EVALUATION_KEYS, values, strict=True)))
        return result

    def _evaluate(self) -> None:
        """Loss of the held-out answers; the lowest so far becomes `best`."""
        result = self._measured()
        self.latest = result
        self._evaluated_step = self.step
        self._saved_step = None  # the outcome belongs into `latest`, too
        best = result.nats < (math.inf if self.best is None else self.best["loss"])
        if best:
            self.best = {"step": self.step, "loss": result.nats}
            self.save("best")
        mark = ", the best so far" if best else ""
        self.display.note(f"step {self.step}: held-out answers {_told(result)}{mark}")


def _told(result: AnswerLoss) -> str:
    return f"{result.nats:.4f} nats, {result.bits:.4f} bits per byte"


def _plain(result: AnswerLoss) -> list[float]:
    return [result.nats, result.num_answer_ids, result.num_examples]
