"""Command line of the comparison of answers; see the package's docstring and `--help`."""

import argparse
import contextlib
import hashlib
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from arbitor.config import PRESETS
from arbitor.errors import UserError
from arbitor.finetune.config import FinetuneConfig
from arbitor.finetune.data import Instructions, open_instructions
from arbitor.finetune.instructions import Example, answer_losses, collate
from arbitor.finetune.loop import Finetune
from arbitor.finetune.lora import adapter_parameters, base_tensors, fingerprint, set_training
from arbitor.finetune.material import Answers
from arbitor.finetune.methods import AdapterMethod
from arbitor.model import ARBModel
from arbitor.model.vocab import NUM_BYTES
from arbitor.train import runs
from arbitor.train.checkpoint import load_checkpoint
from arbitor.train.device import Device, deterministic, resolve_device
from arbitor.train.display import Display
from arbitor.train.metrics import MetricsLog
from arbitor.train.session import start_training
from arbitor.train.signals import SignalGuard
from benchmarks.answers.sets import SETS, Text, make_set, read_text, shuffled, write_set
from benchmarks.common import RESULTS, commit, provenance, slug
from benchmarks.learning.table import Row, Table

COLUMNS = (
    *("set", "preset", "base_steps", "rank", "lr", "steps", "batch", "shortest", "longest", "seed"),
    *("base_weights", "base_bits_per_byte", "adapter_parameters", "pairs", "held_out"),
    *("base_loss", "loss", "fall", "control_loss", "control_fall"),
    *("base_bytes_loss", "bytes_loss", "bytes_fall"),
    *("base_sha256", "base_unchanged", "base_seconds", "seconds"),
    *("text", "commit", "device", "torch", "date"),
)
GIVEN = ("preset", "base_steps", "rank", "lr", "steps", "batch", "shortest", "longest", "seed")
KEY = ("set", *GIVEN, "text")
GOAL = 0.30
EVAL_EXAMPLES = 256
INTERRUPTED = 130
OWN = "own"  # the base of below, whose step takes a fraction of that of a preset
OWN_SIZES: dict[str, Any] = {
    "dim": 64,
    "num_prelude_layers": 2,
    "num_heads": 2,
    "head_dim": 16,
    "rope_dim": 16,
    "value_dim": 32,
    "kv_latent_dim": 64,
    "ffn_dim": 128,
    "ctx": 128,
}


@dataclass(frozen=True, slots=True)
class Loss:
    """Held-out loss of answers in nats.

    Attributes:
        whole: mean over the answers' bytes and the STOP behind each, which is what a finetune learns.
        of_bytes: mean over their bytes alone.
    """

    whole: float
    of_bytes: float


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is missing; exit code 0: all is there, 2: bad arguments, another: a run failed."""
    options = _parser().parse_args(arguments)
    try:
        return compare(options)
    except UserError as error:
        print(f"benchmarks.answers: error: {error}", file=sys.stderr)
        return 2


def compare(options: argparse.Namespace) -> int:
    """All sets that the table does not hold, beside one base."""
    device = resolve_device(options.device)
    table = Table(options.results.resolve() / f"answers-{slug(device.device)}.csv", COLUMNS, KEY)
    text = read_text(str(options.data))
    asked = {name: str(getattr(options, name)) for name in GIVEN} | {"text": text.fingerprint}
    done = {row["set"] for row in table.rows() if table.identity({**row, **asked}) == table.identity(row)}
    missing = [name for name in options.set or SETS if name not in done]
    source = provenance(device.device, options.commit or commit())
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        if missing:
            began = time.perf_counter()
            if code := train_base(text, options):
                return code
            base_seconds = time.perf_counter() - began
        for name in missing:
            measured = measure(name, text, options, device)
            if measured is None:
                return INTERRUPTED
            about = {"set": name, "base_seconds": format(base_seconds, ".1f")}
            table.put(about | asked | measured | source)
    rows = [row for row in table.rows() if table.identity({**row, **asked}) == table.identity(row)]
    print(summary(rows))
    return 0


def train_base(text: Text, options: argparse.Namespace) -> int:
    """The run `base` under ./runs, from the text's first part; an exit code."""
    for part in ("train", "held_out"):
        Path(f"{part}.txt").write_text("\n".join(getattr(text, part)) + "\n", encoding="utf-8")
    sizes = OWN_SIZES if options.preset == OWN else {}
    once = {"eval_interval": 0, "save_interval": 0}
    settings = {"data": ["train.txt"], "held_out": "held_out.txt", "seed": options.seed, **sizes, **once}
    return start_training(
        {**settings, "steps": options.base_steps, "device": options.device},
        preset="tiny" if options.preset == OWN else options.preset,
        run="base",
        console=Console(quiet=True),
    )


