"""`arbitor smoke`: what it prints is what the audit counts, and it takes real steps."""

import re
import subprocess
import sys

import pytest

from arbitor.cli import main


def smoke(capsys, *flags):
    code = main(["smoke", "--device", "cpu", "--preset", "tiny", "--ctx", "16", *flags])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_it_tells_weights_state_times_and_peak(capsys):
    code, out, err = smoke(capsys, "--backward", "--state", "lean")
    assert (code, err) == (0, "")
    assert "tiny: 0.73 M trit weights (context 16)" in out
    state = re.search(r"state +lean: ([\d.,]+) MB \(([\d.]+) bytes a weight\)", out)
    # 732,160 trits at 1.2 bytes and exponents, 92,160 table weights at 2 bytes and momentum exponents.
    assert float(state[1]) == pytest.approx(1.1, abs=0.05)
    assert float(state[2]) == pytest.approx(1.3, abs=0.05)
    for run in ("first run", "second run"):
        line = next(line for line in out.splitlines() if line.startswith(run))
        assert re.search(r"forward [\d.]+ s, backward \+ update [\d.]+ s, loss [\d.]+$", line)
    assert re.search(r"peak +[\d.,]+ MB of the whole process", out)


def test_without_backward_no_step_is_taken(capsys):
    _, out, _ = smoke(capsys)
    assert "update" not in out


def test_steps_learn_and_a_seed_repeats_them(capsys):
    losses = []
    for seed in ("1", "1", "2"):
        _, out, _ = smoke(capsys, "--backward", "--seed", seed, "--batch", "2")
        losses.append(re.findall(r"loss ([\d.]+)", out))
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]


@pytest.mark.parametrize(
    ("flags", "present", "absent"),
    [
        ([], ["experts", "motifs", "graph", "at most 4"], []),
        (["--no-graph"], ["experts", "motifs"], ["graph"]),
        (["--no-vq", "--max-moe-iters", "1"], ["experts", "at most 1"], ["motifs", "graph"]),
    ],
)
def test_parts_are_left_out(capsys, flags, present, absent):
    code = main(["smoke", "--device", "cpu", "--preset", "arb-small", "--ctx", "4", *flags])
    model = capsys.readouterr().out.splitlines()[0]
    assert code == 0
    for word in present:
        assert word in model
    for word in absent:
        assert word not in model


@pytest.mark.parametrize("flags", [["--batch", "0"], ["--ctx", "3"], ["--preset", "huge"]])
def test_bad_settings_are_one_line(capsys, flags):
    code, _, err = smoke(capsys, *flags)
    assert code == 2
    assert err.startswith("arbitor: error: ")
    assert err.count("\n") == 1


def test_it_runs_as_a_module(repository):
    command = [sys.executable, "-m", "arbitor.smoke", "--preset", "tiny", "--ctx", "4", "--device", "cpu"]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "second run" in done.stdout
