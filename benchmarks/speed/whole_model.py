"""Goals of whole models: steps of training, first updates, and what fits under a cap of memory."""

import contextlib
import dataclasses
import functools
import gc
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from arbitor.config import ModelConfig
from arbitor.config import preset as preset_config
from arbitor.errors import UserError
from arbitor.model import ARBModel
from arbitor.ops import compilers
from arbitor.smoke import fingerprint
from arbitor.ternary import TernaryExperts, VoteOptimizer
from arbitor.ternary.audit import audit
from arbitor.train.ahead import compile_for_run
from arbitor.train.device import Device, deterministic, peak_memory, resolve_device
from arbitor.train.recorded import RecordedStep, can_record
from benchmarks.common import REPOSITORY
from benchmarks.counts import counts
from benchmarks.speed.clock import seconds_of
from benchmarks.speed.contestants import Setting, why_absent
from benchmarks.speed.table import in_own_process

ROUNDS_ON_CPU = 3
PROFILED = 3
FEW_TOKENS_CTX = 4
CAP_BYTES = 3.5 * (1 << 30)
CAP_WEIGHTS = 2_000_000_000
CAP_STEPS = 100
CAP_CTX = 260  # 257 bytes of it are predicted
PAIRS = 50
STARTS = 3  # of which the quickest counts, of ours and of torch's alone
FIRST_CTX = 64
# This file as a program, and what it takes to import torch, which is most of what a start takes.
TIMED_SCRIPT = (
    "import runpy, time; began = time.perf_counter(); import torch; seconds = time.perf_counter() - began; "
    "runpy.run_module('benchmarks.speed.whole_model', run_name='__main__'); print(seconds)"
)


def training_step(
    device: Device, preset: str = "base", batch: int = 32, ctx: int = 1024
) -> Mapping[str, float]:
    """G3: a step of `arbitor train` against the dense twins, compiled, with fused AdamW."""
    kind = device.device.type
    setting = Setting(preset=preset, batch=batch, ctx=ctx, state="full", device=kind, profiled=PROFILED)
    timings = {
        name: in_own_process(name, setting)
        for name in ("trits", "dense-autocast", "dense-bf16")
        if why_absent(name, setting) is None
    }
    rates = {name: 1e3 * setting.bytes_per_step / timing.ms_per_step for name, timing in timings.items()}
    idle = {f"of a step, GPU idle, {name}": timing.idle_ms for name, timing in timings.items()}
    return {"speed over the faster dense twin": _over_the_faster(rates), **rates, **idle}


def on_the_cpu(device: Device, preset: str = "tiny", steps: int = 20) -> Mapping[str, float]:
    """C1: `tiny` against plain fp32 and bf16, the import, and the default job; beside it a compiled twin."""
    config = preset_config(preset)
    setting = Setting(
        preset=preset, batch=config.train.batch, ctx=config.model.ctx, state="full", device="cpu", steps=steps
    )
    times: dict[str, list[float]] = {}
    for _ in range(ROUNDS_ON_CPU):  # in turn, so that what else the machine does meets all alike
        for name in ("trits", "dense-fp32", "dense-bf16", "dense-compiled"):
            if why_absent(name, setting) is None:
                times.setdefault(name, []).append(in_own_process(name, setting).ms_per_step)
    rates = {name: 1e3 * setting.bytes_per_step / min(taken) for name, taken in times.items()}
    compiled = rates.pop("dense-compiled", math.nan)
    return {
        "speed over the faster dense twin": _over_the_faster(rates),
        "speed over a compiled fp32 twin": rates["trits"] / compiled,
        "import arbitor": min(_import_seconds() for _ in range(3)),
        "default job": _default_job_seconds(),
    }


