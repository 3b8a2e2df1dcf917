"""`arbitor smoke`: it prints what the audit counts, takes real steps, and notices what is wrong."""

import json
import re
import subprocess
import sys
from collections import Counter

import pytest
import torch

from arbitor import smoke as smoke_module
from arbitor.cli import main
from arbitor.config import preset
from arbitor.model import ARBModel
from arbitor.ops import thresholds
from arbitor.ops.precompile import Compiled
from arbitor.smoke import WORDS_AT_ONCE, fingerprint
from arbitor.ternary import VoteOptimizer
from arbitor.ternary.audit import audit
from arbitor.train.device import Device


def smoke(capsys, *flags):
    code = main(["smoke", "--device", "cpu", "--preset", "tiny", "--ctx", "16", *flags])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def measured(capsys, *flags):
    code, out, err = smoke(capsys, "--json", *flags)
    assert (code, err) == (0, "")
    assert out.count("\n") == 1
    return json.loads(out)


def test_it_tells_weights_state_times_speed_and_peak(capsys):
    code, out, err = smoke(capsys, "--backward")
    assert code == 0
    assert err == "arbitor: note: two passes over 1 x 16 bytes on cpu; a large model takes minutes on a CPU\n"
    assert "tiny: 0.73 M trit weights" in out
    assert re.search(r"batch +1 x 16 bytes, seed 0", out)
    # 732,160 trits at 1.2 bytes and exponents, 92,160 table weights at 2 bytes and momentum exponents.
    assert "lean: 1.1 MB (1.305 bytes a weight)" in out
    assert re.search(r"build +[\d.]+ s, peak [\d.,]+ MB", out)
    for run in ("first run", "second run"):
        line = next(line for line in out.splitlines() if line.startswith(run))
        assert re.search(r"forward [\d.]+ s, backward \+ update [\d.]+ s, loss [\d.]+$", line)
    assert re.search(r"speed +[\d.,]+ bytes/s in the second run", out)
    assert re.search(r"peak +[\d.,]+ MB of the whole process", out)


@pytest.mark.parametrize("state", ["lean", "full"])
def test_json_has_the_figures_of_the_audit(capsys, state):
    result = measured(capsys, "--backward", "--state", state, "--batch", "3")
    torch.manual_seed(0)
    model = ARBModel("tiny", ctx=16)
    ids = torch.randint(0, 256, (3, 16))
    report = audit(model, VoteOptimizer(model, state=state))
    assert result["trit_weights"] == report.trit_weights == 732_160
    assert result["state_bytes"] == report.total_bytes
    assert (result["state"], result["batch"], result["ctx"]) == (state, 3, 16)
    second = result["second"]
    seconds = second["forward_seconds"] + second["update_seconds"]
    assert result["bytes_per_second"] == pytest.approx(48 / seconds)
    assert result["peak_bytes"] >= result["build_peak_bytes"] > 0
    assert result["build_seconds"] > 0
    with torch.no_grad():
        assert result["first"]["loss"] == pytest.approx(float(model(ids, targets=ids).loss), rel=1e-4)


def test_lean_is_the_default_whatever_the_preset_says(capsys):
    assert measured(capsys)["state"] == "lean"


def test_without_backward_no_step_is_taken(capsys):
    result = measured(capsys)
    assert result["first"]["update_seconds"] is None
    _, out, _ = smoke(capsys)
    assert "update" not in out


def test_a_seed_repeats_the_losses_and_a_step_changes_the_second(capsys):
    def losses(*flags):
        result = measured(capsys, "--batch", "2", *flags)
        return result["first"]["loss"], result["second"]["loss"]

    with_steps = losses("--backward", "--seed", "1")
    assert with_steps == losses("--backward", "--seed", "1")
    assert with_steps[0] != losses("--backward", "--seed", "2")[0]
    without = losses("--seed", "1")
    assert without[0] == with_steps[0]
    assert without[1] != with_steps[1]
    assert without[0] != without[1], "the second batch is another one"


@pytest.mark.parametrize("flags", [[], ["--backward"]])
def test_a_graph_is_recorded_only_for_backward(capsys, monkeypatch, flags):
    forward = ARBModel.forward
    recorded = []

    def watched(self, ids, targets=None):
        output = forward(self, ids, targets)
        recorded.append(output.loss.requires_grad)
        return output

    monkeypatch.setattr(ARBModel, "forward", watched)
    measured(capsys, *flags)
    assert recorded == [bool(flags)] * 2


