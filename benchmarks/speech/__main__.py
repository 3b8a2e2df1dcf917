"""Command line of the comparison on spoken words; see the package's docstring and `--help`."""

import argparse
import dataclasses
import itertools
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.optim import AdamW

from arbitor.config import ModelConfig, override, preset
from arbitor.data.audio import AudioCorpus, open_audio
from arbitor.errors import UserError
from arbitor.model import ARBModel
from arbitor.speech import say
from arbitor.train.audio_tasks import AudioTask, CodecTask, ListenTask, SpeakTask
from arbitor.train.device import resolve_device
from benchmarks.common import RESULTS, commit, provenance, slug
from benchmarks.learning.contestants import BETAS, WEIGHT_DECAY, Run, Trainee, build
from benchmarks.learning.table import Row, Table
from benchmarks.learning.training import train_on
from benchmarks.learning.twins import DenseLinear, FloatTable, make_twin
from benchmarks.speech.recogniser import share_right, train_recogniser
from benchmarks.speech.summary import (
    GOALS,
    TRITS,
    TWIN,
    Rates,
    best_rates,
    rates_of,
    summary_of_all,
    summary_of_run,
)
from benchmarks.speech.twins import replace_convolutions

COLUMNS = (
    *("task", "contestant", "held_out", "lr", "codec_lr", "seed"),
    *("dim", "codec_dim", "codes", "codec_steps", "steps", "batch", "equalise"),
    *("trunk_weights", "recordings", "words_right", "log_mel_distance", "of_median", "recogniser", "seconds"),
    *("commit", "device", "torch", "date"),
)
GIVEN = ("seed", "dim", "codec_dim", "codes", "codec_steps", "steps", "batch")
KEY = ("task", "contestant", "held_out", "lr", "codec_lr", *GIVEN, "equalise")
TINY = preset("tiny").model
RATES = {
    "listen": {TRITS: (0.02, 0.01, 0.04), TWIN: (0.002, 0.001, 0.004)},
    "speak": {TRITS: (0.05, 0.025, 0.1), TWIN: (0.002, 0.001, 0.004)},
}  # the first is that of the best recipe among the rows; --sweep tries all
CONTESTANTS = (TRITS, TWIN)
TENTH = "0.1"
TIMES_SPOKEN = 20


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is missing; exit code 0: all is there, 75: time ran out, 2: bad arguments."""
    options = _parser().parse_args(arguments)
    try:
        return summarise(options) if options.summary else compare(options)
    except UserError as error:
        print(f"benchmarks.speech: error: {error}", file=sys.stderr)
        return 2


def summarise(options: argparse.Namespace) -> int:
    """Print what the rows of all devices say; nothing is trained."""
    paths = sorted(options.results.glob("speech-*.csv"))
    if not paths:
        raise UserError(f"there are no speech-*.csv in {options.results}; without --summary they are made")
    for path in paths:
        rows = Table(path, COLUMNS, KEY).rows()
        for task in options.task or list(GOALS):
            print(f"{path.name}: {summary_of_all(task, rows)}\n")
    return 0


def compare(options: argparse.Namespace) -> int:
    """All runs of the chosen tasks and contestants that the table does not hold."""
    if options.data is None:
        raise UserError("--data is needed, the recordings; only --summary does without")
    deadline = time.monotonic() + options.minutes * 60
    device = resolve_device(options.device).device
    table = Table(options.results / f"speech-{slug(device)}.csv", COLUMNS, KEY)
    data = [str(options.data)]
    speakers = sorted(set(open_audio(data, TENTH, options.rate).train.speakers) - {""})
    if options.speaker:
        speakers = [name for name in speakers if name in options.speaker]
    for task in options.task or list(GOALS):
        folds = [f"speaker:{name}" for name in speakers] if task == "listen" else [TENTH]
        if not folds:
            raise UserError(f"{options.data}: the files' names say nothing of those speakers")
        for contestant in options.contestant or CONTESTANTS:
            rates = rates_asked(task, contestant, options)
            while (run := next_run(mine(table.rows(), task, contestant, options), folds, rates)) is not None:
                if time.monotonic() > deadline:
                    print("time ran out; the same command goes on")
                    return 75
                fold, (lr, codec_lr) = run
                one = Run(contestant, lr, options.seed)
                corpus = open_audio(data, fold, options.rate)
                row = measure(task, one, codec_lr, corpus, fold, options, device)
                table.put(row)
                print(
                    f"{task} {contestant} {fold} lr {lr:g}, codec {codec_lr:g}: "
                    f"{100 * float(row['words_right']):.2f} % right, "
                    f"log-mel distance {row['log_mel_distance']} ({row['of_median']} of the median's), "
                    f"{row['seconds']} s",
                    flush=True,
                )
        own = {contestant: mine(table.rows(), task, contestant, options) for contestant in CONTESTANTS}
        print(summary_of_run(task, own, folds))
    return 0


def mine(rows: Sequence[Row], task: str, contestant: str, options: argparse.Namespace) -> list[Row]:
    """The rows of one task and contestant with the rates and settings that are asked for now."""
    wanted = {"task": task, "contestant": contestant} | settings(task, options)
    asked = rates_asked(task, contestant, options)
    return [row for row in rows if wanted.items() <= row.items() and rates_of(row) in asked]


def settings(task: str, options: argparse.Namespace) -> dict[str, str]:
    """Those columns of a row, but for the rates, that the command line decides on."""
    equalise = ("on" if options.equalise else "off") if task == "listen" else ""  # else nothing is heard
    return {name: str(getattr(options, name)) for name in GIVEN} | {"equalise": equalise}


def rates_asked(task: str, contestant: str, options: argparse.Namespace) -> list[Rates]:
    """Those given, of the contestants that are named; else the contestant's own in the task."""
    named = contestant in (options.contestant or CONTESTANTS)
    own = RATES[task][contestant] if options.sweep else RATES[task][contestant][:1]
    rates = options.lr if named and options.lr else own
    if named and options.codec_lr:
        return list(itertools.product(rates, options.codec_lr))
    return [(lr, lr) for lr in rates]


