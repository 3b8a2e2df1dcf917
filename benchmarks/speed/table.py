"""Rows of `speed-<device>.csv` and `memory-<device>.csv`, each contestant timed in a process of its own."""

import argparse
import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor

from arbitor.config import PRESETS, STATES
from arbitor.config import preset as preset_config
from arbitor.errors import UserError
from arbitor.train.device import resolve_device
from benchmarks.common import provenance, triton_version
from benchmarks.speed import contestants
from benchmarks.speed.contestants import CONTESTANTS, Setting, Timing

COLUMNS = (
    "contestant",
    "preset",
    "batch",
    "ctx",
    "state",
    "bytes_per_second",
    "ms_per_step",
    "peak_bytes",
    "share_of_peak",
    "commit",
    "device",
    "torch",
    "triton",
    "date",
)
KEY = ("contestant", "preset", "batch", "ctx", "state", "device")


def in_own_process(contestant: str, setting: Setting) -> Timing:
    """`contestants.measure` in a fresh process, so that its peaks and compiled code are its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        return process.submit(contestants.measure, contestant, setting).result()


def measured(names: Sequence[str], setting: Setting) -> Iterator[tuple[str, Timing]]:
    """Every contestant that can take part, one after the other; a line is printed for each that cannot."""
    for name in names:
        reason = contestants.why_absent(name, setting)
        if reason is not None:
            print(f"{name}: skipped, {reason}", flush=True)
            continue
        yield name, in_own_process(name, setting)


def row_of(name: str, setting: Setting, timing: Timing, commit: str) -> dict[str, str]:
    """A row of the columns of `speed-<device>.csv`."""
    return {
        "contestant": name,
        "preset": setting.preset,
        "batch": str(setting.batch * setting.accum),
        "ctx": str(setting.ctx),
        "state": setting.state if name == "trits" else "",
        "bytes_per_second": format(1e3 * setting.bytes_per_step / timing.ms_per_step, ".0f"),
        "ms_per_step": format(timing.ms_per_step, ".3f"),
        "peak_bytes": str(timing.peak_bytes),
        "share_of_peak": format(timing.share_of_peak, ".4f"),
        **provenance(resolve_device(setting.device).device, commit),
        "triton": triton_version(),
    }


def add_setting(parser: argparse.ArgumentParser) -> None:
    """The arguments that `setting_of` reads."""
    add = parser.add_argument
    add("--preset", choices=PRESETS, help="default: base on a GPU, tiny on the CPU")
    add("--batch", type=int, help="windows of a micro-batch; default: the preset's")
    add("--accum", type=int, default=1, help="micro-batches of a step")
    add("--ctx", type=int, help="bytes of a window; default: the preset's")
    add("--state", choices=STATES, default="full")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--steps", type=int, default=20, help="timed steps")
    add("--threads", type=int, help="on the CPU; default: torch's own number")
    add("--contestants", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS), metavar="NAME")
    add("--commit", help="what to note as the commit where there is no git")


def setting_of(options: argparse.Namespace) -> Setting:
    """What the arguments ask to time.

    Raises:
        UserError: a number that cannot be used.
    """
    on_gpu = resolve_device(options.device).is_cuda
    preset = options.preset or ("base" if on_gpu else "tiny")
    own = preset_config(preset)
    for name in ("batch", "accum", "steps", "threads"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} must be at least 1, got {value}")
    setting = Setting(
        preset=preset,
        batch=own.train.batch if options.batch is None else options.batch,
        accum=options.accum,
        ctx=own.model.ctx if options.ctx is None else options.ctx,
        state=options.state,
        device="cuda" if on_gpu else "cpu",
        steps=options.steps,
        threads=options.threads,
    )
    setting.config()
    return setting