def few_tokens(device: Device, config: ModelConfig | None = None, steps: int = 20) -> Mapping[str, float]:
    """G4: one window of 4 bytes through forward, backward and update of `arb-1b`, lean state.

    Experts in one iteration without motifs and graph, as in the earlier system's 348 + 586 ms.
    """
    if config is None:
        config = dataclasses.replace(
            preset_config("arb-1b").model, max_moe_iters=1, motif_trits=0, graph_edges=0
        )
    figures: dict[str, float] = {}
    gc.collect()  # what goals before this one have left
    others = torch.cuda.memory_allocated(device.device) if device.is_cuda else 0
    for rule in ("spectral", "row"):
        with deterministic(0, device.device):
            model = ARBModel(config=config, device=device.device)
            optimizer = VoteOptimizer(model, rule=rule, state="lean")
            if device.is_cuda:
                torch.cuda.reset_peak_memory_stats(device.device)
            step, eager_step = _steps_of_few_tokens(model, optimizer, device)
            figures[f"step, {rule} votes"] = 1e3 * seconds_of(step, device, warmup=5, repeats=steps)
            if rule == "spectral":
                weights = audit(model, optimizer).trained_weights
                figures["peak"] = (peak_memory(device) - others) / weights
                changed = _changed_without_tokens(model, optimizer, eager_step)
                figures["experts changed without tokens"] = changed
        optimizer.detach()
        del model, optimizer, step, eager_step
    return figures


def _steps_of_few_tokens(
    model: ARBModel, optimizer: VoteOptimizer, device: Device
) -> tuple[Callable[[], None], Callable[[], None]]:
    """A step as `arbitor train` takes it, replayed where that is possible, and one that never is."""

    def work(batch: Sequence[Tensor]) -> dict[str, Tensor]:
        loss = model(batch[0], targets=batch[0]).loss
        assert loss is not None
        optimizer.note_loss(loss)
        loss.backward()
        optimizer.apply()
        return {"loss": loss}

    def step(take: Callable[[Sequence[Tensor]], object]) -> None:
        optimizer.prepare()
        take([torch.randint(0, 256, (1, FEW_TOKENS_CTX))])

    take_step = RecordedStep(work, device.device) if can_record(model) else work
    return functools.partial(step, take_step), functools.partial(step, work)


def many_tokens(
    device: Device, preset: str = "arb-1b", batch: int = 8, accum: int = 8
) -> Mapping[str, float]:
    """G5: steps of 64 x 1,024 bytes in micro-batches, lean state."""
    config = preset_config(preset).model
    setting = Setting(
        preset=preset,
        batch=batch,
        accum=accum,
        ctx=config.ctx,
        state="lean",
        device=device.device.type,
        steps=5,
    )
    timing = in_own_process("trits", setting)
    sizes = counts(config)
    core = (sizes.work - sizes.active) / max(1, config.max_moe_iters - 1)
    again = core * max(0.0, timing.iterations - 1)
    return {
        "share of bf16 peak on active weights": timing.share_of_peak,
        "share of bf16 peak, the core as often as iterated": timing.share_of_peak
        * (1 + again / sizes.active),
    }


def cold_start(device: Device, preset: str = "arb-1b", pairs: int = PAIRS) -> Mapping[str, float]:
    """G7: from the start of Python to the end of the first update, with empty caches and with warm ones.

    Every process is a fresh one. First nothing is compiled ahead; then the process compiles at once what it
    will need, as `arbitor train` does; then the command for that runs first, which measures thresholds as
    well. All three begin with empty caches. Of each, some of the time is that of `import torch`. The bytecode
    of all modules is there, as `pip install` leaves it. The peer is a process that takes a step of one linear
    of torch's.
    """
    kind = device.device.type
    with _bytecode(kind) as bytecode:
        return _cold_start(kind, preset, pairs, bytecode)


def _cold_start(kind: str, preset: str, pairs: int, bytecode: Mapping[str, str]) -> Mapping[str, float]:
    with _empty_caches(bytecode) as caches:
        first, _, first_import = _run_script("first", preset, kind, "0", extra=caches)
        _, compiled, _ = _run_script("first", preset, kind, str(pairs), extra=caches)
        second, second_import = _quickest("first", preset, kind, caches)
    with _empty_caches(bytecode) as caches:
        ahead, _, ahead_import = _run_script("ahead", preset, kind, "0", extra=caches)
        again, _ = _quickest("ahead", preset, kind, caches)
    with _empty_caches(bytecode) as caches:
        command = ["smoke", "--preset", preset, "--device", kind, "--ctx", str(FIRST_CTX), "--backward"]
        began = time.perf_counter()
        _python(["-m", "arbitor", *command, "--warmup"], extra=caches)
        warm_up = time.perf_counter() - began
        warmed, compiled_later, _ = _run_script("first", preset, kind, str(pairs), extra=caches)
    return {
        "first update, empty caches": first,
        "first update, empty caches, compiled ahead": ahead,
        "first update, second process": second,
        "first update, second process after compiling ahead": again,
        "of the first update, empty caches: import torch": first_import,
        "of the first update, compiled ahead: import torch": ahead_import,
        "of the second process: import torch": second_import,
        "a step of one linear of torch, second process": min(
            _linear_of_torch(kind, bytecode) for _ in range(STARTS)
        ),
        f"kernels compiled over {PAIRS} batches and contexts": compiled_later,
        f"the same without smoke --warmup ahead, after a step of {FIRST_CTX} bytes": compiled,
        "smoke --warmup with two updates, empty caches": warm_up,
        "first update after smoke --warmup": warmed,
    }


