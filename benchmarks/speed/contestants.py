"""Who is timed: the step of `arbitor train`, and the same network with dense weights under fused AdamW.

Shape letters: B windows, L bytes of a window.
"""

import contextlib
import gc
import math
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec

import numpy as np
import torch

from arbitor.config import RunConfig
from arbitor.config import preset as preset_config
from arbitor.data import ByteCorpus, Sampler
from arbitor.data.stream import ByteStream
from arbitor.errors import UserError
from arbitor.model import ARBModel
from arbitor.ternary.audit import audit
from arbitor.train.device import deterministic, keep_freed_memory, peak_memory, resolve_device
from arbitor.train.loop import Trainer
from benchmarks.common import float_products
from benchmarks.counts import counts
from benchmarks.learning.twins import DenseLinear, make_twin
from benchmarks.speed.clock import idle_seconds, matmul_peak

TEXT_BYTES = 4_000_000
DENSE_LR = 1e-3
CONTESTANTS = ("trits", "dense-autocast", "dense-bf16", "dense-fp32", "dense-compiled", "torchao")
SLOW_BF16 = 4  # times that a product takes in bf16 of what it takes in fp32: no peer


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """What is timed.

    Attributes:
        preset: name of the preset.
        batch: windows of a micro-batch.
        accum: micro-batches of a step.
        ctx: bytes of a window.
        state: what training with trits keeps.
        rule: direction of the votes.
        device: auto, cpu or cuda.
        warmup: steps ahead of the timed ones.
        steps: timed steps.
        threads: on the CPU; None leaves torch's own number.
        profiled: steps after those, for `Timing.idle_ms`.
    """

    preset: str
    batch: int
    accum: int = 1
    ctx: int
    state: str
    rule: str = "spectral"
    device: str = "auto"
    warmup: int = 5
    steps: int = 20
    threads: int | None = None
    profiled: int = 0

    @property
    def bytes_per_step(self) -> int:
        """Bytes of text that a step reads."""
        return self.batch * self.accum * self.ctx

    def config(self) -> RunConfig:
        """The preset with these settings."""
        return preset_config(
            self.preset,
            ctx=self.ctx,
            steps=10 * (self.warmup + self.steps),  # the schedule must not come to its end
            batch=self.batch,
            accum=self.accum,
            state=self.state,
            rule=self.rule,
            device=self.device,
        )


@dataclass(frozen=True, slots=True)
class Timing:
    """What was measured.

    Attributes:
        ms_per_step: mean over the timed steps on a GPU, where they run without a wait between them; median on
            the CPU.
        peak_bytes: what torch allocated at most on a GPU, what the process held at most on the CPU.
        kept_bytes: weights and everything that is kept between steps.
        weights: trained weights of all kinds.
        share_of_peak: 6 operations an active weight and byte, over the measured `matmul_peak` of the device.
        iterations: of the core, mean over positions of the last forward; 0 without a core.
        idle_ms: of a step in which nothing ran on the GPU, by the profiler; NaN where none was profiled.
    """

    ms_per_step: float
    peak_bytes: int
    kept_bytes: int
    weights: int
    share_of_peak: float
    iterations: float
    idle_ms: float


def why_absent(contestant: str, setting: Setting) -> str | None:
    """Why a contestant cannot take part here, or None if it can."""
    on_gpu = resolve_device(setting.device).is_cuda
    if contestant in ("dense-autocast", "torchao") and not on_gpu:
        return "the CPU's peers are plain fp32 and bf16"
    if contestant == "torchao" and find_spec("torchao") is None:
        return "torchao is not installed (pip install --no-deps torchao)"
    if contestant != "trits" and preset_config(setting.preset).model.num_experts:
        return f"the twin has no dense experts, which {setting.preset} needs"
    if contestant == "dense-fp32" and on_gpu:
        return "a GPU's peers are bf16"
    if contestant == "dense-compiled" and on_gpu:
        return "a GPU's peers are compiled all of them"
    if contestant == "dense-compiled" and shutil.which("g++") is None:
        return "torch.compile needs g++ on a CPU"
    if contestant == "dense-bf16" and not on_gpu and _bf16_over_fp32() > SLOW_BF16:
        return f"a product takes over {SLOW_BF16} times as long in bf16 as in fp32 here"
    return None


@cache
def _bf16_over_fp32(size: int = 256) -> float:
    """Time of a product on the CPU, the quickest of three, in bf16 over that in fp32."""
    seconds = []
    for dtype in (torch.bfloat16, torch.float32):
        a = torch.ones(size, size, dtype=dtype)
        taken = []
        for _ in range(3):
            began = time.perf_counter()
            a @ a
            taken.append(time.perf_counter() - began)
        seconds.append(min(taken))
    return seconds[0] / seconds[1]


