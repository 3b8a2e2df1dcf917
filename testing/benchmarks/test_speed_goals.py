"""Goals: predicted before they are measured, recorded with their targets, each function on a CPU's scale."""

import csv
import math
from pathlib import Path

import pytest
import torch

from arbitor.config import preset
from arbitor.errors import UserError
from arbitor.model import ARBModel
from arbitor.ternary import VoteOptimizer
from arbitor.train.device import resolve_device
from benchmarks.counts import counts
from benchmarks.learning.table import Table
from benchmarks.speed import __main__ as command
from benchmarks.speed import decoding, goals, kernels, whole_model
from benchmarks.speed.clock import uncovered
from benchmarks.speed.contestants import Timing
from benchmarks.speed.goals import COLUMNS, GOALS, KEY, Clause, planned

CPU = resolve_device("cpu")


def test_every_clause_has_a_prediction_and_every_prediction_a_clause():
    planned(list(GOALS), [], goals.PREDICTIONS)
    with open(goals.PREDICTIONS, newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == sum(len(goal.clauses) for goal in GOALS.values())


def test_the_command_line_counts_more_than_the_file():
    plan = planned(["G6"], ["G6/share of copy bandwidth=0.75"], goals.PREDICTIONS)
    assert plan == {"G6": {"share of copy bandwidth": 0.75}}


def test_without_a_prediction_nothing_is_measured(tmp_path, monkeypatch, capsys):
    def measure(_device):
        raise AssertionError("it was measured")

    monkeypatch.setitem(GOALS, "C1", goals.Goal(measure, GOALS["C1"].clauses, "cpu"))
    empty = tmp_path / "none.csv"
    empty.write_text("goal,clause,predicted\n")
    arguments = ["--device", "cpu", "--goal", "C1", "--predictions", str(empty), "--results", str(tmp_path)]
    assert command.main(arguments) == 2
    err = capsys.readouterr().err
    assert "predict before you measure: no figure for C1/speed over the faster dense twin; C1/" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("C1=1", "--predict takes GOAL/CLAUSE=FIGURE"),
        ("C1/import arbitor", "--predict takes"),
        ("C1/import arbitor=soon", "must be a number"),
        ("C1/import arbitor=nan", "must be a number"),
        ("C9/x=1", "not among: G1"),
        ("C1/x=1", "not among: speed over"),
    ],
)
def test_bad_predictions_are_refused(given, message):
    with pytest.raises(UserError, match=message):
        planned(["C1"], [given], goals.PREDICTIONS)


def test_rows_say_whether_a_target_is_met(tmp_path, monkeypatch, capsys):
    clauses = {
        "fast": Clause("ratio", 1.5),
        "small": Clause("bytes", 2.0, at_least=False),
        "note": Clause("bytes/s", None),
    }
    figures = {"fast": 1.25, "small": 2.0, "note": 7.0}
    monkeypatch.setitem(GOALS, "C1", goals.Goal(lambda _: figures, clauses, "cpu"))
    monkeypatch.setenv("ARB_TERNARY_BACKEND", "torch")
    predict = ["--predict", "C1/fast=1.6", "C1/small=1", "C1/note=8"]
    file = tmp_path / "p.csv"
    file.write_text("goal,clause,predicted\n")
    arguments = ["--device", "cpu", "--goal", "C1", "--predictions", str(file), "--results", str(tmp_path)]
    assert command.main([*arguments, *predict]) == 0
    rows = {row["clause"]: row for row in Table(tmp_path / "goals-cpu.csv", COLUMNS, KEY).rows()}
    assert [rows[name]["met"] for name in clauses] == ["no", "yes", ""]
    assert [rows[name]["target"] for name in clauses] == [">= 1.5", "<= 2", ""]
    assert (rows["fast"]["predicted"], rows["fast"]["measured"]) == ("1.6", "1.25")
    assert rows["fast"]["command"] == "ARB_TERNARY_BACKEND=torch python -m benchmarks.speed --goal C1"


