"""The command end to end with a micro size: rows, resuming, replacing, plan, plot, scale votes."""

import dataclasses

import pytest

from arbitor.config import ModelConfig
from benchmarks.learning import __main__ as command
from benchmarks.learning import sizes, summary
from benchmarks.learning.sweep import plan
from benchmarks.learning.table import Table

MICRO = dataclasses.replace(
    sizes.SIZES["cpu"],
    model=ModelConfig(
        dim=32, num_heads=2, head_dim=8, rope_dim=4, value_dim=16, kv_latent_dim=16, ffn_dim=32, ctx=16
    ),
    steps=2,
    batch=2,
    corpus="given",
    held_out_bytes=64,
)


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Calls the command on a small text; returns exit code, output and the table."""
    text = tmp_path / "text.txt"
    text.write_text("what is said once need not be said again. " * 50)
    monkeypatch.setitem(sizes.SIZES, "cpu", MICRO)

    def call(*arguments, csv="learning-cpu.csv"):
        code = command.main(
            [*arguments, "--data", str(text), "--results", str(tmp_path), "--jobs", "1", "--device", "cpu"]
        )
        return code, capsys.readouterr(), Table(tmp_path / csv)

    return call


def fake_runner(figures):
    """Stands in for the worker processes: the figure of a run is a function of the run."""

    def run_all(planner, record, size, texts, **options):
        while ready := planner(set()):
            record(
                ready[0],
                {
                    "contestant": ready[0].contestant,
                    "lr": format(ready[0].lr, "g"),
                    "seed": str(ready[0].seed),
                    "trunk_weights": "1000",
                    "bytes_seen": str(size.bytes_seen),
                    "bytes_per_weight": "2.3",
                    "held_out_bits_per_byte": str(figures(ready[0])),
                    "seconds": "1.0",
                    "device": "cpu",
                    "torch": "2",
                    "date": "2026-01-01",
                },
            )
        return True

    return run_all


def test_one_contestant_in_a_worker_process(run):
    code, _, table = run("--contestant", "trits-sign")
    assert code == 0
    assert [(r["contestant"], r["seed"]) for r in table.rows()] == [("trits-sign", s) for s in "012"]
    before = table.path.read_text()
    code, captured, _ = run("--contestant", "trits-sign")
    assert code == 0
    assert table.path.read_text() == before
    assert "trits-sign" in captured.out


def test_a_full_sweep_is_resumed_and_forced(run, monkeypatch):
    monkeypatch.setattr(command, "run_all", fake_runner(lambda run: 2 + abs(run.lr - 0.05)))
    code, _, table = run("--contestant", "trits-full", "dense-muon")
    assert code == 0
    assert len(table.rows()) == 2 * 5
    assert [s.values for s in summary.standings(table.rows())] == [(2.0, 2.0, 2.0)] * 2
    monkeypatch.setattr(command, "run_all", fake_runner(lambda run: 1.0 + abs(run.lr - 0.05)))
    run("--contestant", "trits-full", "dense-muon")
    assert min(float(r["held_out_bits_per_byte"]) for r in table.rows()) == 2.0
    run("--contestant", "trits-full", "--force")
    assert len(table.rows()) == 2 * 5
    assert [s.mean for s in summary.standings(table.rows())] == [1.0, 2.0]


def test_rows_name_their_text_and_commit(run, monkeypatch):
    monkeypatch.setattr(command, "run_all", fake_runner(lambda run: 2.0))
    monkeypatch.setattr(command, "commit", lambda: "abc-dirty")
    _, captured, table = run("--contestant", "trits-sign")
    (text,) = {row["text"] for row in table.rows()}
    assert f"(text {text})" in captured.out
    assert {row["commit"] for row in table.rows()} == {"abc-dirty"}


def test_forcing_another_text_leaves_no_row_of_the_first(run, monkeypatch, tmp_path):
    monkeypatch.setattr(command, "run_all", fake_runner(lambda run: 1.0 + abs(run.lr - 0.05)))
    _, _, table = run("--contestant", "trits-full", "dense-muon")
    first = table.rows()
    (tmp_path / "text.txt").write_text("another text, as long as the one before it, or longer. " * 50)
    # The best rate is another one now, so that not every old row would be measured again.
    monkeypatch.setattr(command, "run_all", fake_runner(lambda run: 2.0 + abs(run.lr - 0.1)))
    for arguments in (["--contestant", "trits-lean"], ["--contestant", "trits-full", "--force"]):
        code, captured, _ = run(*arguments)
        assert code == 2
        assert "has rows of another text" in captured.err
        assert table.rows() == first
    code, captured, _ = run("--contestant", "trits-full", "dense-muon", "--force")
    assert code == 0
    assert {row["text"] for row in table.rows()}.isdisjoint({row["text"] for row in first})
    assert min(float(row["held_out_bits_per_byte"]) for row in table.rows()) == 2.0
    assert (tmp_path / "learning-cpu.text").read_text().startswith(table.rows()[0]["text"])


def test_an_interrupted_force_does_not_mix_texts_either(run, monkeypatch, tmp_path):
    monkeypatch.setattr(command, "run_all", fake_runner(lambda run: 1.0))
    _, _, table = run("--contestant", "trits-sign")
    (tmp_path / "text.txt").write_text("another text, as long as the one before it, or longer. " * 50)
    monkeypatch.setattr(command, "run_all", lambda planner, record, *_, **rest: False)
    assert run("--contestant", "trits-sign", "--force")[0] == 75
    assert table.rows() == []
    monkeypatch.setattr(command, "run_all", fake_runner(lambda run: 2.0))
    run("--contestant", "trits-sign")
    assert [row["held_out_bits_per_byte"] for row in table.rows()] == ["2.0"] * 3


def test_the_report_has_a_ratio_to_each_twin(run, monkeypatch):
    figures = {"trits-sign": 3.0, "bitnet-adamw": 1.0, "bitnet-muon": 2.0, "dense-adamw": 4.0}
    monkeypatch.setattr(
        command, "run_all", fake_runner(lambda run: figures.get(run.contestant, 8.0) + abs(run.lr - 0.05))
    )
    names = ["trits-sign", "bitnet-adamw", "bitnet-muon", "dense-adamw", "dense-muon"]
    _, captured, table = run("--contestant", *names)
    best = {s.name: s.mean for s in summary.standings(table.rows())}
    line = next(line for line in captured.out.splitlines() if line.startswith("trits-sign   "))
    assert line.split()[-4:] == [f"{best['trits-sign'] / best[name]:.4f}" for name in names[1:]]


def test_time_that_runs_out_leaves_what_is_finished(run):
    code, _, table = run("--contestant", "trits-lean", "--minutes", "0")
    assert code == 75
    assert table.rows() == []


def test_plan_runs_nothing(run):
    code, captured, table = run("--plan")
    assert code == 0
    assert not table.path.exists()
    assert "38 runs are left" in captured.out
    assert "trits-compact lr 0.07 seed 0" in captured.out


def test_attempts_are_run_when_they_are_asked_for(run, monkeypatch):
    monkeypatch.setattr(command, "run_all", fake_runner(lambda run: 2 + abs(run.lr - 0.1) + run.seed / 100))
    code, captured, table = run("--attempts", "--contestant", "trits-lean-more")
    assert code == 0
    points = {(float(r["lr"]), int(r["seed"])) for r in table.rows()}
    assert points == {(lr, seed) for lr in (0.075, 0.1, 0.15) for seed in range(6)}
    (standing,) = summary.standings(table.rows())
    assert (standing.lr, len(standing.values)) == (0.1, 6)
    assert "trits-lean-more" in captured.out
    code, captured, _ = run("--attempts", "--plan")
    assert "trits-compact-g16 lr 0.035 seed 0" in captured.out
    assert "37 runs are left" in captured.out


def test_unknown_contestant_is_one_line(run):
    code, captured, _ = run("--contestant", "trits-fat")
    assert code == 2
    assert captured.err.count("\n") == 1
    assert "trits-full" in captured.err


def test_scale_votes_are_paired(run, monkeypatch):
    cost = {0.0: 0.0, 0.001: 0.25}
    monkeypatch.setattr(command, "run_all", fake_runner(lambda run: 2 + run.seed / 8 + cost[run.scale_lr]))
    code, captured, _ = run("--scale-votes", "--scale-lr", "0.001")
    assert code == 0
    assert captured.out.count("scale_lr 0.001: +0.2500 +- 0.0000 over 3 seeds") == 2


def test_plot_is_a_png(run, monkeypatch, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install matplotlib")
    monkeypatch.setattr(command, "run_all", fake_runner(lambda run: 2 + abs(run.lr - 0.05)))
    run("--contestant", "trits-full")
    assert (tmp_path / "learning-cpu.png").read_bytes().startswith(b"\x89PNG")


def test_the_whole_sweep_of_all_contestants_ends(run, monkeypatch):
    monkeypatch.setattr(command, "run_all", fake_runner(lambda run: 2 - run.lr if run.lr < 1 else 3))
    code, _, table = run()
    assert code == 0
    assert plan(list(command.CONTESTANTS.values()), table.rows()) == []
