"""Command line of the race; see the package's docstring and `--help`."""

import argparse
import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from arbitor.config import PRESETS, RunConfig
from arbitor.config import preset as preset_config
from arbitor.errors import UserError
from arbitor.train.device import Device, deterministic, resolve_device
from benchmarks.common import RESULTS, commit, float_products, provenance, slug
from benchmarks.learning.contestants import ALL_CONTESTANTS, Run
from benchmarks.learning.corpus import Texts, load_texts
from benchmarks.learning.sizes import Size
from benchmarks.learning.table import Table
from benchmarks.race.training import WARM_UP, Result, raced, steps_in

# Unless --lr says otherwise: the best of what was tried over nine minutes of `base`; of Muon, at 8 M weights.
RATES = {"trits-full": 0.0125, "dense-adamw": 0.001, "dense-muon": 0.0125}
IDENTITY = ("contestant", "preset", "batch", "ctx", "lr", "seed", "steps")
COLUMNS = (
    *IDENTITY,
    "bytes_seen",
    "seconds",
    "bytes_per_second",
    "share_of_peak",
    "peak_bytes",
    "trunk_weights",
    "bytes_per_weight",
    "held_out_bits_per_byte",
    "text",
    "commit",
    "device",
    "torch",
    "date",
)
KEY = (*IDENTITY, "text")
CURVE_KEY = (*KEY, "step")
CURVE_COLUMNS = (*IDENTITY, "step", "bytes_seen", "seconds", "held_out_bits_per_byte", "text")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the contestants one after the other; exit code 2: bad arguments."""
    options = _parser().parse_args(arguments)
    try:
        return race(options)
    except UserError as error:
        print(f"benchmarks.race: error: {error}", file=sys.stderr)
        return 2


def race(options: argparse.Namespace) -> int:
    """Every contestant at every rate."""
    device = resolve_device(options.device)
    config = _config(options)
    runs = _runs(options)
    texts = load_texts(_size(config, options), options.data, options.held_out)
    print(f"{texts.description} (text {texts.fingerprint})", flush=True)
    text = torch.from_numpy(texts.train).to(device.device)
    for run in runs:
        with _manner(run, device):
            steps = options.steps or steps_in(run, config, text, device, 60 * options.minutes)
            print(f"{run}: {steps} steps of {config.train.batch} x {config.model.ctx} bytes", flush=True)
            result = raced(run, config, text, texts.held_out, device, steps, options.held_out_bytes, _tell)
        _keep(run, config, result, texts, device, options)
        print(
            f"{run}: {result.bits_per_byte:.4f} bits per byte after {result.bytes_seen / 1e6:.1f} MB in "
            f"{steps * result.seconds_per_step:.0f} s, {result.share_of_peak:.1%} of the matmul peak, "
            f"{result.bytes_per_weight:.2f} bytes a weight, peak {result.peak_bytes / 1e6:,.0f} MB",
            flush=True,
        )
    return 0


def _manner(run: Run, device: Device) -> contextlib.AbstractContextManager[None]:
    """Trits train as in `arbitor train`; floats may take whatever is fastest, as their users would."""
    if ALL_CONTESTANTS[run.contestant].linear is None:
        return deterministic(run.seed, device.device)
    return float_products()  # `build` seeds the weights, `raced` the data


def _tell(step: int, bits_per_byte: float) -> None:
    print(f"  step {step}: {bits_per_byte:.4f} bits per byte", flush=True)


def _config(options: argparse.Namespace) -> RunConfig:
    own = preset_config(options.preset)
    return preset_config(
        options.preset,
        batch=own.train.batch if options.batch is None else options.batch,
        ctx=own.model.ctx if options.ctx is None else options.ctx,
    )


def _runs(options: argparse.Namespace) -> list[Run]:
    if options.steps is not None and options.steps < 2 * WARM_UP:
        raise UserError(f"--steps must be at least {2 * WARM_UP}, got {options.steps}")
    if options.steps is None and options.minutes <= 0:
        raise UserError(f"--minutes must be above 0, got {options.minutes:g}")
    runs = []
    for name in options.contestants:
        if name not in ALL_CONTESTANTS:
            raise UserError(f"unknown contestant {name!r}; choose from {', '.join(ALL_CONTESTANTS)}")
        if not options.lr and name not in RATES:
            raise UserError(f"there is no usual rate for {name}; give --lr")
        rates = options.lr or [RATES[name]]
        runs += [Run(name, lr, seed) for lr in rates for seed in options.seeds]
    return runs


def _size(config: RunConfig, options: argparse.Namespace) -> Size:
    """What `load_texts` needs to know; steps and batch play no role there."""
    return Size(
        name=options.preset,
        model=config.model,
        steps=0,
        batch=config.train.batch,
        corpus="packages",
        held_out_bytes=0,
    )


def _keep(
    run: Run, config: RunConfig, result: Result, texts: Texts, device: Device, options: argparse.Namespace
) -> None:
    """Write the row, and those of its curve; a rerun replaces them."""
    identity = {
        "contestant": run.contestant,
        "preset": options.preset,
        "batch": str(config.train.batch),
        "ctx": str(config.model.ctx),
        "lr": format(run.lr, "g"),
        "seed": str(run.seed),
        "steps": str(result.steps),
    }
    bytes_per_step = result.bytes_seen // result.steps
    row = {
        **identity,
        "bytes_seen": str(result.bytes_seen),
        "seconds": format(result.steps * result.seconds_per_step, ".1f"),
        "bytes_per_second": format(bytes_per_step / result.seconds_per_step, ".0f"),
        "share_of_peak": format(result.share_of_peak, ".4f"),
        "peak_bytes": str(result.peak_bytes),
        "trunk_weights": str(result.trunk_weights),
        "bytes_per_weight": format(result.bytes_per_weight, ".4f"),
        "held_out_bits_per_byte": format(result.bits_per_byte, ".5f"),
        "text": texts.fingerprint,
        **provenance(device.device, options.commit or commit()),
    }
    stem = f"race-{slug(device.device)}"
    curve = Table(options.results / f"{stem}-curve.csv", CURVE_COLUMNS, CURVE_KEY)
    for step, bits in result.curve.items():
        curve.put(
            {
                **identity,
                "step": str(step),
                "bytes_seen": str(step * bytes_per_step),
                "seconds": format(step * result.seconds_per_step, ".1f"),
                "held_out_bits_per_byte": format(bits, ".5f"),
                "text": texts.fingerprint,
            }
        )
    Table(options.results / f"{stem}.csv", COLUMNS, KEY).put(row)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.race",
        description="Train a preset as trits and as a dense float twin for the same time, and compare.",
    )
    add = parser.add_argument
    add("--preset", choices=PRESETS, default="base")
    add("--contestants", nargs="+", default=list(RATES), metavar="NAME")
    add("--minutes", type=float, default=9.0, help="of training, for each run")
    add("--steps", type=int, help="this many steps instead, such as those of a slower contestant")
    add("--lr", type=float, nargs="+", default=[], help="peak rates, each a run of each contestant")
    add("--seeds", type=int, nargs="+", default=[0])
    add("--batch", type=int, help="windows of a step; default: the preset's")
    add("--ctx", type=int, help="bytes of a window; default: the preset's")
    add("--data", action="extend", nargs="+", default=[], help="own text; default: this machine's packages")
    add("--held-out", help="a path or a share of the data, as in `arbitor train`")
    add("--held-out-bytes", type=int, default=1_000_000, help="measured at the end; on the way a fifth of it")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--commit", help="what to note as the commit where there is no git")
    add("--results", type=Path, default=RESULTS, help="folder of the CSV files")
    return parser


if __name__ == "__main__":
    sys.exit(main())