def test_a_goal_of_a_gpu_is_refused_on_the_cpu(tmp_path, capsys):
    assert command.main(["--device", "cpu", "--goal", "G6", "--results", str(tmp_path)]) == 2
    assert "G6 is measured on cuda, this is cpu" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("goal", "measure"),
    [
        ("G1", lambda: kernels.few_rows(CPU, size=160)),
        ("G2", lambda: kernels.many_rows(CPU, rows=8, size=160)),
        ("G6", lambda: kernels.state_update(CPU, shape=(2, 32, 160))),
    ],
)
def test_figures_of_kernels_are_those_of_the_clauses(monkeypatch, goal, measure):
    monkeypatch.setattr(kernels, "copy_bandwidth", lambda _: 1e9)
    figures = measure()
    assert figures.keys() == GOALS[goal].clauses.keys()
    assert all(figure > 0 for figure in figures.values())


def test_decoding_reads_the_same_byte_again_and_again():
    config = preset("tiny").model
    figures = decoding.decoding(CPU, config)
    assert figures.keys() == GOALS["G9"].clauses.keys()
    twins = max(figures["bf16"], figures["bf16, compiled"])
    assert figures["speed over bf16 under CUDA graphs"] == figures["trits"] / twins


def test_the_large_configuration_is_dense_and_large_enough():
    config = decoding.large_dense()
    assert not config.has_core
    assert 1.2e9 <= counts(config).total < 1.3e9


def small_with_experts():
    small = {"dim": 32, "expert_dim": 32, "ffn_dim": 32, "num_prelude_layers": 1, "num_coda_layers": 0}
    return preset("arb-small", **small).model


def test_few_tokens_leave_idle_experts_alone():
    figures = whole_model.few_tokens(CPU, small_with_experts(), steps=1)
    assert figures.keys() == GOALS["G4"].clauses.keys()
    assert figures["experts changed without tokens"] == 0


def test_an_expert_that_changes_without_tokens_is_counted():
    model = ARBModel(config=small_with_experts())
    optimizer = VoteOptimizer(model, state="lean")

    def step():
        model(torch.full((1, 4), 65))
        model.core.moe.up.E.add_(1)

    idle = whole_model._changed_without_tokens(model, optimizer, step)
    assert 0 < idle < 8


def timing(ms_per_step, iterations=0.0):
    return Timing(ms_per_step, 1, 1, 1, share_of_peak=0.1, iterations=iterations, idle_ms=0.5)


@pytest.mark.parametrize("compiler", [True, False])
def test_on_a_cpu_the_compiled_twin_stands_beside_the_ratio(monkeypatch, compiler):
    ms = {"trits": 10.0, "dense-fp32": 12.0, "dense-bf16": 15.0, "dense-compiled": 9.0}

    def in_own_process(name, _setting):
        return timing(ms[name])

    def why_absent(name, _setting):
        return None if compiler or name != "dense-compiled" else "no compiler"

    monkeypatch.setattr(whole_model, "in_own_process", in_own_process)
    monkeypatch.setattr(whole_model, "why_absent", why_absent)
    monkeypatch.setattr(whole_model, "_import_seconds", lambda: 0.25)
    monkeypatch.setattr(whole_model, "_default_job_seconds", lambda: 60.0)
    figures = whole_model.on_the_cpu(CPU)
    assert figures.keys() == GOALS["C1"].clauses.keys()
    assert figures["speed over the faster dense twin"] == pytest.approx(1.2)
    compiled = figures["speed over a compiled fp32 twin"]
    assert compiled == pytest.approx(0.9) if compiler else math.isnan(compiled)


