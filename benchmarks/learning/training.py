"""One run: train a contestant on the device's copy of the text, then measure it on the held-out text.

Shape letters: B windows of a step, L bytes of a window.
"""

import datetime
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from arbitor.evaluate import bits_per_byte
from arbitor.train.recorded import RecordedStep, can_record
from arbitor.train.schedule import learning_rate
from arbitor.train.task import Task
from benchmarks.common import device_name
from benchmarks.learning.contestants import Run, Trainee, build
from benchmarks.learning.sizes import Size

EVAL_BATCH = 256
DEADLINE_EVERY = 10  # steps between two looks at the clock


def train(
    trainee: Trainee,
    size: Size,
    text: Tensor,
    seed: int,
    out_of_time: Callable[[], bool],
    after_step: Callable[[int], None] | None = None,
) -> bool:
    """All optimizer steps of a run, without a synchronisation of the device.

    Args:
        trainee: model and optimizers.
        size: steps, batch and context.
        text: uint8 [bytes] on the model's device.
        seed: of the data order, which is the same for every contestant.
        out_of_time: asked now and then; a True ends the run.
        after_step: called with the number of finished steps.

    Returns:
        Whether all steps were taken.
    """
    generator = torch.Generator().manual_seed(seed)
    ctx = size.model.ctx
    starts = torch.randint(len(text) - ctx + 1, (size.steps, size.batch, 1), generator=generator)
    starts = starts.to(text.device)
    within_L = torch.arange(ctx, device=text.device)

    def loss_of(*batch: Tensor) -> Tensor:
        loss = trainee.model(*batch, targets=batch[0]).loss
        assert loss is not None
        return loss

    take_step = stepper(trainee, loss_of)
    for step in range(size.steps):
        if step % DEADLINE_EVERY == 0 and out_of_time():
            return False
        take_step(learning_rate(step, size.steps, 1.0), text[starts[step] + within_L].long())
        if after_step is not None:
            after_step(step + 1)
    return True


def train_on(trainee: Trainee, task: Task, steps: int, peak: float = 1.0) -> None:
    """All optimizer steps of a run on a task of `arbitor train`, up to `peak` times the trainee's rates."""
    trainee.model.train()

    def loss_of(*batch: Tensor) -> Tensor:
        loss = task.output(trainee.model, *batch).loss
        assert loss is not None
        return loss

    take_step = stepper(trainee, loss_of, fixed_shapes=task.fixed_shapes)
    for step in range(steps):
        take_step(learning_rate(step, steps, peak), *task.next_batch())


def stepper(
    trainee: Trainee, loss_of: Callable[..., Tensor], *, fixed_shapes: bool = True
) -> Callable[..., None]:
    """How to take a step of any contestant: (share of the peak rates, tensors of the batch) -> None.

    On a GPU steps are replayed from a graph: of trits all of them, of floats the forward and the backward,
    since torch's optimizers read their rates on the host.

    Args:
        trainee: model and optimizers.
        loss_of: (tensors of the batch) -> loss.
        fixed_shapes: whether every batch has the same; otherwise nothing is recorded.
    """
    recording = fixed_shapes and can_record(trainee.model)
    floats = [parameter for parameter in trainee.model.parameters() if parameter.requires_grad]
    gradients: list[Tensor | None] = []

    def whole(batch: Sequence[Tensor]) -> dict[str, Tensor]:
        loss = loss_of(*batch)
        loss.backward()
        trainee.apply()
        return {"loss": loss}

    def backward(batch: Sequence[Tensor]) -> dict[str, Tensor]:
        for parameter in floats:
            parameter.grad = None  # so that a recording's gradients are its own and are not added to
        loss = loss_of(*batch)
        loss.backward()
        gradients[:] = [parameter.grad for parameter in floats]
        return {"loss": loss}

    if not recording or not floats:
        all_of_it = RecordedStep(whole, trainee.model.device) if recording else whole

        def take_step(share: float, *batch: Tensor) -> None:
            trainee.prepare(share)
            all_of_it(batch)

        return take_step
    forth_and_back = RecordedStep(backward, trainee.model.device)

    def take_float_step(share: float, *batch: Tensor) -> None:
        trainee.prepare(share)
        forth_and_back(batch)
        for parameter, gradient in zip(floats, gradients, strict=True):
            parameter.grad = gradient
        trainee.apply()

    return take_float_step


def measure(
    run: Run,
    size: Size,
    text: Tensor,
    held_out: np.ndarray,
    out_of_time: Callable[[], bool] = lambda: False,
) -> dict[str, str] | None:
    """Train and evaluate one run.

    Args:
        run: contestant, learning rate and seed.
        size: scale of the comparison.
        text: uint8 [bytes] to train on, on the device to train on.
        held_out: uint8 [bytes] to measure on.
        out_of_time: True abandons the run.

    Returns:
        The row of the results, or None if the time ran out. `seconds` is training alone, without evaluation.
    """
    device = text.device
    trainee = build(run, size.model, device)
    best = float("inf")
    evaluating = 0.0

    def track(step: int) -> None:
        nonlocal best, evaluating
        if size.track_every and step % size.track_every == 0 and step < size.steps:
            _synchronize(device)
            begin = time.perf_counter()
            best = min(best, _evaluate(trainee, size, held_out))
            evaluating += time.perf_counter() - begin

    begin = time.perf_counter()
    if not train(trainee, size, text, run.seed, out_of_time, track):
        return None
    _synchronize(device)
    seconds = time.perf_counter() - begin - evaluating
    final = _evaluate(trainee, size, held_out)
    weights = trainee.trunk_weights()
    return {
        "contestant": run.contestant,
        "lr": format(run.lr, "g"),
        "seed": str(run.seed),
        "trunk_weights": str(weights),
        "bytes_seen": str(size.bytes_seen),
        "bytes_per_weight": format(trainee.trunk_bytes() / weights, ".4f"),
        "held_out_bits_per_byte": format(min(best, final), ".5f"),
        "seconds": format(seconds, ".1f"),
        "device": device_name(device),
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
    }


def _evaluate(trainee: Trainee, size: Size, held_out: np.ndarray) -> float:
    result = bits_per_byte(
        trainee.model, held_out, size.model.ctx, max_bytes=size.held_out_bytes, batch=EVAL_BATCH
    )
    return result.bits_per_byte


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Worker:
    """What one process keeps between runs: its size and the texts on its device."""

    _size: Size
    _text: Tensor
    _held_out: np.ndarray
    _deadline: float

    @classmethod
    def start(
        cls, size: Size, train_path: str, held_out_path: str, device: str, threads: int, deadline: float
    ) -> None:
        """Load the texts (.npy, uint8); `deadline` is a `time.time()`, `threads` those of one process."""
        torch.set_num_threads(threads)
        cls._size = size
        cls._text = torch.from_numpy(np.load(train_path)).to(device)
        cls._held_out = np.load(held_out_path)
        cls._deadline = deadline

    @classmethod
    def measure(cls, run: Run) -> dict[str, str] | None:
        """`measure` with what `start` loaded; None once the deadline has passed."""
        return measure(run, cls._size, cls._text, cls._held_out, lambda: time.time() > cls._deadline)