def _quickest(script: str, preset: str, kind: str, caches: Mapping[str, str]) -> tuple[float, float]:
    """Seconds to the first update, and of them of `import torch`, in the quickest of some starts."""
    starts = (_run_script(script, preset, kind, "0", extra=caches) for _ in range(STARTS))
    return min((seconds, importing) for seconds, _, importing in starts)


@contextlib.contextmanager
def _empty_caches(settings: Mapping[str, str]) -> Iterator[dict[str, str]]:
    """With these settings a process also finds nothing that another compiled or measured."""
    with tempfile.TemporaryDirectory() as scratch:
        yield {
            **settings,
            "TRITON_CACHE_DIR": str(Path(scratch, "triton")),
            "TORCHINDUCTOR_CACHE_DIR": str(Path(scratch, "inductor")),
            "CUDA_CACHE_PATH": str(Path(scratch, "cuda")),
            "ARB_THRESHOLDS": str(Path(scratch, "thresholds.json")),
        }


@contextlib.contextmanager
def _bytecode(kind: str) -> Iterator[dict[str, str]]:
    """Settings with which a process finds the bytecode of all modules that a first update imports.

    A machine may have packages without it, and forbid to write it; Python then compiles torch anew each time.
    """
    with tempfile.TemporaryDirectory() as folder:
        settings = {"PYTHONPYCACHEPREFIX": folder, "PYTHONDONTWRITEBYTECODE": ""}
        with _empty_caches(settings) as caches:
            _run_script("ahead", "tiny", kind, "0", extra=caches)
        yield settings


def _linear_of_torch(kind: str, bytecode: Mapping[str, str]) -> float:
    """Seconds from the start of Python to the end of a step of a linear, without torch's optimizers.

    Those import torch's compiler, which takes a second of its own.
    """
    code = (
        f"import os, time, torch; layer = torch.nn.Linear(64, 64, device='{kind}'); "
        f"layer(torch.randn(64, 64, device='{kind}')).square().mean().backward(); "
        "layer.weight.data.sub_(layer.weight.grad, alpha=0.1); "
        "layer.weight.sum().item(); print(time.time() - float(os.environ['ARB_BENCHMARK_BEGAN']))"
    )
    return float(_python(["-c", code], extra=bytecode))


def under_a_cap(device: Device, preset: str = "arb-1b") -> Mapping[str, float]:
    """G8: as many experts as make 2 billion weights, 100 steps of 257 predicted bytes under 3.5 GiB."""
    config = preset_config(preset).model
    while counts(config).total < CAP_WEIGHTS:
        config = dataclasses.replace(config, num_experts=config.num_experts + 1)
    weights, steps, _ = _run_script("cap", preset, device.device.type, str(config.num_experts))
    return {"weights trained": weights, "steps of 256 tokens": steps}


def first_update(preset: str, device: str, pairs: int, ahead: bool = False) -> tuple[float, float]:
    """For `cold_start`, in a fresh process: seconds since Python started, and kernels compiled later.

    The later steps are of `pairs` pairs of a batch and a context that all differ. With `ahead`, a step's
    kernels are compiled at once first, where there are any that nobody compiled.
    """
    began = float(os.environ["ARB_BENCHMARK_BEGAN"])
    if ahead:
        compilers.fork_compilers()
    place = resolve_device(device)
    if ahead:
        config = preset_config(preset, state="lean", batch=1, ctx=FIRST_CTX)
        compile_for_run(config, place, functools.partial(print, file=sys.stderr))
    torch.manual_seed(0)
    model = ARBModel(preset, device=device)
    optimizer = VoteOptimizer(model, state="lean")

    def step(batch: int, ctx: int) -> None:
        ids_BL = torch.randint(0, 256, (batch, ctx))
        model(ids_BL, targets=ids_BL).loss.backward()
        optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()

    step(1, FIRST_CTX)
    seconds = time.time() - began
    cache = Path(os.environ["TRITON_CACHE_DIR"])
    before = len(list(cache.rglob("*.cubin")))
    for number in range(pairs):
        step(1 + number % 5, 16 + 13 * number)
    return seconds, float(len(list(cache.rglob("*.cubin"))) - before)


