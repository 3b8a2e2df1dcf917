"""The training loop.

Everything that a step depends on is in `Trainer` and goes into a checkpoint, so a resumed run is equal to an
uninterrupted one bit for bit (same device type, versions and thread count).
"""

import math
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from arbitor.config import RunConfig
from arbitor.errors import UserError
from arbitor.evaluate import Evaluation
from arbitor.model import ARBModel
from arbitor.ternary import VoteOptimizer
from arbitor.train.checkpoint import Checkpoint, save_checkpoint
from arbitor.train.crowding import Crowding
from arbitor.train.device import Device, gradient_products, keep_freed_memory
from arbitor.train.display import Display, Pace, Reading
from arbitor.train.growth import graft_state, graft_weights
from arbitor.train.metrics import FIGURES, STEP_KEYS, MetricsLog, evaluation_keys, seconds_so_far
from arbitor.train.recorded import RecordedSteps, can_record
from arbitor.train.schedule import learning_rate
from arbitor.train.signals import Interrupted, SignalGuard
from arbitor.train.task import Corpus, task_of

LN2 = math.log(2.0)
LAST_WINDOWS_PER_TRAINED = 10  # and windows, for each one trained on: a run of one step must not take hours
MAX_DROPPED_IN_A_ROW = 20


class Trainer:
    """Model, optimizer, data position and counters of a run.

    Args:
        config: settings of the run.
        corpus: its data.
        device: where to compute.
        checkpoint: state to go on from; None begins with fresh weights from torch's global generator.
        base: of a model with fewer parts, whose weights and training state a fresh one takes over.

    Attributes:
        task: batches and evaluations of the data.
        step: optimizer steps taken, dropped ones included.
        best: step and held-out bits per byte of the best evaluation so far, or None.
        evaluated_step: step of the last evaluation.
        dropped_in_a_row: steps dropped since the last one that counted.
        growth: lines about what was taken over from `base`.
        last_ok: whether the last step counted, a scalar on the device, a new one every step.
        readings: of the last step, scalars on the device: the losses of the model's parts, means over the
            micro-batches, and the parts' metrics in the last of them.

    Raises:
        UserError: the checkpoint is of another model, other settings or other data.
    """

    def __init__(
        self,
        config: RunConfig,
        corpus: Corpus,
        device: Device,
        checkpoint: Checkpoint | None = None,
        base: Checkpoint | None = None,
    ) -> None:
        if not device.is_cuda:
            keep_freed_memory()
        self.config = config
        self.task = task_of(config, corpus)
        self.device = device
        train = config.train
        self.growth: list[str] = []
        if checkpoint is None:
            self.model = ARBModel(config=config.model, device=device.device)
            if config.model.image_encoder and config.data.encoder and not _brings("image.encoder", base):
                self.model.take_encoder(config.data.encoder)
            frozen = config.model.video_size and config.model.video_autoencoder
            if frozen and not _brings("video.codec.frozen", base):
                if config.data.autoencoder is None:
                    raise UserError("autoencoder is not set, so nothing says where the frozen one is")
                self.model.take_autoencoder(config.data.autoencoder)
            if base is not None:
                self.growth += graft_weights(self.model, base)
            if (prepare := getattr(self.task, "prepare", None)) is not None:
                prepare(self.model)
        else:
            _refuse_other_model(checkpoint, config)
            self.model = checkpoint.build_model(device.device)
        self.optimizer = VoteOptimizer(
            self.model,
            train.lr,
            train.rule,
            train.state,
            train.seed,
            accum_threshold=train.accum_threshold,
            e_accum_threshold=train.e_accum_threshold,
            scale_lr=train.scale_lr,
        )
        if base is not None:
            self.growth += graft_state(self.optimizer, base)
        self.peak_lr = float(self.optimizer.param_groups[0]["lr"])
        self._held_out = self.task.held_out_state()
        self.step = 0
        self.best: dict[str, Any] | None = None
        self.evaluated_step = 0
        self.dropped_in_a_row = 0
        self.last_ok = self.optimizer.last_step_ok
        self.readings: dict[str, Tensor] = {}
        records = self.task.fixed_shapes and can_record(self.model)
        self._recorded = RecordedSteps(self._work, device.device) if records else None
        self._flips_of: dict[Hashable, dict[str, Tensor]] = {}
        if checkpoint is not None:
            checkpoint.restore_optimizer(self.optimizer)
            self._restore(checkpoint.state)

    @property
    def bytes_per_step(self) -> int:
        """Training data that one optimizer step reads."""
        return self.config.train.batch * self.config.train.accum * self.task.bytes_per_item

    @property
    def done(self) -> bool:
        """Whether the last step was taken."""
        return self.step >= self.config.train.steps

    def take_step(self) -> Tensor:
        """One optimizer step over `accum` micro-batches.

        Returns:
            The main loss of the task (of text: nats per byte), a scalar on the device.
        """
        train = self.config.train
        lr = self.next_lr()
        for group in self.optimizer.param_groups:
            group["lr"] = lr
            group["scale_lr"] = train.scale_lr * lr / self.peak_lr
        batches = self._next_batches()
        self.optimizer.prepare()
        kind, on_host = self._kind_of(batches)
        if self._recorded is None or kind is None:
            figures = self._work(batches)
        else:
            before = self.optimizer.flips
            figures = self._recorded(kind, batches, on_host)
            if self.optimizer.flips is before:  # it was replayed: its flips are where they were recorded
                self.optimizer.flips = self._flips_of[kind]
            self._flips_of[kind] = self.optimizer.flips
        self.step += 1
        main, self.last_ok = figures.pop(self.task.main_loss), figures.pop("ok")
        self.readings = figures
        return main

    def _kind_of(self, batches: Sequence[Sequence[Tensor]]) -> tuple[Hashable | None, int]:
        """What steps like this one have in common, None if it is like no other, and how many tensors of a
        batch say so: see `RecordedSteps`.
        """
        if (kind_of := getattr(self.task, "kind_of", None)) is None:
            return (), 0
        return kind_of(batches), 1

    def _work(self, batches: Sequence[Sequence[Tensor]]) -> dict[str, Tensor]:
        """The device's part of a step: losses and metrics of the parts, and whether the step counted."""
        losses: dict[str, list[Tensor]] = {}
        for batch in batches:
            output = self.task.output(self.model, *batch)
            assert output.loss is not None
            self.optimizer.note_loss(output.loss)
            (output.loss / len(batches)).backward()
            for name, loss in output.losses.items():
                losses.setdefault(name, []).append(loss.detach())
        self.optimizer.apply()
        # Not every micro-batch has every loss where the data is mixed.
        means = {name: _mean(parts) for name, parts in losses.items()}
        return means | self.model.part_metrics() | {"ok": self.optimizer.last_step_ok}

    def _next_batches(self) -> list[tuple[Tensor, ...]]:
        """The micro-batches of a step; where one cannot be read, the position is what it was."""
        position = self.task.sampler_state()
        try:
            return [self.task.next_batch() for _ in range(self.config.train.accum)]
        except UserError:
            self.task.restore_sampler(position)
            raise

    @property
    def waits(self) -> bool:
        """A step was seen in which the host waits for the GPU, so those like it are not replayed."""
        return self._recorded is not None and self._recorded.waits

    def next_lr(self) -> float:
        """Learning rate of the coming step, trits."""
        return learning_rate(self.step, self.config.train.steps, self.peak_lr, self.config.train.warmup)

    @property
    def last_windows(self) -> int:
        """Held-out windows (or media) that the evaluation at the end reads at most."""
        train = self.config.train
        return max(train.eval_steps, LAST_WINDOWS_PER_TRAINED * train.steps * train.batch * train.accum)

    def evaluate(
        self, *, max_windows: int | None = None, progress: Callable[[int, int], None] | None = None
    ) -> Evaluation:
        """Figures of the held-out data, up to 1 MB of text or `max_windows` windows or media."""
        self.model.eval()
        try:
            return self.task.evaluate(self.model, max_windows, progress)
        finally:
            self.model.train()

    def save(self, folder: Path, *, keep_previous: bool = False) -> None:
        """Write a checkpoint.

        Raises:
            UserError: the disk did not take it; what was there before is still there.
        """
        state = {
            "step": self.step,
            "bytes_seen": self.step * self.bytes_per_step,
            "seed": self.config.train.seed,
            "sampler": self.task.sampler_state(),
            "held_out": self._held_out,
            "best": self.best,
            "evaluated_step": self.evaluated_step,
            "dropped_in_a_row": self.dropped_in_a_row,
            "device": self.device.device.type,
            "gradients": gradient_products(self.device.device),
            "threads": torch.get_num_threads(),
            "torch": str(torch.__version__),
        }
        try:
            save_checkpoint(
                folder, self.model, self.optimizer, self.config, state, keep_previous=keep_previous
            )
        except OSError as error:
            raise UserError(
                f"cannot save {folder}: {error.strerror or error}; what was saved before stays as it was"
            ) from error

    def _restore(self, state: dict[str, Any]) -> None:
        self.step = int(state["step"])
        self.best = state["best"]
        self.evaluated_step = int(state["evaluated_step"])
        self.dropped_in_a_row = int(state["dropped_in_a_row"])
        self.task.restore_sampler(state["sampler"])
        if (then := state["held_out"]) != self._held_out:
            raise UserError(
                f"the held-out data is not what it was: {then['bytes']:,} bytes then, "
                f"{self._held_out['bytes']:,} now"
                + (", with other content" if then["bytes"] == self._held_out["bytes"] else "")
                + "; the best evaluation would be one of other data (start a new run for other data)"
            )


