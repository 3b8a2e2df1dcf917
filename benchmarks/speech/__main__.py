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
RATES = {"trits-full": (0.05, 0.025, 0.1), "dense-adamw": (0.002, 0.001, 0.004)}
TENTH = "0.1"
TIMES_SPOKEN = 20
GOALS = {"listen": 0.75, "speak": 0.80}
GOAL_RATIO = 0.97

Rates = tuple[float, float]  # of listening or speaking, and of the codec


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is missing; exit code 0: all is there, 75: time ran out, 2: bad arguments."""
    options = _parser().parse_args(arguments)
    try:
        return compare(options)
    except UserError as error:
        print(f"benchmarks.speech: error: {error}", file=sys.stderr)
        return 2


def compare(options: argparse.Namespace) -> int:
    """All runs of the chosen tasks and contestants that the table does not hold."""
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
        for contestant in options.contestant or list(RATES):
            rates = rates_asked(contestant, options)
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
        print(summary(task, table.rows(), options))
    return 0


def mine(rows: Sequence[Row], task: str, contestant: str, options: argparse.Namespace) -> list[Row]:
    """The rows of one task and contestant with the rates and settings that are asked for now."""
    wanted = {"task": task, "contestant": contestant} | settings(task, options)
    asked = rates_asked(contestant, options)
    return [row for row in rows if wanted.items() <= row.items() and rates_of(row) in asked]


def settings(task: str, options: argparse.Namespace) -> dict[str, str]:
    """Those columns of a row, but for the rates, that the command line decides on."""
    equalise = ("on" if options.equalise else "off") if task == "listen" else ""  # else nothing is heard
    return {name: str(getattr(options, name)) for name in GIVEN} | {"equalise": equalise}


def rates_asked(contestant: str, options: argparse.Namespace) -> list[Rates]:
    """Those given, of the contestants that are named; else the contestant's own."""
    named = contestant in (options.contestant or RATES)
    own = RATES[contestant] if options.sweep else RATES[contestant][:1]
    rates = options.lr if named and options.lr else own
    if named and options.codec_lr:
        return list(itertools.product(rates, options.codec_lr))
    return [(lr, lr) for lr in rates]


def rates_of(row: Row) -> Rates:
    """Those that a row was measured with."""
    return float(row["lr"]), float(row["codec_lr"])


def next_run(rows: Sequence[Row], folds: Sequence[str], rates: Sequence[Rates]) -> tuple[str, Rates] | None:
    """Fold and rates that are missing: all rates on the first fold, then the best ones on the others."""
    done = {(row["held_out"], rates_of(row)) for row in rows}
    wanted = [(folds[0], pair) for pair in rates]
    if all(run in done for run in wanted):
        wanted = [(fold, best_rates(rows, folds[0])) for fold in folds]
    return next((run for run in wanted if run not in done), None)


def best_rates(rows: Sequence[Row], fold: str) -> Rates:
    """The rates with the most words right on a fold."""
    return rates_of(
        max((row for row in rows if row["held_out"] == fold), key=lambda r: float(r["words_right"]))
    )


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
    if run.contestant == "trits-full":
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


def summary(task: str, rows: Sequence[Row], options: argparse.Namespace) -> str:
    """The mean share of words right at each contestant's best rates, and the ratio to the twin."""
    lines, means = [], {}
    for contestant in RATES:
        own = mine(rows, task, contestant, options)
        if not own:
            continue
        best = best_rates(own, own[0]["held_out"])
        shares = {r["held_out"]: float(r["words_right"]) for r in own if rates_of(r) == best}
        means[contestant] = sum(shares.values()) / len(shares)
        each = ", ".join(f"{fold} {100 * share:.1f}" for fold, share in shares.items())
        lr, codec_lr = best
        lines.append(
            f"{task} {contestant} lr {lr:g}, codec {codec_lr:g}: "
            f"{100 * means[contestant]:.2f} % right ({each})"
        )
    lines.append(f"goal: at least {100 * GOALS[task]:.0f} %")
    if len(means) == len(RATES):
        ratio = means["trits-full"] / max(1e-9, means["dense-adamw"])
        lines.append(f"trits over float twin: {ratio:.4f} (goal of listening: at least {GOAL_RATIO})")
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speech", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder or .tar of <word>_<speaker>_<n>.wav")
    parser.add_argument("--task", action="append", choices=tuple(GOALS), help="default both")
    parser.add_argument("--contestant", action="append", choices=tuple(RATES), help="default both")
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
