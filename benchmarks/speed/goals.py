"""The goals of speed, one function each, measured only after they were predicted.

A goal has clauses; each gives one figure. A prediction is a line `goal,clause,predicted` of a CSV file, or
`GOAL/CLAUSE=FIGURE` on the command line, which counts more. A goal with a clause that nobody predicted is not
measured.
"""

import csv
import datetime
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from arbitor.errors import UserError
from arbitor.ops.backend import VARIABLE
from arbitor.train.device import Device
from benchmarks.common import device_name
from benchmarks.learning.table import Table
from benchmarks.speed import decoding, kernels, whole_model

PREDICTIONS = Path(__file__).with_name("predictions.csv")
COLUMNS = ("goal", "clause", "unit", "predicted", "measured", "target", "met", "command", "device", "date")
KEY = ("goal", "clause", "device")
Figures = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Clause:
    """One figure of a goal.

    Attributes:
        unit: what it is in.
        target: what is wanted; None where the figure only explains others.
        at_least: whether larger is better.
    """

    unit: str
    target: float | None
    at_least: bool = True

    def met(self, figure: float) -> str:
        """`yes`, `no`, or nothing without a target."""
        if self.target is None:
            return ""
        good = figure >= self.target if self.at_least else figure <= self.target
        return "yes" if good else "no"

    def wanted(self) -> str:
        """The target as text."""
        return "" if self.target is None else f"{'>=' if self.at_least else '<='} {self.target:g}"


@dataclass(frozen=True, slots=True)
class Goal:
    """A function that measures, where, and the clauses that it gives."""

    measure: Callable[[Device], Figures]
    clauses: Mapping[str, Clause]
    device: str = "cuda"


GOALS = {
    "G1": Goal(
        kernels.few_rows,
        {
            "share of copy bandwidth, 1 row": Clause("share", 0.75),
            "speed over torch.mm bf16, 1 row": Clause("ratio", 5.0),
            "share of copy bandwidth, 8 rows": Clause("share", 0.75),
            "speed over torch.mm bf16, 8 rows": Clause("ratio", 5.0),
        },
    ),
    "G2": Goal(
        kernels.many_rows,
        {
            "time over torch.mm bf16, ROW": Clause("ratio", 0.65, at_least=False),
            "time over torch.mm bf16, T32": Clause("ratio", 1.1, at_least=False),
        },
    ),
    "G3": Goal(
        whole_model.training_step,
        {
            "speed over the faster dense twin": Clause("ratio", 1.3),
            "trits": Clause("bytes/s", None),
            "dense-autocast": Clause("bytes/s", None),
            "dense-bf16": Clause("bytes/s", None),
            "of a step, GPU idle, trits": Clause("ms", None),
            "of a step, GPU idle, dense-autocast": Clause("ms", None),
            "of a step, GPU idle, dense-bf16": Clause("ms", None),
        },
    ),
    "G4": Goal(
        whole_model.few_tokens,
        {
            "step, spectral votes": Clause("ms", 20.0, at_least=False),
            "step, row votes": Clause("ms", 8.0, at_least=False),
            "peak": Clause("bytes/weight", 1.35, at_least=False),
            "experts changed without tokens": Clause("experts", 0.0, at_least=False),
        },
    ),
    "G5": Goal(
        whole_model.many_tokens,
        {
            "share of bf16 peak on active weights": Clause("share", 0.35),
            "share of bf16 peak, the core as often as iterated": Clause("share", None),
        },
    ),
    "G6": Goal(kernels.state_update, {"share of copy bandwidth": Clause("share", 0.8)}),
    "G7": Goal(
        whole_model.cold_start,
        {
            "first update, empty caches": Clause("s", 10.0, at_least=False),
            "first update, empty caches, compiled ahead": Clause("s", 10.0, at_least=False),
            "first update, second process": Clause("s", 2.0, at_least=False),
            "first update, second process after compiling ahead": Clause("s", 2.0, at_least=False),
            "of the first update, empty caches: import torch": Clause("s", None),
            "of the first update, compiled ahead: import torch": Clause("s", None),
            "of the second process: import torch": Clause("s", None),
            "a step of one linear of torch, second process": Clause("s", None),
            "kernels compiled over 50 batches and contexts": Clause("kernels", 0.0, at_least=False),
            "the same without smoke --warmup ahead, after a step of 64 bytes": Clause("kernels", None),
            "smoke --warmup with two updates, empty caches": Clause("s", None),
            "first update after smoke --warmup": Clause("s", None),
        },
    ),
    "G8": Goal(
        whole_model.under_a_cap,
        {"weights trained": Clause("weights", 2e9), "steps of 256 tokens": Clause("steps", 100.0)},
    ),
    "G9": Goal(
        decoding.decoding,
        {
            "speed over bf16 under CUDA graphs": Clause("ratio", 3.0),
            "trits": Clause("bytes/s", None),
            "bf16": Clause("bytes/s", None),
            "bf16, compiled": Clause("bytes/s", None),
        },
    ),
    "C1": Goal(
        whole_model.on_the_cpu,
        {
            "speed over the faster dense twin": Clause("ratio", 1.0),
            "speed over a compiled fp32 twin": Clause("ratio", None),
            "import arbitor": Clause("s", 0.3, at_least=False),
            "default job": Clause("s", 120.0, at_least=False),
        },
        device="cpu",
    ),
}