@pytest.mark.parametrize(
    ("flags", "present", "absent", "note"),
    [
        ([], ["experts", "motifs", "graph", "at most 4"], [], ""),
        (["--no-graph"], ["experts", "motifs"], ["graph"], ""),
        (
            ["--no-vq", "--max-moe-iters", "1"],
            ["experts", "at most 1"],
            ["motifs", "graph"],
            "arbitor: note: --no-vq leaves the graph out as well: it links motifs\n",
        ),
    ],
)
def test_parts_are_left_out(capsys, flags, present, absent, note):
    code = main(["smoke", "--device", "cpu", "--preset", "arb-small", "--ctx", "4", "--json", *flags])
    captured = capsys.readouterr()
    parts = json.loads(captured.out)["parts"]
    assert code == 0
    assert captured.err == note
    for word in present:
        assert word in parts
    for word in absent:
        assert word not in parts


@pytest.mark.parametrize(
    "flags",
    [
        ["--batch", "0"],
        ["--ctx", "3"],
        ["--preset", "huge"],
        ["--seed", "-1"],
        ["--state", "fat"],
        ["--max-moe-iters", "0"],
    ],
)
def test_bad_settings_are_one_line(capsys, flags):
    code = main(["smoke", "--device", "cpu", *flags])
    captured = capsys.readouterr()
    assert code == 2
    assert captured.out == ""
    assert captured.err.startswith("arbitor: error: ")
    assert captured.err.count("\n") == 1


# -- what is wrong is noticed -------------------------------------------------------------------------------


def refused(capsys, words, *flags):
    code, _, err = smoke(capsys, *flags)
    assert code == 1
    errors = [line for line in err.splitlines() if line.startswith("arbitor: error: ")]
    assert [line.split(": ", 2)[2] for line in errors] == words


def test_an_update_that_changes_nothing_fails(capsys, monkeypatch):
    monkeypatch.setattr(VoteOptimizer, "_update_all", lambda *_: None)
    words = [f"{name} run: the update changed nothing" for name in ("first", "second")]
    refused(capsys, words, "--backward")


@pytest.mark.parametrize("what", ["head.q", "layer state"])
def test_a_forward_that_changes_something_fails(capsys, monkeypatch, what):
    forward = ARBModel.forward
    optimizers = []
    attach = VoteOptimizer.__init__
    monkeypatch.setattr(
        VoteOptimizer,
        "__init__",
        lambda self, *args, **rest: (optimizers.append(self), attach(self, *args, **rest))[1],
    )

    def writes(self, ids, targets=None):
        output = forward(self, ids, targets)
        state = {**dict(self.state_dict()), **optimizers[-1].named_state()}
        tensor = state["head.q" if what == "head.q" else "prelude.1.ffn.up.T_accum"]
        tensor.view(-1)[-1] += 1
        return output

    monkeypatch.setattr(ARBModel, "forward", writes)
    refused(capsys, [f"{n} run: a forward changed weights or state" for n in ("first", "second")])


def test_a_loss_that_is_not_finite_fails_and_stays_json(capsys, monkeypatch):
    monkeypatch.setattr(
        smoke_module._Runner, "_forward", lambda self, ids: torch.tensor(float("nan"), requires_grad=True)
    )
    code, out, err = smoke(capsys, "--json", "--backward")
    assert code == 1
    assert "first run: the loss is nan" in err
    assert json.loads(out)["first"]["loss"] is None


def test_a_gradient_that_is_not_finite_fails(capsys, monkeypatch):
    forward = smoke_module._Runner._forward

    def steep(self, ids):
        loss = forward(self, ids)
        loss.register_hook(lambda gradient: gradient * float("inf"))
        return loss

    monkeypatch.setattr(smoke_module._Runner, "_forward", steep)
    words = "the step was dropped, since a gradient was not finite"
    refused(capsys, [f"{name} run: {words}" for name in ("first", "second")], "--backward")


