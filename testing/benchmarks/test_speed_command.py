"""The commands of speed and memory on the smallest preset, and what they refuse."""

import subprocess
import sys
import types

import pytest
import torch

from arbitor.train.device import Device, resolve_device
from benchmarks import common
from benchmarks.learning.table import Table
from benchmarks.memory import __main__ as memory
from benchmarks.speed import __main__ as speed
from benchmarks.speed import contestants, table
from benchmarks.speed.contestants import Setting, Timing

SMALL = [
    "--device",
    "cpu",
    "--preset",
    "tiny",
    "--batch",
    "2",
    "--ctx",
    "16",
    "--threads",
    "1",
    "--steps",
    "2",
]
TIMING = Timing(
    ms_per_step=4.0,
    peak_bytes=3000,
    kept_bytes=2300,
    weights=1000,
    share_of_peak=0.25,
    iterations=0.0,
    idle_ms=0.0,
)


@pytest.mark.long
def test_a_row_of_each_contestant_in_a_process_of_its_own(tmp_path, capsys):
    arguments = [*SMALL, "--results", str(tmp_path), "--contestants", "trits", "dense-fp32", "torchao"]
    assert speed.main(arguments) == 0
    rows = {
        row["contestant"]: row for row in Table(tmp_path / "speed-cpu.csv", table.COLUMNS, table.KEY).rows()
    }
    assert list(rows) == ["trits", "dense-fp32"]
    for row in rows.values():
        seconds = float(row["ms_per_step"]) / 1e3
        assert float(row["bytes_per_second"]) == pytest.approx(2 * 16 / seconds, rel=0.01)
        assert int(row["peak_bytes"]) > 50e6  # of a whole process with torch
        assert 0 < float(row["share_of_peak"]) < 1
    assert (rows["trits"]["state"], rows["dense-fp32"]["state"]) == ("full", "")
    printed = capsys.readouterr().out
    assert "torchao: skipped, " in printed
    assert f"plot: {tmp_path / 'speed-cpu.png'}" in printed
    assert (tmp_path / "speed-cpu.png").read_bytes().startswith(b"\x89PNG")


def test_peers_that_would_be_none_are_left_out(monkeypatch):
    setting = Setting(preset="tiny", batch=1, ctx=8, state="full", device="cpu")
    monkeypatch.setattr(contestants.shutil, "which", lambda _: None)
    assert "needs g++" in contestants.why_absent("dense-compiled", setting)
    monkeypatch.setattr(contestants.shutil, "which", lambda name: f"/usr/bin/{name}")
    assert contestants.why_absent("dense-compiled", setting) is None
    for ratio, absent in ((0.5, False), (3.9, False), (50.0, True)):
        monkeypatch.setattr(contestants, "_bf16_over_fp32", lambda ratio=ratio: ratio)
        assert (contestants.why_absent("dense-bf16", setting) is not None) is absent


def test_the_name_of_a_cpu_says_which_it_is():
    name = common.device_name(torch.device("cpu"))
    assert name.startswith("cpu: ")
    assert name.endswith(torch.backends.cpu.get_cpu_capability())


def fake(monkeypatch):
    """Nothing is timed; returns the list of what was asked for."""
    asked = []

    def in_own_process(name, setting):
        asked.append((name, setting.state))
        return TIMING

    monkeypatch.setattr(table, "in_own_process", in_own_process)
    return asked