def next_run(rows: Sequence[Row], folds: Sequence[str], rates: Sequence[Rates]) -> tuple[str, Rates] | None:
    """Fold and rates that are missing: all rates on the first fold, then the best ones on the others."""
    done = {(row["held_out"], rates_of(row)) for row in rows}
    wanted = [(folds[0], pair) for pair in rates]
    if all(run in done for run in wanted):
        wanted = [(fold, best_rates(rows, folds[0])) for fold in folds]
    return next((run for run in wanted if run not in done), None)


def measure(
    task: str,
    run: Run,
    codec_lr: float,
    corpus: AudioCorpus,
    fold: str,
    options: argparse.Namespace,
    device: torch.device,
) -> dict[str, str]:
    """Train and evaluate one run, the codec at a rate of its own; its row."""
    config = override(
        preset("tiny"),
        audio_rate=options.rate,
        audio_samples=options.rate,
        batch=options.batch,
        lr=run.lr,
        seed=run.seed,
        dim=options.dim,
        audio_dim=options.codec_dim,
        audio_codes=options.codes,
        audio_equalise=options.equalise,
    )
    codec = CodecTask(override(config, lr=codec_lr), corpus)
    trainee = build_pipeline(run, config.model, device)
    began = time.perf_counter()
    train_on(trainee, codec, options.codec_steps, codec_lr / run.lr)
    learnt: AudioTask = ListenTask(config, corpus) if task == "listen" else SpeakTask(config, corpus)
    train_on(trainee, learnt, options.steps)
    seconds = time.perf_counter() - began
    trainee.model.eval()
    measured = codec.evaluate(trainee.model, None, None)
    recognised = ""
    if task == "listen":
        right = learnt.evaluate(trainee.model, None, None).captions_right or 0.0
    else:
        right, of_real = read_back(trainee.model, corpus, options, device)
        recognised = format(of_real, ".5f")
    return {
        "task": task,
        "contestant": run.contestant,
        "held_out": fold,
        "lr": str(run.lr),
        "codec_lr": str(codec_lr),
        **settings(task, options),
        "trunk_weights": str(trainee.trunk_weights()),
        "recordings": str(len(corpus.train)),
        "words_right": format(right, ".5f"),
        "log_mel_distance": format(measured.bits_per_byte, ".5f"),
        "of_median": format(measured.extra["share_of_median"], ".5f"),
        "recogniser": recognised,
        "seconds": format(seconds, ".1f"),
        **provenance(device, options.commit or commit()),
    }