def planned(names: Sequence[str], given: Sequence[str], file: Path) -> dict[str, dict[str, float]]:
    """The predictions of some goals, clause by clause.

    Raises:
        UserError: a prediction is missing, is no number, or is of a goal or clause that there is not.
    """
    known = _read(file) | dict(_parsed(text) for text in given)
    for goal, clause in known:
        if goal not in GOALS or clause not in GOALS[goal].clauses:
            allowed = ", ".join(GOALS[goal].clauses) if goal in GOALS else ", ".join(GOALS)
            raise UserError(f"a prediction is of {goal}/{clause}, which is not among: {allowed}")
    missing = [
        f"{goal}/{clause}" for goal in names for clause in GOALS[goal].clauses if (goal, clause) not in known
    ]
    if missing:
        raise UserError(
            f"predict before you measure: no figure for {'; '.join(missing)}; "
            f"add lines to {file}, or use --predict"
        )
    return {goal: {clause: known[goal, clause] for clause in GOALS[goal].clauses} for goal in names}


def measure(plan: Mapping[str, Mapping[str, float]], device: Device, path: Path) -> None:
    """Measure goals and write their rows, one goal after the other, so that an end of time loses one at most.

    Raises:
        UserError: a goal is not for this device.
    """
    for goal in plan:
        if GOALS[goal].device != device.device.type:
            raise UserError(f"{goal} is measured on {GOALS[goal].device}, this is {device.device.type}")
    table = Table(path, COLUMNS, KEY)
    backend = _backend_setting()
    for goal, predictions in plan.items():
        figures = GOALS[goal].measure(device)
        for name, clause in GOALS[goal].clauses.items():
            row = {
                "goal": goal,
                "clause": name,
                "unit": clause.unit,
                "predicted": format(predictions[name], ".4g"),
                "measured": format(figures[name], ".4g"),
                "target": clause.wanted(),
                "met": clause.met(figures[name]),
                "command": f"{backend}python -m benchmarks.speed --goal {goal}",
                "device": device_name(device.device),
                "date": datetime.date.today().isoformat(),
            }
            table.put(row)
            print(", ".join(f"{key} {value}" for key, value in row.items() if key != "command"), flush=True)


def _backend_setting() -> str:
    """The setting of the back end, as it stands ahead of a command; empty if there is none."""
    value = os.environ.get(VARIABLE)
    return f"{VARIABLE}={value} " if value else ""


def _read(file: Path) -> dict[tuple[str, str], float]:
    try:
        with open(file, newline="", encoding="utf-8") as lines:
            rows = list(csv.DictReader(lines))
    except OSError as error:
        raise UserError(f"cannot read the predictions {file}: {error.strerror}") from error
    try:
        return {(row["goal"], row["clause"]): _number(row["predicted"]) for row in rows}
    except KeyError as error:
        raise UserError(f"{file} has no column {error}; its columns are goal, clause, predicted") from error


def _parsed(text: str) -> tuple[tuple[str, str], float]:
    name, equals, figure = text.rpartition("=")
    goal, slash, clause = name.partition("/")
    if not equals or not slash:
        raise UserError(f"--predict takes GOAL/CLAUSE=FIGURE, got {text!r}")
    return (goal, clause), _number(figure)


def _number(text: str) -> float:
    try:
        value = float(text)
    except (TypeError, ValueError):
        value = math.nan
    if not math.isfinite(value):
        raise UserError(f"a prediction must be a number, got {text!r}")
    return value