@dataclass(frozen=True, slots=True)
class Outcome:
    """How `run_steps` ended.

    Attributes:
        finished: the last step was taken and evaluated.
        diverged: too many steps in a row were dropped.
    """

    finished: bool = False
    diverged: bool = False


@dataclass(slots=True)
class _Unread:
    """A step whose loss, and whether it was dropped, are still on the device only."""

    step: int
    lr: float
    loss: Tensor
    ok: Tensor


class Run:
    """Takes a trainer through its steps and keeps the run's folder.

    Args:
        trainer: what to train.
        folder: of the run; it exists.
        log: of the run.
        display: where progress is shown.
        guard: open signal guard.

    Attributes:
        seconds: what the steps and evaluations took, those before a resume included.
    """

    def __init__(
        self, trainer: Trainer, folder: Path, log: MetricsLog, display: Display, guard: SignalGuard
    ) -> None:
        self.trainer = trainer
        self.folder = folder
        self.log = log
        self.display = display
        self.guard = guard
        self.seconds = seconds_so_far(log.path)
        self._saved_step = trainer.step or None
        self._unread: list[_Unread] = []
        self._unread_seconds = 0.0
        self._dropped = trainer.optimizer.dropped_steps
        self._diverged = False
        self._pace = Pace()
        self._crowding = Crowding(trainer.device)

    def run_steps(self) -> Outcome:
        """Train until the last step, a signal, or too many dropped steps; `latest` is saved in each case.

        Raises:
            UserError: the disk did not take that last checkpoint; one in between may be missed.
        """
        trainer, train = self.trainer, self.trainer.config.train
        while True:
            if self._is_due(train.eval_interval) and trainer.evaluated_step != trainer.step:
                try:
                    self._evaluate()
                except Interrupted:
                    break
            if self._is_due(train.save_interval) and not trainer.done:
                self._save_or_go_on(self._save_latest)
            if trainer.done or self._diverged or self.guard.received is not None:
                break
            try:
                self._take_step()
            except UserError as error:
                raise self._saved_after(error) from error
        self._read_steps()
        diverged = self._diverged
        if diverged:
            trainer.dropped_in_a_row = 0  # whoever resumes gets as many tries again
        self.save_or_end(self._save_latest)
        finished = trainer.done and self.guard.received is None and not diverged
        return Outcome(finished=finished, diverged=diverged)

    def undisturbed(self, work: Callable[[], Any]) -> Any:
        """Result of `work`, which changes nothing; a signal ends it at once by raising Interrupted."""
        with self.guard.leaving_at_any_point():
            return work()

    def save(self, name: str, *, keep_previous: bool = False) -> None:
        """Write the checkpoint `name`, unless the run keeps none."""
        if self.trainer.config.train.save:
            self.trainer.save(self.folder / name, keep_previous=keep_previous)

    def save_or_end(self, save: Callable[[], None]) -> None:
        """Save at the end of training.

        Raises:
            UserError: the disk did not take it; says how to go on.
        """
        try:
            save()
        except UserError as error:
            name = self.folder.name
            again = any((self.folder / kept).is_dir() for kept in ("latest", "best"))
            what = f"go on with --resume --run {name}" if again else f"start anew with --reset --run {name}"
            if not self.folder.is_dir():
                raise UserError(f"{error}: somebody deleted {self.folder}; {what}") from error
            raise UserError(f"{error}; make room, then {what}") from error

    def _is_due(self, interval: int) -> bool:
        step = self.trainer.step
        return step > 0 and (self.trainer.done or (interval > 0 and step % interval == 0))

    def _take_step(self) -> None:
        started = time.perf_counter()
        lr, waited = self.trainer.next_lr(), self.trainer.waits
        loss = self.trainer.take_step()
        if self.trainer.waits and not waited:
            self.display.note(
                f"step {self.trainer.step}: the host waits for the GPU within this step, so steps like it "
                "are not replayed as a CUDA graph"
            )
        ok = self.trainer.last_ok
        self._unread.append(_Unread(self.trainer.step, lr, loss, ok))
        self._unread_seconds += time.perf_counter() - started
        if self.trainer.step % self.trainer.config.train.log_interval == 0 or self.trainer.done:
            self._read_steps()

    def _read_steps(self) -> None:
        """Bring the losses of the unread steps from the device, log and show them."""
        if not self._unread:
            return
        trainer, unread = self.trainer, self._unread
        started = time.perf_counter()
        readings = trainer.readings
        scalars = [*(step.loss for step in unread), *(step.ok for step in unread), *readings.values()]
        figures = torch.stack([scalar.to(torch.float32) for scalar in scalars]).tolist()
        losses, oks = figures[: len(unread)], figures[len(unread) : 2 * len(unread)]
        parts = dict(zip(readings, figures[2 * len(unread) :], strict=True))
        flip_rate = trainer.optimizer.flip_rate()
        self._unread_seconds += time.perf_counter() - started
        self._count_dropped([bool(ok) for ok in oks])
        rate = len(unread) * trainer.bytes_per_step / self._unread_seconds
        memory = trainer.device.memory()
        self.seconds += self._unread_seconds
        self._pace.note(self._unread_seconds / len(unread))
        self._unread, self._unread_seconds = [], 0.0
        for line in getattr(trainer.task, "news", list)():
            self.display.note(f"step {trainer.step}: {line}")
        if advice := self._crowding.advice():
            self.display.note(f"step {trainer.step}: {advice}")
        lines = []
        for step, loss in zip(unread, losses, strict=True):
            # Only the last step's flips and parts can still be asked for.
            last = step is unread[-1]
            values = (
                step.step,
                step.step * trainer.bytes_per_step,
                loss,
                loss / LN2 if trainer.task.figure == "bits_per_byte" else None,
                step.lr,
                rate,
                memory,
                flip_rate if last else None,
            )
            lines.append(dict(zip(STEP_KEYS, values, strict=True)) | (parts if last else {}))
        self._log(*lines)
        self.display.update(
            Reading(
                step=trainer.step,
                loss=losses[-1],
                bits_per_byte=losses[-1] / LN2 if trainer.task.figure == "bits_per_byte" else None,
                bytes_per_second=rate,
                memory=memory,
                flip_rate=flip_rate,
                seconds_left=self._pace.seconds_of(trainer.config.train.steps - trainer.step),
            )
        )

    def _count_dropped(self, oks: Sequence[bool]) -> None:
        """Follow the steps one by one, so that when a run has diverged does not depend on `log_interval`.

        Args:
            oks: of each step since the last reading, whether it counted.
        """
        trainer = self.trainer
        for ok in oks:
            trainer.dropped_in_a_row = 0 if ok else trainer.dropped_in_a_row + 1
            self._diverged = self._diverged or trainer.dropped_in_a_row >= MAX_DROPPED_IN_A_ROW
        newly = oks.count(False)
        self._dropped += newly
        if newly:
            what = "dropped" if len(oks) == 1 else f"{newly} of {len(oks)} steps dropped"
            self.display.note(
                f"step {trainer.step}: {what}, a loss or gradient was not finite ({self._dropped} so far)"
            )

    def _evaluate(self) -> None:
        """Held-out bits per byte of some windows; the lowest so far becomes `best`."""
        trainer = self.trainer
        self._read_steps()
        started = time.perf_counter()
        result = self.undisturbed(lambda: trainer.evaluate(max_windows=trainer.config.train.eval_steps))
        seconds = time.perf_counter() - started
        self.seconds += seconds
        values = (trainer.step, result.bits_per_byte, result.num_bytes, seconds)
        right = result.captions_right
        extra = ({} if right is None else {"captions_right": right}) | result.extra
        figure = trainer.task.figure
        self._log(dict(zip(evaluation_keys(figure), values, strict=True)) | extra)
        trainer.evaluated_step = trainer.step
        self._saved_step = None  # the outcome belongs into `latest`, too
        best = result.bits_per_byte < (math.inf if trainer.best is None else trainer.best["bits_per_byte"])
        mark = ", the best so far" if best else ""
        if best:
            before = trainer.best
            trainer.best = {"step": trainer.step, "bits_per_byte": result.bits_per_byte}
            if not self._save_or_go_on(lambda: self.save("best")):
                trainer.best = before  # what is on the disk still is the best that can be had
                mark = ", better than the best that was saved"
        unit = trainer.task.unit
        read = f"{result.windows} windows" if unit == "bytes" else f"first {result.windows} {unit}"
        written = "" if right is None else f", {100 * right:.1f} % of the captions right"
        written += "".join(f", {name.replace('_', ' ')} {value:.4f}" for name, value in result.extra.items())
        self.display.note(
            f"step {trainer.step}: held out {result.bits_per_byte:.4f} {FIGURES[figure]}"
            f"{written} ({read}){mark}"
        )

    def _saved_after(self, error: UserError) -> UserError:
        """What ends the run when no step can be taken: `error`, behind which all steps are saved."""
        trainer = self.trainer
        if not trainer.step:
            return error
        self._save_latest()
        where = f"step {trainer.step} of {trainer.config.train.steps}"
        if not trainer.config.train.save:
            return UserError(f"stopped at {where}: {error}; nothing was saved (--no-save)")
        return UserError(
            f"stopped at {where}: {error}; saved {self.folder / 'latest'}, go on with --resume --run "
            f"{self.folder.name}"
        )

    def _save_or_go_on(self, save: Callable[[], None]) -> bool:
        """Save during training: a disk that takes no more costs a checkpoint, not the run.

        Returns:
            Whether it was saved.
        """
        try:
            save()
        except UserError as error:
            further = "" if self.trainer.done else "; training goes on"
            self.display.note(f"warning: step {self.trainer.step}: {error}{further}")
            return False
        return True

    def _log(self, *lines: dict[str, Any]) -> None:
        if problem := self.log.write(*lines):
            self.display.note(
                f"warning: step {self.trainer.step}: cannot write {self.log.path}: {problem}; "
                "its lines are kept until there is room, and training goes on"
            )

    def _save_latest(self) -> None:
        self._read_steps()
        if self._saved_step != self.trainer.step:
            self.save("latest", keep_previous=True)
            self._saved_step = self.trainer.step


def _mean(losses: Sequence[Tensor]) -> Tensor:
    """That of some scalars, each divided ahead of the sum, as the step's loss is."""
    first, *others = (loss / len(losses) for loss in losses)
    return sum(others, first)


def _brings(part: str, base: Checkpoint | None) -> bool:
    """Whether a base has the tensors of a part of the sidecars, such as "image.encoder"."""
    return base is not None and any(name.startswith(f"sidecars.{part}.") for name in base.weights)


def _refuse_other_model(checkpoint: Checkpoint, config: RunConfig) -> None:
    for name in checkpoint.model_config.__slots__:
        theirs, ours = getattr(checkpoint.model_config, name), getattr(config.model, name)
        if theirs != ours:
            raise UserError(
                f"{checkpoint.folder} is a checkpoint of another model: "
                f"{name} is {theirs} there, {ours} in this run"
            )