def measure(name: str, text: Text, options: argparse.Namespace, device: Device) -> dict[str, str] | None:
    """Finetune the base on a set and on the control; the columns of a row, or None after an interrupt."""
    began = time.perf_counter()
    checkpoint = runs.find_checkpoint("base")
    before = checksum(load_checkpoint(checkpoint).build_model(device.device))
    pairs, kept_out = (
        make_set(name, lines, options.shortest, options.longest) for lines in (text.train, text.held_out)
    )
    write_set(Path("held_out.jsonl"), kept_out)
    losses: dict[str, Loss] = {}
    unchanged, parameters = True, 0
    for run, learnt in ((name, pairs), (f"{name}-control", shuffled(pairs, options.seed))):
        write_set(Path(f"{run}.jsonl"), learnt)
        # Loaded anew each time: models of one load share memory.
        model = load_checkpoint(checkpoint).build_model(device.device).eval()
        data = open_instructions([f"{run}.jsonl"], "held_out.jsonl", model.config.ctx)
        examples = data.held_out[:EVAL_EXAMPLES]
        losses.setdefault("base", held_out_loss(model, examples, options.batch))
        if not finetune(run, model, data, checkpoint, options, device):
            return None
        set_training(model, False)
        losses[run] = held_out_loss(model, examples, options.batch)
        unchanged &= checksum(model) == before
        parameters = sum(parameter.numel() for parameter in adapter_parameters(model).values())
    start, own, control = losses["base"], losses[name], losses[f"{name}-control"]
    trained = runs.read_summary(Path("runs", "base"))
    return {
        "base_weights": str(trained["trit_weights"]),
        "base_bits_per_byte": format(trained["held_out_bits_per_byte"], ".4f"),
        "adapter_parameters": str(parameters),
        "pairs": str(len(pairs)),
        "held_out": str(len(examples)),
        "base_loss": format(start.whole, ".5f"),
        "loss": format(own.whole, ".5f"),
        "fall": format(1 - own.whole / start.whole, ".4f"),
        "control_loss": format(control.whole, ".5f"),
        "control_fall": format(1 - control.whole / start.whole, ".4f"),
        "base_bytes_loss": format(start.of_bytes, ".5f"),
        "bytes_loss": format(own.of_bytes, ".5f"),
        "bytes_fall": format(1 - own.of_bytes / start.of_bytes, ".4f"),
        "base_sha256": before,
        "base_unchanged": "yes" if unchanged else "no",
        "seconds": format(time.perf_counter() - began, ".1f"),
    }


def finetune(
    run: str, model: ARBModel, data: Instructions, base: Path, options: argparse.Namespace, device: Device
) -> bool:
    """Put adapters beside the model's linears, take the steps of `arbitor finetune`; whether it did all."""
    given = {name: getattr(options, name) for name in ("rank", "lr", "steps", "batch", "seed")}
    config = FinetuneConfig(
        base=str(base),
        base_fingerprint=fingerprint(model),
        eval_interval=0,
        save_interval=0,
        eval_examples=1,  # all are measured by `held_out_loss`, which tells STOP apart
        **given,
    )
    folder = runs.make_run("finetune", run)
    console = Console(quiet=True)
    with (
        contextlib.closing(MetricsLog(folder)) as log,
        deterministic(config.seed, device.device),
        SignalGuard() as guard,
        Display(console, config.steps) as display,
    ):
        answers = Answers(data, config)
        method = AdapterMethod(model, config, answers.apart)
        loop = Finetune(config, model, method, answers, device, folder, log, display, guard)
        method.set_training(True)
        return loop.run_steps().finished


@torch.no_grad()
def held_out_loss(model: ARBModel, examples: Sequence[Example], batch: int) -> Loss:
    """Loss of the answers of some examples."""
    losses, targets = [], []
    ordered = sorted(examples, key=lambda example: len(example.ids))
    for first in range(0, len(ordered), batch):
        ids_BL, is_answer_BN = collate(ordered[first : first + batch])
        losses.append(answer_losses(model(ids_BL).logits, ids_BL, is_answer_BN).double().cpu())
        targets.append(ids_BL[:, -is_answer_BN.shape[1] :][is_answer_BN])
    every = torch.cat(losses)
    of_bytes = every[torch.cat(targets) < NUM_BYTES]
    return Loss(float(every.mean()), float(of_bytes.mean()))


def checksum(model: ARBModel) -> str:
    """SHA-256 of the base's tensors as they lie in memory, adapters left out, in hexadecimal."""
    hasher = hashlib.sha256()
    for name, tensor in sorted(base_tensors(model).items()):
        flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        hasher.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        hasher.update(flat.numpy().tobytes())
    return hasher.hexdigest()


def summary(rows: Sequence[Row]) -> str:
    """Every set in two lines, and whether the goal is met."""
    lines = []
    for row in rows:
        lines += [
            f"{row['set']}: {row['base_loss']} -> {row['loss']} nats per answer id, {fall(row['fall'])} "
            f"(answers shuffled: {fall(row['control_fall'])}); base unchanged: {row['base_unchanged']}",
            f"  without STOP: {row['base_bytes_loss']} -> {row['bytes_loss']}, {fall(row['bytes_fall'])}",
        ]
    met = sum(float(row["fall"]) >= GOAL and row["base_unchanged"] == "yes" for row in rows)
    lines.append(f"goal, a fall of {100 * GOAL:.0f} % with the base unchanged: {met} of {len(rows)} sets")
    return "\n".join(lines)


def fall(share: str) -> str:
    """A fall in words: -24.9 %."""
    return f"{-100 * float(share):+.1f} %"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.answers", description=__doc__)
    add = parser.add_argument
    add("--data", type=Path, required=True, help="a text of lines, or a folder of them")
    add("--set", action="append", choices=tuple(SETS), help="default both")
    add("--preset", default=OWN, choices=(OWN, *PRESETS), help="of the base; default one smaller than tiny")
    add("--base-steps", type=int, default=240, help="of 16 x 128 bytes, with the own base")
    add("--rank", type=int, default=8, help="of the adapters")
    add("--lr", type=float, default=0.01, help="of the adapters")
    add("--steps", type=int, default=120, help="of a finetune")
    add("--batch", type=int, default=16, help="conversations of a step of a finetune")
    add("--shortest", type=int, default=20, help="bytes of a line that is learnt from or measured")
    add("--longest", type=int, default=50)
    add("--seed", type=int, default=0, help="of weights, data order and shuffling")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"))
    add("--results", type=Path, default=RESULTS)
    add("--commit", help="commit to note where there is no git")
    return parser


if __name__ == "__main__":
    sys.exit(main())
