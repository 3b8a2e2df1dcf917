"""The judge of a run, on folders whose metrics are made up: each criterion can hold and fail."""

import json

import numpy as np
import pytest
import torch

from arbitor.config import dump_toml, override, preset
from arbitor.model import ARBModel
from arbitor.train.metrics import STEP_KEYS
from benchmarks.ablation import __main__ as command
from benchmarks.ablation import stability

STEPS = 200
DATA = "all the words that ever were, and some that never will be; " * 40


@pytest.fixture
def make_run(tmp_path):
    """make_run(change=None, state="full", summary=..., **model) -> folder of a finished run."""

    def make(change=None, state="full", bytes_per_weight=2.3, finished=True, **model):
        data = tmp_path / "data.txt"
        data.write_text(DATA)
        config = override(
            preset("arb-small"),
            steps=STEPS,
            state=state,
            ctx=64,
            batch=8,
            data=(str(data),),
            **{"memory_rows": 64, **model},
        )
        folder = tmp_path / "run"
        folder.mkdir()
        (folder / "config.toml").write_text(dump_toml(config))
        lines = []
        for step in range(1, STEPS + 1):
            line = dict.fromkeys(STEP_KEYS, 1.0) | {"step": step, "bytes_seen": 512 * step}
            line |= {"loss": 5.0 / step**0.3, "expert_load": 1.4}
            line |= {"motif_perplexity": 200.0, "mean_iterations": 2.1}
            if change is not None:
                change(line)
            lines.append(line)
        evaluation = {"step": 80, "held_out_bits_per_byte": 3.0, "held_out_bytes": 512, "seconds": 1.0}
        lines.insert(80, evaluation)
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        if finished:
            summary = {"steps": STEPS, "held_out_bits_per_byte": 3.0, "bytes_per_weight": bytes_per_weight}
            (folder / "summary.json").write_text(json.dumps(summary))
        return folder

    return make


def failed(checks):
    return [check.name for check in checks if not check.met]


def test_a_healthy_run_is_stable(make_run, capsys):
    folder = make_run()
    assert command.main(["--stability", str(folder)]) == 0
    assert capsys.readouterr().out.endswith("run: stable\n")


def at(step, **values):
    def change(line):
        if line["step"] == step:
            line.update(values)

    return change


def always(**values):
    return lambda line: line.update(values)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("loss", at(150, loss=3.5)),
        ("loss", at(11, loss=9.0)),
        ("loss", at(150, loss=None)),
        ("max load", at(20, expert_load=4.1)),
        ("motif perplexity", always(motif_perplexity=2.0)),
        ("mean iterations", always(mean_iterations=1.01)),
        ("mean iterations", always(mean_iterations=3.99)),
    ],
)
def test_each_criterion_can_fail(make_run, capsys, name, change):
    folder = make_run(change)
    assert failed(stability.judge(folder)) == [name]
    assert command.main(["--stability", str(folder)]) == 1
    assert f"FAIL {name}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "change",
    [
        at(5, loss=50.0),  # in the warm-up
        at(150, loss=5.0 / 150**0.3 * 1.3),
        at(5, expert_load=7.0),
        at(20, expert_load=4.0),
        at(100, motif_perplexity=2.0),  # what counts is the end
        at(100, mean_iterations=1.0),
    ],
)
def test_what_is_allowed(make_run, change):
    assert failed(stability.judge(make_run(change))) == []


@pytest.mark.parametrize(("state", "limit"), [("full", 2.35), ("compact", 1.85), ("lean", 1.30)])
def test_bytes_a_weight(make_run, state, limit):
    assert failed(stability.judge(make_run(state=state, bytes_per_weight=limit))) == []
    config = override(preset("arb-small"), state=state)
    assert not stability.bytes_check(config, {"bytes_per_weight": limit + 0.001}).met


def test_a_part_that_is_off_is_named(make_run):
    checks = stability.judge(make_run(memory_rows=0, graph_edges=0))
    assert failed(checks) == ["parts"]
    assert checks[0].found == "without graph, memory"


def test_perplexity_of_trigrams_is_that_of_a_histogram():
    ids = np.random.default_rng(0).integers(0, 3, (4, 20))
    trigrams = [tuple(row[i : i + 3]) for row in ids for i in range(18)]
    counts = np.array([trigrams.count(t) for t in set(trigrams)])
    share = counts / counts.sum()
    assert stability._perplexity(ids) == pytest.approx(np.exp(-(share * np.log(share)).sum()))


def test_the_perplexity_wanted_is_a_fifth_of_the_smaller_number(make_run):
    folder = make_run(always(motif_perplexity=2.0), motif_trits=2)
    check = next(c for c in stability.judge(folder) if c.name == "motif perplexity")
    assert check.met  # 2 of 9 motifs is more than a fifth
    assert check.wanted.startswith(">= 2: a fifth of the smaller of 9 motifs")


def test_the_model_gives_what_the_judge_reads():
    small = {
        "dim": 32,
        "expert_dim": 32,
        "ffn_dim": 32,
        "graph_edges": 64,
        "memory_rows": 64,
        "memory_dim": 20,
    }
    model = ARBModel("arb-small", **small)
    assert stability.missing_parts(model.config) == []
    ids = torch.randint(0, 256, (2, 16))
    model(ids, targets=ids)
    assert {"expert_load", "motif_perplexity", "mean_iterations"} <= model.part_metrics().keys()


def test_what_is_no_finished_run_is_one_line(make_run, tmp_path, capsys):
    for folder, message in (
        (tmp_path, "not the folder of a run"),
        (make_run(finished=False), "not finished"),
    ):
        assert command.main(["--stability", str(folder)]) == 2
        err = capsys.readouterr().err
        assert message in err
        assert err.count("\n") == 1


def test_too_short_a_run_is_refused(make_run, capsys):
    folder = make_run()
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[:50]))
    assert command.main(["--stability", str(folder)]) == 2
    assert "more than 50" in capsys.readouterr().err