def test_the_ratio_is_to_the_faster_peer(monkeypatch):
    ms = {"trits": 10.0, "dense-autocast": 15.0, "dense-bf16": 12.0}

    def in_own_process(name, _setting):
        return timing(ms[name], iterations=2.0)

    monkeypatch.setattr(whole_model, "in_own_process", in_own_process)
    monkeypatch.setattr(whole_model, "why_absent", lambda *_: None)
    figures = whole_model.training_step(CPU)
    assert figures.keys() == GOALS["G3"].clauses.keys()
    assert figures["speed over the faster dense twin"] == pytest.approx(1.2)
    assert figures["of a step, GPU idle, trits"] == 0.5
    many = whole_model.many_tokens(CPU)
    assert many.keys() == GOALS["G5"].clauses.keys()
    assert 0.1 < many["share of bf16 peak, the core as often as iterated"] < 0.2


def test_a_process_that_fails_is_one_line():
    with pytest.raises(UserError, match="failed: no way"):
        whole_model._python(["-c", "raise SystemExit('no way')"])


def test_a_cold_start_is_measured_in_fresh_processes_with_and_without_a_warm_up(monkeypatch):
    calls = []
    bytecode = []

    def python(arguments, cwd=None, extra=None):
        bytecode.append(extra["PYTHONPYCACHEPREFIX"])
        assert extra["PYTHONDONTWRITEBYTECODE"] == ""
        if "Linear" in arguments[1]:
            assert "TRITON_CACHE_DIR" not in extra
            return str(10 - len(bytecode) / 10)
        caches = {name: Path(place) for name, place in extra.items() if not name.startswith("PYTHON")}
        assert not any(place.exists() and any(place.iterdir()) for place in caches.values())
        calls.append((arguments, caches["TRITON_CACHE_DIR"].parent))
        number = len(calls) - 1
        return f"{number} {10 * number} {number / 10}"

    monkeypatch.setattr(whole_model, "_python", python)
    figures = whole_model.cold_start(CPU, "tiny", pairs=3)
    assert figures.keys() == GOALS["G7"].clauses.keys()
    assert calls.pop(0)[0][2:] == ["ahead", "tiny", "cpu", "0"]  # whose imports leave bytecode
    assert len({*bytecode}) == 1
    again = 3 * ["0"]  # of which the quickest counts
    assert [arguments[-1] for arguments, _ in calls] == ["0", "3", *again, "0", *again, "--warmup", "3"]
    kinds = [*5 * ["first"], *4 * ["ahead"], "smoke", "first"]
    assert [arguments[2] for arguments, _ in calls] == kinds
    places = [place for _, place in calls]
    assert places == [*5 * [places[0]], *4 * [places[5]], *2 * [places[9]]]
    assert len({*places}) == 3
    assert figures["first update, empty caches"] == 1
    assert figures["the same without smoke --warmup ahead, after a step of 64 bytes"] == 20
    assert figures["first update, second process"] == 3
    assert figures["of the second process: import torch"] == 0.3
    assert figures["first update, empty caches, compiled ahead"] == 6
    assert figures["of the first update, compiled ahead: import torch"] == 0.6
    assert figures["first update, second process after compiling ahead"] == 7
    assert figures["kernels compiled over 50 batches and contexts"] == 110
    assert figures["first update after smoke --warmup"] == 11
    assert figures["a step of one linear of torch, second process"] == pytest.approx(10 - 1.5)  # as well


def test_figures_of_a_first_update_come_from_a_process():
    for what in ("first", "ahead"):
        seconds, compiled, importing = whole_model._run_script(
            what, "tiny", "cpu", "1", extra={"TRITON_CACHE_DIR": "/nonexistent"}
        )
        assert 0.1 < importing < seconds < 120
        assert compiled == 0


@pytest.mark.parametrize(
    ("spans", "idle"),
    [
        ([], 0),
        ([(3, 5)], 0),
        ([(3, 5), (5, 9)], 0),
        ([(7, 9), (1, 2), (4, 6)], 3),
        ([(0, 10), (2, 3), (4, 5), (12, 13)], 2),  # some at the same time
    ],
)
def test_idle_is_what_no_kernel_covers(spans, idle):
    assert uncovered(spans) == idle