def test_no_plot_without_matplotlib(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    drawn = []
    assert "pip install matplotlib" in common.plotted(tmp_path / "a.png", lambda: drawn.append("a"))
    assert drawn == []


def test_memory_has_a_row_for_every_state(monkeypatch, tmp_path):
    asked = fake(monkeypatch)
    there = ("trits", "dense-bf16", "dense-fp32")
    monkeypatch.setattr(contestants, "why_absent", lambda name, _: None if name in there else "no")
    assert memory.main([*SMALL, "--results", str(tmp_path)]) == 0
    assert (tmp_path / "memory-cpu.png").stat().st_size > 1000
    assert sorted(asked) == [
        ("dense-bf16", "lean"),
        ("dense-fp32", "lean"),
        ("trits", "compact"),
        ("trits", "full"),
        ("trits", "lean"),
    ]
    rows = Table(tmp_path / "memory-cpu.csv", memory.COLUMNS, table.KEY).rows()
    assert len(rows) == 5
    assert {row["kept_per_weight"] for row in rows} == {"2.3000"}
    assert {row["peak_per_weight"] for row in rows} == {"3.0000"}
    asked.clear()
    assert memory.main([*SMALL, "--results", str(tmp_path), "--state", "full"]) == 0
    assert [state for name, state in asked if name == "trits"] == ["full"]


def test_kept_bytes_are_those_between_steps():
    setting = Setting(preset="tiny", batch=1, ctx=16, state="lean", device="cpu", warmup=1, steps=1)
    trits, dense = (contestants.measure(name, setting) for name in ("trits", "dense-fp32"))
    assert trits.weights == dense.weights  # tiny has no vectors, which the twin would lack
    assert 1.2 < trits.kept_bytes / trits.weights < 1.4
    assert 12 <= dense.kept_bytes / dense.weights < 12.01  # masters and two moments


def test_the_twin_learns_from_the_same_text():
    setting = Setting(preset="tiny", batch=2, ctx=16, state="full", device="cpu", warmup=0, steps=1)
    with contestants._dense("dense-bf16", setting) as (model, take_step, _):
        before = [p.detach().clone() for p in model.parameters()]
        take_step()
        assert all((p != old).any() for p, old in zip(model.parameters(), before, strict=True))
        assert {str(p.dtype) for p in model.parameters()} == {"torch.bfloat16"}


def test_who_is_absent_is_told_why(monkeypatch):
    arb = Setting(preset="arb-1b", batch=1, ctx=16, state="lean", device="cpu")
    assert "no dense experts" in contestants.why_absent("dense-bf16", arb)
    assert contestants.why_absent("trits", arb) is None
    tiny = Setting(preset="tiny", batch=1, ctx=16, state="lean", device="cpu")
    assert "plain fp32" in contestants.why_absent("dense-autocast", tiny)
    assert contestants.why_absent("dense-fp32", tiny) is None
    assert "plain fp32" in contestants.why_absent("torchao", tiny)
    monkeypatch.setattr(contestants, "resolve_device", lambda _: Device(torch.device("cuda"), "GPU", ""))
    monkeypatch.setattr(contestants, "find_spec", lambda _: None)
    assert "not installed" in contestants.why_absent("torchao", tiny)
    monkeypatch.setattr(contestants, "find_spec", lambda _: "there")
    assert contestants.why_absent("torchao", tiny) is None
    assert "no dense experts" in contestants.why_absent("torchao", arb)


def test_the_twin_of_few_bits(monkeypatch):
    class Moments:
        """Of 8 bits with a scale, as torchao's."""

        codes = torch.zeros(64, dtype=torch.uint8)
        scale = torch.zeros(2)

        def __tensor_flatten__(self):
            return ["codes", "scale"], ()

    def adamw(parameters, **options):
        asked.append(options)
        return torch.optim.AdamW(parameters)

    asked = []
    monkeypatch.setitem(sys.modules, "torchao", types.ModuleType("torchao"))
    monkeypatch.setitem(sys.modules, "torchao.optim", types.SimpleNamespace(AdamW8bit=adamw))
    setting = Setting(preset="tiny", batch=2, ctx=16, state="full", device="cpu", warmup=0, steps=1)
    with contestants._dense("torchao", setting) as (model, take_step, kept):
        take_step()
        assert {str(p.dtype) for p in model.parameters()} == {"torch.bfloat16"}
        assert asked == [{"lr": 1e-3, "betas": (0.9, 0.95), "bf16_stochastic_round": True}]
        assert kept()[0] > 6 * kept()[1]  # torch's own in its place
    assert contestants._nbytes(Moments()) == 64 + 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch", "0"], "--batch must be at least 1"),
        (["--ctx", "2"], "ctx must be between 4"),
        (["--steps", "0"], "--steps must be at least 1"),
        (["--threads", "-1"], "--threads must be at least 1"),
    ],
)
@pytest.mark.parametrize("command", [speed, memory], ids=["speed", "memory"])
def test_bad_arguments_are_one_line(tmp_path, capsys, command, arguments, message):
    assert command.main([*SMALL, "--results", str(tmp_path), *arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    assert list(tmp_path.iterdir()) == []


def test_the_commit_is_that_of_git(repository):
    asked = subprocess.run(
        ["git", "-C", str(repository), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    assert common.commit().removesuffix("-dirty") == asked.stdout[:12]


def test_the_commit_is_empty_without_a_checkout(monkeypatch, tmp_path):
    monkeypatch.setattr(common, "REPOSITORY", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert common.commit() == ""


def test_files_are_named_after_the_device(monkeypatch):
    assert common.slug(resolve_device("cpu").device) == "cpu"
    names = {"NVIDIA H100 80GB HBM3": "h100", "NVIDIA H200": "h200", "Some GPU 9": "some-gpu-9"}
    for name, slug in names.items():
        monkeypatch.setattr(common, "device_name", lambda _, name=name: name)
        assert common.slug(torch.device("cuda")) == slug