# -- fingerprints -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
@pytest.mark.parametrize("size", [1, 7, 8, 1001])
def test_every_bit_counts(dtype, size):
    tensor = torch.arange(size).to(dtype)
    known = fingerprint([tensor])
    bits = 8 * dtype.itemsize
    for place in {0, size // 2, size - 1}:
        for bit in range(bits):
            changed = tensor.clone()
            changed[place] ^= -1 << bit if dtype.is_signed and bit == bits - 1 else 1 << bit
            assert not torch.equal(changed, tensor)
            assert fingerprint([changed]) != known


def test_places_count():
    tensor = torch.randint(-128, 128, (2 * WORDS_AT_ONCE * 8 + 9,), dtype=torch.int8)
    for shift in (8, WORDS_AT_ONCE * 8):
        assert fingerprint([tensor.roll(shift)]) != fingerprint([tensor])
    swapped = tensor.clone()
    swapped[: WORDS_AT_ONCE * 8], swapped[WORDS_AT_ONCE * 8 : -9] = (
        tensor[WORDS_AT_ONCE * 8 : -9],
        tensor[: WORDS_AT_ONCE * 8],
    )
    assert fingerprint([swapped]) != fingerprint([tensor])
    assert fingerprint([tensor, torch.empty(0)]) == [*fingerprint([tensor]), 0]


def test_it_runs_as_a_module(repository):
    command = [sys.executable, "-m", "arbitor.smoke", "--preset", "tiny", "--ctx", "4", "--device", "cpu"]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "second run" in done.stdout


def test_a_step_does_not_import_the_compiler_of_torch(repository):
    code = (
        "import sys; from arbitor.cli import main; "
        "assert main('smoke --preset tiny --ctx 4 --device cpu --backward'.split()) == 0; "
        "print([name for name in ('torch._dynamo', 'torch._inductor', 'sympy') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=repository, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


# -- warm-up ------------------------------------------------------------------------------------------------


def test_without_a_gpu_a_warm_up_does_nothing_and_says_so(capsys):
    code, out, err = smoke(capsys, "--warmup")
    assert code == 0
    assert "arbitor: note: --warmup does nothing without a GPU and Triton" in err
    assert "kernels" not in out
    assert measured_with_note(capsys)["warm_up"] is None


def measured_with_note(capsys):
    code, out, _ = smoke(capsys, "--warmup", "--json")
    assert code == 0
    return json.loads(out)


def test_what_was_compiled_ahead_is_told(capsys, monkeypatch):
    compiled = Compiled(kernels=30, new=10, seconds=2.25, threads=4, processes=4, by_processes=10)
    monkeypatch.setattr(smoke_module, "warm_up", lambda *_: compiled)
    _, out, _ = smoke(capsys, "--warmup")
    assert re.search(r"kernels +30 for training steps, 10 of them new .*; 2\.2 s with 4 processes", out)
    assert measured_with_note(capsys)["warm_up"] == {
        "kernels": 30, "new": 10, "seconds": 2.25, "threads": 4, "processes": 4, "by_processes": 10
    }  # fmt: skip


def test_a_warm_up_measures_where_nobody_did(monkeypatch, tmp_path):
    tmp_path.chmod(0o700)
    monkeypatch.setenv(thresholds.VARIABLE, str(tmp_path / "table.json"))
    monkeypatch.setattr(thresholds, "identity", lambda _: "this GPU")
    monkeypatch.setattr(smoke_module, "uses_kernels", lambda: True)
    done = []
    monkeypatch.setattr(thresholds, "measure", lambda _: done.append("measured") or {"few_tokens": 32})
    monkeypatch.setattr(smoke_module, "compile_steps", lambda *_: done.append("compiled"))
    gpu = Device(torch.device("cuda", 0), "a GPU", "asked for")
    thresholds.table.cache_clear()
    for _ in range(2):
        smoke_module.warm_up(preset("tiny"), gpu)
    assert done == ["measured", "compiled", "compiled"]
    assert thresholds.table(gpu.device).values["few_tokens"] == 32
    thresholds.table.cache_clear()


STEPS = """
import torch
from arbitor.model import ARBModel
from arbitor.ternary import VoteOptimizer
model = ARBModel("tiny", device="cuda")
optimizer = VoteOptimizer(model, state="lean")
for number in range(50):
    ids = torch.randint(0, 256, (1 + number % 5, 16 + 13 * number))
    model(ids, targets=ids).loss.backward()
    optimizer.step()
torch.cuda.synchronize()
"""


@pytest.mark.gpu
@pytest.mark.parametrize("few_tokens", [0, 8, 64])
def test_a_warm_up_leaves_nothing_to_compile(monkeypatch, tmp_path, few_tokens):
    tmp_path.chmod(0o700)
    table = tmp_path / "table.json"
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    monkeypatch.setenv(thresholds.VARIABLE, str(table))
    thresholds.write(table, thresholds.identity(torch.device("cuda", 0)), {"few_tokens": few_tokens})
    command = ["-m", "arbitor", "smoke", "--preset", "tiny", "--backward", "--json", "--warmup"]
    counts, outputs = [], []
    for arguments in (command, command, ["-c", STEPS]):
        done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        outputs.append(done.stdout)
        counts.append(Counter(path.stem for path in (tmp_path / "triton").rglob("*.cubin")))
    first, second = (json.loads(output)["warm_up"] for output in outputs[:2])
    assert first["by_processes"] == first["new"] == first["kernels"] > 10
    assert (second["new"], second["kernels"]) == (0, first["kernels"])
    assert counts[0] == counts[1]
    assert counts[2] - counts[0] == Counter()  # kernels by name, so that it says which