def build_pipeline(run: Run, config: ModelConfig, device: torch.device) -> Trainee:
    """A fresh model with its codec, of trits or all of floats."""
    if run.contestant == TRITS:
        return build(run, config, device)
    torch.manual_seed(run.seed)
    model = ARBModel(config=dataclasses.replace(config), device=device)
    vectors = replace_convolutions(model)
    make_twin(model, DenseLinear)
    matrices = [m.weight for m in model.modules() if isinstance(m, DenseLinear | FloatTable)]
    groups: list[dict[str, Any]] = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]  # biases
    optimizer = AdamW(groups, lr=run.lr, betas=BETAS, weight_decay=WEIGHT_DECAY)
    return Trainee(model, [optimizer], [*matrices, *vectors])


def read_back(
    model: ARBModel, corpus: AudioCorpus, options: argparse.Namespace, device: torch.device
) -> tuple[float, float]:
    """The share of spoken words that a recogniser reads back, and the share of real ones held out."""
    recogniser = train_recogniser(corpus.train, options.rate, options.recogniser_steps, device)
    held_out = corpus.held_out
    real = [held_out.wave(n) for n in range(len(held_out))]
    words = sorted(set(corpus.train.labels)) * TIMES_SPOKEN
    spoken = say(model, words, seed=0, temperature=options.temperature)
    return share_right(recogniser, spoken, words), share_right(recogniser, real, held_out.labels)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speech", description=__doc__)
    parser.add_argument(
        "--data", type=Path, help="folder or .tar of <word>_<speaker>_<n>.wav; needed to train"
    )
    parser.add_argument(
        "--summary",
        action="store_true",
        help="train nothing; print every recipe whose rows have all speakers, with the mean over seeds, and "
        "the ratios of the contestants",
    )
    parser.add_argument("--task", action="append", choices=tuple(GOALS), help="default both")
    parser.add_argument("--contestant", action="append", choices=CONTESTANTS, help="default both")
    parser.add_argument("--speaker", action="append", help="to hold out; default each in turn")
    parser.add_argument("--sweep", action="store_true", help="try three rates on the first speaker")
    parser.add_argument(
        "--lr",
        type=float,
        action="append",
        help="of listening or speaking, in place of the contestant's own; of several, given one by one, the "
        "best on the first speaker is taken for the others",
    )
    parser.add_argument(
        "--codec-lr", type=float, action="append", help="the same of the codec; default that of --lr"
    )
    parser.add_argument("--seed", type=int, default=0, help="of weights, data order and rounding")
    parser.add_argument("--rate", type=int, default=8000, help="samples a second")
    parser.add_argument("--dim", type=int, default=TINY.dim, help="width of the model")
    parser.add_argument("--codec-dim", type=int, default=TINY.audio_dim, help="width of the codec")
    parser.add_argument("--codes", type=int, default=TINY.audio_codes, help="of a fiftieth of a second")
    parser.add_argument(
        "--equalise",
        action=argparse.BooleanOptionalAction,
        default=TINY.audio_equalise,
        help="bring what is heard to one spectrum in the long run, or only to one loudness; default on",
    )
    parser.add_argument("--codec-steps", type=int, default=3000)
    parser.add_argument("--steps", type=int, default=3000, help="of listening or speaking")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--recogniser-steps", type=int, default=1000)
    parser.add_argument("--temperature", type=float, default=0.7, help="of speaking")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--minutes", type=float, default=60.0, help="no run begins after so long")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--commit", help="commit to note where there is no git")
    return parser


if __name__ == "__main__":
    sys.exit(main())