def capped_training(preset: str, num_experts: int) -> tuple[float, float]:
    """For `under_a_cap`, in a fresh process: weights that were trained, and steps until memory ran out."""
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(CAP_BYTES / total)
    steps = 0
    weights = 0
    try:
        model = ARBModel(preset, device="cuda", num_experts=num_experts)
        optimizer = VoteOptimizer(model, state="lean")
        weights = counts(model.config).total
        while steps < CAP_STEPS:
            ids_BL = torch.randint(0, 256, (1, CAP_CTX))
            model(ids_BL, targets=ids_BL).loss.backward()
            optimizer.step()
            torch.cuda.synchronize()
            steps += 1
    except torch.cuda.OutOfMemoryError as error:
        print(f"out of memory after {steps} steps: {str(error).splitlines()[0]}", file=sys.stderr)
    return float(weights if steps else 0), float(steps)


def _changed_without_tokens(model: ARBModel, optimizer: VoteOptimizer, step: object) -> float:
    """How many experts a step changes that no position used; 0 without experts."""
    if model.core is None or model.core.moe is None:
        return 0.0
    used: list[Tensor] = []
    hook = model.core.moe.router.register_forward_hook(lambda _, __, routing: used.append(routing.load))
    before = _expert_fingerprints(model, optimizer)
    assert callable(step)
    step()
    hook.remove()
    after = _expert_fingerprints(model, optimizer)
    idle_E = torch.stack(used).sum(dim=0) == 0
    return float(sum(before[e] != after[e] for e in idle_E.nonzero()[:, 0].tolist()))


def _expert_fingerprints(model: ARBModel, optimizer: VoteOptimizer) -> list[list[int]]:
    """What each expert keeps, as integers that any change of it changes."""
    experts: list[list[Tensor]] = [[] for _ in range(model.config.num_experts)]
    for module in model.modules():
        if isinstance(module, TernaryExperts):
            state = optimizer.state[module.stored]
            for tensor in (module.T_packed, module.E, *state.values()):
                if isinstance(tensor, Tensor) and tensor.shape[:1] == (len(experts),):
                    for kept, part in zip(experts, tensor, strict=True):
                        kept.append(part)
    return [fingerprint(kept) for kept in experts]


def _over_the_faster(rates: Mapping[str, float]) -> float:
    return rates["trits"] / max(rate for name, rate in rates.items() if name != "trits")


def _import_seconds() -> float:
    code = "import time; t = time.perf_counter(); import arbitor; print(time.perf_counter() - t)"
    return float(_python(["-c", code]).split()[-1])


def _default_job_seconds() -> float:
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        _python(["-m", "arbitor", "train", "--device", "cpu"], cwd=folder)
        return time.perf_counter() - began


def _run_script(
    what: str, *arguments: str, extra: Mapping[str, str] | None = None
) -> tuple[float, float, float]:
    """The two figures that this file prints as a program, and the seconds that importing torch took."""
    output = _python(["-c", TIMED_SCRIPT, what, *arguments], extra=extra)
    first, second, importing = map(float, output.split()[-3:])
    return first, second, importing


def _python(
    arguments: Sequence[str], cwd: str | Path = REPOSITORY, extra: Mapping[str, str] | None = None
) -> str:
    """Output of this interpreter, which finds the repository's packages.

    Raises:
        UserError: it failed; the last line of what it complained about.
    """
    path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH", "")]))
    environment = dict(os.environ, PYTHONPATH=path, ARB_BENCHMARK_BEGAN=repr(time.time())) | dict(extra or {})
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"`python {' '.join(arguments)}` failed: {last}")
    return done.stdout


def _main(what: str, preset: str, device: str, number: str) -> None:
    if what == "cap":
        print(*capped_training(preset, int(number)))
    else:
        print(*first_update(preset, device, int(number), ahead=what == "ahead"))


if __name__ == "__main__":
    _main(*sys.argv[1:])
