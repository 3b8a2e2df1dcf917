"""One run: the steps of `arbitor train` on a variant, then its figure on the held-out text."""

import os
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from arbitor.config import DataConfig, RunConfig, TrainConfig
from arbitor.data import ByteCorpus
from arbitor.data.stream import ByteStream
from arbitor.evaluate import bits_per_byte
from arbitor.ternary.audit import audit
from arbitor.train.device import Device, deterministic, resolve_device
from arbitor.train.loop import Trainer
from benchmarks.ablation.variants import config_of, variants_of
from benchmarks.common import provenance
from benchmarks.counts import counts
from benchmarks.learning.sizes import Size
from benchmarks.speed.clock import seconds_of

EVAL_BATCH = 256
LAST_SHARE = 10  # the metrics of the parts are means over the last tenth of the steps
PART_COLUMNS = {
    "mean_iterations": "mean_iterations",
    "max_load": "expert_load",
    "motif_perplexity": "motif_perplexity",
}
COLUMNS = (
    "variant",
    "seed",
    "lr",
    "trit_weights",
    "active_trit_weights",
    "bytes_per_weight",
    "state",
    "bytes_seen",
    "seconds",
    "held_out_bits_per_byte",
    *PART_COLUMNS,
    "commit",
    "text",
    "device",
    "torch",
    "date",
)
KEY = ("variant", "seed", "lr", "state", "bytes_seen")
# Of runs that all take the same time.
TIMED_COLUMNS = (*COLUMNS[: COLUMNS.index("bytes_seen")], "limit", *COLUMNS[COLUMNS.index("bytes_seen") :])
TIMED_KEY = ("variant", "seed", "lr", "state", "limit")
WARM_UP = 8  # steps that compile and record, ahead of those that are timed
TIMED_STEPS = 24
MOST_OFF = 0.05  # share of its time that a run may take more or less, as far as one more try helps


@dataclass(frozen=True, slots=True)
class Run:
    """One training of one variant.

    Attributes:
        variant: its name.
        seed: of initialisation, data order and stochastic rounding.
        lr: peak learning rate, trits per step.
        state: what training keeps.
        bytes_seen: bytes trained on; 0 if time decides.
        limit: seconds of training that it has; 0 if bytes decide.
    """

    variant: str
    seed: int
    lr: float
    state: str
    bytes_seen: int
    limit: float = 0.0

    def __str__(self) -> str:
        return f"{self.variant} seed {self.seed} lr {self.lr:g} {self.state}"

    def identify(self) -> dict[str, str]:
        """The columns that identify the run's row."""
        return {
            "variant": self.variant,
            "seed": str(self.seed),
            "lr": format(self.lr, "g"),
            "state": self.state,
            **({"limit": format(self.limit, "g")} if self.limit else {"bytes_seen": str(self.bytes_seen)}),
        }


@dataclass(frozen=True, slots=True)
class Job:
    """What all runs of a comparison share, small enough to be sent to a process.

    Attributes:
        size: architecture, steps, batch.
        train_path, held_out_path: uint8 .npy files.
        text: fingerprint of both.
        device: auto, cpu or cuda.
        threads: of a process on the CPU.
        commit: of the code.
    """

    size: Size
    train_path: str
    held_out_path: str
    text: str
    device: str
    threads: int
    commit: str


def measure_on(gpu: str | None, run: Run, job: Job) -> dict[str, str]:
    """`measure` in a fresh process that sees this GPU only (None: whatever there is)."""
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    torch.set_num_threads(job.threads)
    return measure(run, job)


def measure(run: Run, job: Job) -> dict[str, str]:
    """Train and evaluate one run.

    Where time decides, the number of steps is that by the time of a few, and is corrected once by what all of
    them took: how long a step takes changes with the iterations that a model learns to take.

    Returns:
        The row of the results. `seconds` is training alone, without evaluation.
    """
    if not run.limit:
        return _measure(run, job, job.size.steps)[0]
    steps = max(1, round(run.limit / _seconds_a_step(run, job)))
    row, seconds = _measure(run, job, steps)
    if abs(seconds - run.limit) > MOST_OFF * run.limit:
        row, _ = _measure(run, job, max(1, round(steps * run.limit / seconds)))
    return row


def _seconds_a_step(run: Run, job: Job) -> float:
    device, trainer, _ = _made(run, job, WARM_UP + TIMED_STEPS)
    with deterministic(run.seed, device.device):
        return seconds_of(trainer.take_step, device, warmup=WARM_UP, repeats=1, calls=TIMED_STEPS)


def _made(run: Run, job: Job, steps: int) -> tuple[Device, Trainer, ByteCorpus]:
    size = job.size
    config = RunConfig(
        preset=size.name,
        model=config_of(variants_of(size.model)[run.variant], size),
        train=TrainConfig(
            steps=steps, batch=size.batch, lr=run.lr, state=run.state, seed=run.seed, save=False
        ),
        data=DataConfig(),
    )
    streams = (ByteStream([np.load(path, mmap_mode="r")]) for path in (job.train_path, job.held_out_path))
    corpus = ByteCorpus(train=next(streams), held_out=next(streams), description=job.text)
    device = resolve_device(job.device)
    with deterministic(run.seed, device.device):
        return device, Trainer(config, corpus, device), corpus


def _measure(run: Run, job: Job, steps: int) -> tuple[dict[str, str], float]:
    """The row of a run of so many steps, and the seconds that they took."""
    size = job.size
    device, trainer, corpus = _made(run, job, steps)
    with deterministic(run.seed, device.device):
        parts = _Means(steps - max(1, steps // LAST_SHARE))
        device.synchronize()
        began = time.perf_counter()
        while not trainer.done:
            trainer.take_step()
            parts.add(trainer.step, trainer.readings)
        device.synchronize()
        seconds = time.perf_counter() - began
        trainer.model.eval()
        result = bits_per_byte(
            trainer.model,
            corpus.held_out.as_array(size.held_out_bytes),
            trainer.model.config.ctx,
            max_bytes=size.held_out_bytes,
            batch=EVAL_BATCH,
        )
    report = audit(trainer.model, trainer.optimizer)
    sizes = counts(trainer.model.config)
    assert report.trit_weights == sizes.total
    figures = parts.values()
    row = {
        **run.identify(),
        "trit_weights": str(sizes.total),
        "active_trit_weights": str(sizes.active),
        "bytes_per_weight": format(report.bytes_per_weight, ".4f"),
        "bytes_seen": str(steps * size.batch * size.model.ctx),
        "seconds": format(seconds, ".1f"),
        "held_out_bits_per_byte": format(result.bits_per_byte, ".5f"),
        **{
            column: format(figures[name], ".3f") if name in figures else ""
            for column, name in PART_COLUMNS.items()
        },
        "text": job.text,
        **provenance(device.device, job.commit),
    }
    return row, seconds


class _Means:
    """Means of scalars on the device over the steps after `first`, without a synchronisation."""

    def __init__(self, first: int) -> None:
        self._first = first
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = defaultdict(int)

    def add(self, step: int, readings: Mapping[str, Tensor]) -> None:
        if step <= self._first:
            return
        for name, value in readings.items():
            value = value.detach().double()
            self._sums[name] = self._sums[name] + value if name in self._sums else value
            self._counts[name] += 1

    def values(self) -> dict[str, float]:
        return {name: float(total) / self._counts[name] for name, total in self._sums.items()}
