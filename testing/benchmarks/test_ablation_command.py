"""The ablation's command end to end with a micro size: rows, resuming, failures, bad arguments."""

import dataclasses
import os

import numpy as np
import pytest

from arbitor.config import ModelConfig
from benchmarks.ablation import __main__ as command
from benchmarks.ablation import runner, sizes, summary, training
from benchmarks.ablation.training import COLUMNS, KEY, TIMED_COLUMNS, TIMED_KEY, Job, Run
from benchmarks.ablation.variants import variants_of
from benchmarks.learning.table import Table

MICRO = dataclasses.replace(
    sizes.SIZES["tiny"],
    model=ModelConfig(
        dim=80,
        num_prelude_layers=1,
        num_heads=2,
        head_dim=8,
        rope_dim=4,
        value_dim=16,
        kv_latent_dim=16,
        ffn_dim=32,
        ctx=16,
        motif_trits=3,
        num_experts=4,
        expert_dim=320,
        graph_edges=64,
        memory_rows=50,
        memory_heads=2,
        memory_dim=20,
    ),
    steps=2,
    batch=2,
    corpus="given",
    held_out_bytes=64,
)
TEXT = "what is said once need not be said again. " * 50


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Calls the command on a small text; returns exit code, output and the table."""
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    monkeypatch.setitem(sizes.SIZES, "tiny", MICRO)

    def call(*arguments, text=text):
        given = ["--size", "tiny", "--data", str(text), "--results", str(tmp_path), "--device", "cpu"]
        code = command.main([*given, *arguments])
        return code, capsys.readouterr(), Table(tmp_path / "ablation-tiny.csv", COLUMNS, KEY)

    return call


def row_of(run, bits):
    """A row as a finished run gives it."""
    values = dict.fromkeys(COLUMNS, "") | {"bytes_seen": "64"} | run.identify()
    figures = {
        "trit_weights": "1000",
        "active_trit_weights": "500",
        "bytes_per_weight": "2.3",
        "seconds": "4.0",
        "held_out_bits_per_byte": str(bits),
        "text": "abc",
        "device": "cpu",
    }
    return values | figures


def fake_runner(bits, failing=()):
    """Stands in for the processes: the figure of a run is a function of the run."""

    def run_all(runs, record, job, jobs):
        for run in runs:
            if run.variant not in failing:
                record(run, row_of(run, bits(run)) | {"text": job.text})
        return [f"{run}: died" for run in runs if run.variant in failing]

    return run_all


@pytest.mark.long
def test_runs_in_processes_of_their_own_and_is_not_run_twice(run):
    arguments = ("--variants", "base,all", "--seeds", "3")
    code, captured, table = run(*arguments)
    assert code == 0, captured.err
    rows = {row["variant"]: row for row in table.rows()}
    assert list(rows) == ["base", "all"]
    assert {row["seed"] for row in rows.values()} == {"3"}
    assert rows["base"]["motif_perplexity"] == rows["base"]["max_load"] == ""
    assert float(rows["base"]["mean_iterations"]) == 1
    assert 1 <= float(rows["all"]["motif_perplexity"]) <= 27
    assert 1 <= float(rows["all"]["max_load"]) <= 4
    assert 1 <= float(rows["all"]["mean_iterations"]) <= 4
    assert {row["bytes_seen"] for row in rows.values()} == {str(2 * 2 * 16)}
    assert "bytes/s" in captured.out
    before = table.path.read_text()
    code, captured, _ = run(*arguments)
    assert code == 0
    assert table.path.read_text() == before
    assert "to base" in captured.out


def test_other_steps_and_rates_are_other_rows(run, monkeypatch):
    monkeypatch.setattr(command, "run_all", fake_runner(lambda run: 2 + run.lr))
    run("--variants", "base")
    run("--variants", "base", "--lr", "0.5")
    _, captured, table = run("--variants", "base", "--steps", "3")
    assert len(table.rows()) == 6
    assert captured.out.count("full state") == 3
    run("--variants", "base", "--force")
    assert len(table.rows()) == 6


def test_each_state_has_a_rate_of_its_own(run, monkeypatch):
    monkeypatch.setattr(command, "run_all", fake_runner(lambda run: 2.0))
    for state in ("full", "compact", "lean"):
        run("--variants", "base", "--seeds", "0", "--state", state)
    _, _, table = run("--variants", "base", "--seeds", "0", "--state", "lean", "--lr", "0.1")
    rates = [(row["state"], float(row["lr"])) for row in table.rows()]
    assert rates == [("full", 0.025), ("compact", 0.035), ("lean", 0.15), ("lean", 0.1)]


def test_rows_of_another_text_are_not_mixed_with_new_ones(run, monkeypatch, tmp_path):
    monkeypatch.setattr(command, "run_all", fake_runner(lambda run: 2.0))
    run("--variants", "base,vq", "--seeds", "0")
    other = tmp_path / "other.txt"
    other.write_text(TEXT.upper())
    arguments = ("--variants", "base", "--seeds", "0", "--force")
    before = (tmp_path / "ablation-tiny.csv").read_text()
    code, captured, table = run(*arguments, text=other)
    assert code == 2
    assert "rows of another text" in captured.err
    assert table.path.read_text() == before
    code, _, table = run("--variants", "base,vq", "--seeds", "0", "--force", text=other)
    assert code == 0
    assert len({row["text"] for row in table.rows()}) == 1
    assert table.path.read_text() != before


def test_what_fails_is_told_and_the_rest_is_kept(run, monkeypatch):
    monkeypatch.setattr(command, "run_all", fake_runner(lambda run: 2.0, failing=("vq",)))
    code, captured, table = run("--variants", "base,vq", "--seeds", "0")
    assert code == 1
    assert "failed: vq seed 0" in captured.err
    assert [row["variant"] for row in table.rows()] == ["base"]


def test_a_process_that_fails_does_not_stop_the_others(tmp_path):
    for part in ("train", "held_out"):
        np.save(tmp_path / part, np.frombuffer(TEXT.encode(), dtype=np.uint8))
    paths = [str(tmp_path / f"{part}.npy") for part in ("train", "held_out")]
    job = Job(MICRO, *paths, text="abc", device="cpu", threads=1, commit="0123abc")
    runs = [Run(name, 0, 0.05, "lean", MICRO.bytes_seen) for name in ("no such variant", "base")]
    recorded = []
    failures = runner.run_all(runs, lambda run, row: recorded.append((run, row)), job, jobs=2)
    assert failures == ["no such variant seed 0 lr 0.05 lean: KeyError: 'no such variant'"]
    ((run, row),) = recorded
    assert run == runs[1]
    assert tuple(sorted(row)) == tuple(sorted(COLUMNS))
    assert (row["commit"], row["text"], row["state"]) == ("0123abc", "abc", "lean")


def test_a_process_that_dies_is_told(monkeypatch):
    monkeypatch.setattr(runner, "_send_measured", os._exit)  # with the wrong arguments: it ends at once
    job = Job(MICRO, "", "", text="", device="cpu", threads=1, commit="")
    (failure,) = runner.run_all([Run("base", 0, 0.05, "full", 1)], print, job, jobs=1)
    assert failure.startswith("base seed 0 lr 0.05 full: its process ended with code 1")


def test_an_interruption_ends_the_processes(monkeypatch):
    started = []
    real = runner._start

    def start(*arguments):
        started.append(real(*arguments))
        return started[-1]

    def interrupted(_receivers):
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "_start", start)
    monkeypatch.setattr(runner, "wait", interrupted)
    job = Job(MICRO, "", "", text="", device="cpu", threads=1, commit="")
    with pytest.raises(KeyboardInterrupt):
        runner.run_all([Run("base", seed, 0.05, "full", 1) for seed in range(3)], print, job, jobs=2)
    assert len(started) == 2
    assert not any(running.process.is_alive() for _, running in started)


def test_plan_runs_nothing(run):
    code, captured, table = run("--plan")
    assert code == 0
    assert not table.path.exists()
    assert "26 runs to do" in captured.out
    assert all(v.reason in captured.out for v in variants_of(MICRO.model).values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--variants", "vqq"), "unknown variant 'vqq'"),
        (("--seeds", "0,-1"), "--seeds must be"),
        (("--seeds", "x"), "--seeds must be"),
        (("--steps", "0"), "--steps must be at least 1"),
        (("--steps", "1000"), "fewer --steps"),
        (("--lr", "nan"), "--lr must be"),
        (("--lr", "0"), "--lr must be"),
        (("--jobs", "0"), "--jobs must be"),
        (("--stability", "/nowhere"), "is not the folder of a run"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_bad_arguments_are_one_line(run, arguments, message):
    code, captured, table = run(*arguments)
    assert code == 2
    assert captured.err.count("\n") == 1
    assert message in captured.err
    assert not table.path.exists()


def test_differences_are_paired_by_seed():
    def row(variant, seed, bits):
        run = Run(variant, seed, 0.1, "full", 4000)
        return row_of(run, bits)

    rows = [row("base", 0, 2.0), row("base", 1, 2.5), row("vq", 0, 1.9), row("vq", 1, 2.3)]
    found = summary.standings(rows, variants_of(MICRO.model))
    mean, error = found["vq"].minus(found["base"])
    assert mean == pytest.approx(-0.15)
    assert error == pytest.approx(0.05)
    assert "-0.1500 +- 0.0500 to base" in summary.report(rows, variants_of(MICRO.model))


def test_gpus_are_those_that_may_be_seen(monkeypatch):
    monkeypatch.setattr(runner.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(runner.torch.cuda, "device_count", lambda: 3)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert runner.visible_gpus() == ["0", "1", "2"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    assert runner.visible_gpus() == ["4", "6"]


def test_variants_may_have_equal_time(run, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "run_all", fake_runner(lambda run: 2 + run.limit))
    code, output, _ = run("--variants", "base,moe", "--seeds", "0", "--seconds", "0.5")
    assert code == 0, output.err
    rows = Table(tmp_path / "ablation-tiny-timed.csv", TIMED_COLUMNS, TIMED_KEY).rows()
    assert [(row["variant"], row["limit"], row["held_out_bits_per_byte"]) for row in rows] == [
        ("base", "0.5", "2.5"),
        ("moe", "0.5", "2.5"),
    ]
    assert "0.5 s of training" in output.out
    again, output, _ = run("--variants", "base,moe", "--seeds", "0", "--seconds", "0.5", "--plan")
    assert (again, "0 runs to do" in output.out) == (0, True)


def test_steps_that_took_another_time_are_taken_once_more(monkeypatch):
    taken = []

    def measured(run, job, steps, each=0.02):  # twice as long as the first ones
        taken.append(steps)
        return {"bytes_seen": str(steps)}, steps * each

    monkeypatch.setattr(training, "_seconds_a_step", lambda run, job: 0.01)
    monkeypatch.setattr(training, "_measure", measured)
    timed = Run("base", 0, 0.05, "full", 0, 10.0)
    assert training.measure(timed, None) == {"bytes_seen": "500"}
    assert taken == [1000, 500]


def test_a_timed_run_is_measured_and_trained(tmp_path):
    paths = [str(tmp_path / f"{part}.npy") for part in ("train", "held_out")]
    for path in paths:
        np.save(path, np.frombuffer(TEXT.encode(), dtype=np.uint8))
    job = Job(MICRO, *paths, text="abc", device="cpu", threads=1, commit="test")
    row = training.measure(Run("base", 0, 0.05, "full", 0, 0.2), job)
    assert set(row) == set(TIMED_COLUMNS)
    assert int(row["bytes_seen"]) % (MICRO.batch * MICRO.model.ctx) == 0 < int(row["bytes_seen"])


@pytest.mark.parametrize("arguments", [("--seconds", "0"), ("--seconds", "3", "--steps", "2")])
def test_bad_times_are_exit_code_2(run, arguments):
    code, output, _ = run(*arguments)
    assert code == 2
    assert "--seconds" in output.err