def measure(contestant: str, setting: Setting) -> Timing:
    """Time a contestant in this process, which should be a fresh one: peaks are those of the process.

    Raises:
        UserError: a contestant that there is not.
    """
    if setting.threads is not None:
        torch.set_num_threads(setting.threads)
    device = resolve_device(setting.device)
    peak = matmul_peak(device)
    gc.collect()
    if device.is_cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device.device)
    make = _trits if contestant == "trits" else _dense
    with make(contestant, setting) as (model, take_step, kept):
        for _ in range(setting.warmup):
            take_step()
        times = []
        device.synchronize()
        began = time.perf_counter()
        for _ in range(setting.steps):
            before = time.perf_counter()
            take_step()
            times.append(time.perf_counter() - before)
        device.synchronize()
        whole = (time.perf_counter() - began) / setting.steps
        seconds = whole if device.is_cuda else statistics.median(times)
        kept_bytes, weights = kept()
        profiled = setting.profiled if device.is_cuda else 0
        idle_ms = 1e3 * idle_seconds(take_step, device, profiled) if profiled else math.nan
        iterations = float(model.part_metrics().get("mean_iterations", torch.zeros(())))
    operations = 6 * counts(setting.config().model).active * setting.bytes_per_step
    return Timing(
        ms_per_step=1e3 * seconds,
        peak_bytes=peak_memory(device),
        kept_bytes=kept_bytes,
        weights=weights,
        share_of_peak=operations / seconds / peak,
        iterations=iterations,
        idle_ms=idle_ms,
    )


Made = tuple[ARBModel, Callable[[], object], Callable[[], tuple[int, int]]]


@contextlib.contextmanager
def _trits(_: str, setting: Setting) -> Iterator[Made]:
    """The trainer of `arbitor train` on random text, under its settings of torch."""
    device = resolve_device(setting.device)
    config = setting.config()
    with deterministic(config.train.seed, device.device):
        trainer = Trainer(config, _corpus(), device)

        def kept() -> tuple[int, int]:
            report = audit(trainer.model, trainer.optimizer)
            return report.total_bytes, report.trained_weights

        yield trainer.model, trainer.take_step, kept


@contextlib.contextmanager
def _dense(contestant: str, setting: Setting) -> Iterator[Made]:
    """The float twin: bf16 weights, or fp32 ones (on a GPU under bf16 autocast).

    It is compiled on a GPU, and on a CPU as `dense-compiled`, with fp32 weights.

    torchao's training in few bits: bf16 weights, rounded stochastically, and moments of 8 bits.
    """
    if contestant not in CONTESTANTS:
        raise UserError(f"unknown contestant {contestant!r}; choose from {', '.join(CONTESTANTS)}")
    device = resolve_device(setting.device)
    if not device.is_cuda:
        keep_freed_memory()  # as the trainer does
    model = ARBModel(config=setting.config().model, device=device.device)
    make_twin(model, DenseLinear)
    if contestant in ("dense-bf16", "torchao"):
        model.to(torch.bfloat16)
    optimizer = _adamw(model, in_few_bits=contestant == "torchao")
    loss_of = torch.compile(model) if device.is_cuda or contestant == "dense-compiled" else model
    sampler = Sampler(_corpus().train, setting.batch, setting.ctx, 0)

    def take_step() -> None:
        for _ in range(setting.accum):
            ids_BL = torch.from_numpy(sampler.next())
            if device.is_cuda:  # no wait for the GPU, as in the trainer
                ids_BL = ids_BL.pin_memory().to(device.device, non_blocking=True)
            (loss_of(ids_BL, targets=ids_BL).loss / setting.accum).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def kept() -> tuple[int, int]:
        states = [v for state in optimizer.state.values() for v in state.values() if torch.is_tensor(v)]
        tensors = [*model.parameters(), *states]
        return sum(map(_nbytes, tensors)), sum(p.numel() for p in model.parameters())

    with float_products() if device.is_cuda else contextlib.nullcontext():
        yield model, take_step, kept


def _adamw(model: ARBModel, *, in_few_bits: bool) -> torch.optim.Optimizer:
    if not in_few_bits:
        return torch.optim.AdamW(model.parameters(), lr=DENSE_LR, betas=(0.9, 0.95), fused=True)
    from torchao.optim import AdamW8bit

    optimizer: torch.optim.Optimizer = AdamW8bit(
        model.parameters(), lr=DENSE_LR, betas=(0.9, 0.95), bf16_stochastic_round=True
    )
    return optimizer


def _nbytes(tensor: torch.Tensor) -> int:
    """Of a tensor, or of all that one made of others is made of."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return tensor.nbytes
    names, _ = tensor.__tensor_flatten__()
    return sum(_nbytes(getattr(tensor, name)) for name in names)


def _corpus() -> ByteCorpus:
    text = np.random.default_rng(0).integers(0, 256, TEXT_BYTES, dtype=np.uint8)
    return ByteCorpus(train=ByteStream([text]), held_out=ByteStream([text[:1]]), description="random bytes")
