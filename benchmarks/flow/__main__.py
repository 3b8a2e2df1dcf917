"""Command line of the measurement of the flow; see the package's docstring and `--help`."""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from arbitor.config import RunConfig, override, preset
from arbitor.data.video import ClipGeometry, VideoCorpus, open_videos
from arbitor.drawing import autoencoder_of, video_head_of
from arbitor.errors import UserError
from arbitor.model import ARBModel
from arbitor.ternary import named_ternary
from arbitor.ternary.tensor import TernaryScaleTensor
from arbitor.train.checkpoint import Checkpoint, load_checkpoint
from arbitor.train.device import Device, deterministic, resolve_device
from arbitor.train.gaussian import Gaussian
from arbitor.train.loop import Trainer
from arbitor.train.video_tasks import REPEATS, FlowTask
from benchmarks.common import RESULTS, commit, provenance, slug
from benchmarks.flow.baselines import shuffled
from benchmarks.flow.clips import captions_of, coded, decoded, drawn, random_clips, write_sheets
from benchmarks.flow.features import (
    CLASSIFIER,
    Checked,
    features_of,
    frechet_distance,
    named_right,
    train_classifier,
)
from benchmarks.learning.table import Row, Table

LOSSES = ("velocity_loss", "gaussian_loss", "independent_gaussian_loss", "shuffled_loss")
DISTANCES = (
    *("drawn_distance", "gaussian_distance", "shuffled_distance"),
    *("training_distance", "coded_distance"),
)
TRAINED = (
    *("preset", "data", "seed", "codec_steps", "steps", "batch", "dim", "layers", "lr", "codec_lr"),
)  # what training depends on
KEY = (*TRAINED, "sampler", "sample_steps", "guidance", "clips", "classifier", "classifier_steps")
NAMED = ("real_named", "real_velocities", "coded_named", "drawn_named")
COLUMNS = (
    *(*KEY, "trunk_weights", "pixel_error", *LOSSES, *DISTANCES, *NAMED),
    *("seconds", "commit", "device", "torch", "date"),
)
PRESET, DATA = "tiny", "moving digits"
GOAL = 0.5
GAUSSIAN_CLIPS = 4096  # that the Gaussians are fitted to


def main(arguments: Sequence[str] | None = None) -> int:
    """Train and measure; exit code 0: done, 75: time ran out, 2: bad arguments."""
    options = _parser().parse_args(arguments)
    try:
        return measure(options)
    except UserError as error:
        print(f"benchmarks.flow: error: {error}", file=sys.stderr)
        return 2


def measure(options: argparse.Namespace) -> int:
    """All of it, unless the table holds the row already."""
    if options.clips < 128:
        raise UserError(
            f"--clips must be at least 128, or the features' covariance says nothing, got {options.clips}"
        )
    deadline = time.monotonic() + options.minutes * 60
    device = resolve_device(options.device)
    table = Table(options.results / f"flow-{slug(device.device)}.csv", COLUMNS, KEY)
    settings = run_settings(options)
    done = next((row for row in table.rows() if all(row[key] == settings[key] for key in KEY)), None)
    if done is not None:
        print(summary(done))
        return 0
    codec_config, config = configs(options)
    model = config.model
    geometry = ClipGeometry(size=model.video_size, frames=model.video_frames, channels=model.video_channels)
    corpus = open_videos([], None, geometry)
    print(corpus.description)
    name = "-".join(settings[key] for key in TRAINED).replace(".", "_").replace(" ", "_")
    classifier = train_classifier(corpus, options.classifier_steps, device.device)
    print(
        f"classifier: names {100 * classifier.names:.1f} % of the real held-out clips, "
        f"{100 * classifier.velocities:.1f} % of their velocities",
        flush=True,
    )
    began = time.monotonic()
    codec = trained(codec_config, corpus, device, options.work / f"{name}-codec", None, deadline)
    if codec is None:
        return 75
    coded = codec.evaluate().bits_per_byte
    print(f"autoencoder: RMS error of pixels {coded:.4f} after {time.monotonic() - began:.0f} s", flush=True)
    base = load_checkpoint(options.work / f"{name}-codec")
    flow = trained(config, corpus, device, options.work / name, base, deadline)
    if flow is None:
        return 75
    seconds = time.monotonic() - began
    flow.model.eval()
    assert isinstance(flow.task, FlowTask)
    trunk = [m.numel() for _, m in named_ternary(flow.model) if isinstance(m, TernaryScaleTensor)]
    row = {
        **settings,
        "trunk_weights": str(sum(trunk)),
        "pixel_error": format(coded, ".5f"),
        **{key: format(value, ".5f") for key, value in losses(flow.model, flow.task).items()},
        **distances(flow.model, corpus, options, classifier),
        "seconds": format(seconds, ".1f"),
        **provenance(device.device, options.commit or commit()),
    }
    table.put(row)
    print(summary(row))
    write_sheets(flow.model, corpus, options, table.path.with_suffix(""))
    return 0


def run_settings(options: argparse.Namespace) -> dict[str, str]:
    """The columns that identify a row."""
    return {
        "preset": PRESET,
        "data": DATA,
        "seed": str(options.seed),
        "codec_steps": str(options.codec_steps),
        "steps": str(options.steps),
        "batch": str(options.batch),
        "dim": str(options.dim),
        "layers": str(options.layers),
        "lr": format(options.lr, "g"),
        "codec_lr": format(options.codec_lr, "g"),
        "sampler": options.sampler,
        "sample_steps": str(options.sample_steps),
        "guidance": format(options.guidance, "g"),
        "clips": str(options.clips),
        "classifier": CLASSIFIER,
        "classifier_steps": str(options.classifier_steps),
    }


def configs(options: argparse.Namespace) -> tuple[RunConfig, RunConfig]:
    """The runs of the autoencoder and of the flow."""
    common = override(
        preset(PRESET),
        video_size=16,
        video_dim=options.dim,
        video_layers=options.layers,
        batch=options.batch,
        seed=options.seed,
    )
    codec = override(common, video_task="codec", steps=options.codec_steps, lr=options.codec_lr)
    return codec, override(common, video_task="flow", steps=options.steps, lr=options.lr)


def trained(
    config: RunConfig,
    corpus: VideoCorpus,
    device: Device,
    folder: Path,
    base: Checkpoint | None,
    deadline: float,
) -> Trainer | None:
    """A trainer at its last step; None if time ran out ahead of it, with what there is kept in `folder`."""
    with deterministic(config.train.seed, device.device):
        checkpoint = load_checkpoint(folder) if folder.is_dir() else None
        trainer = Trainer(config, corpus, device, checkpoint, None if checkpoint else base)
        first = trainer.step
        while not trainer.done:
            loss = trainer.take_step()
            if trainer.step % 100 == 0:
                value = float(loss)  # waits for the GPU, so that the clock tells the truth
                print(f"{config.data.video_task} step {trainer.step}: loss {value:.4f}", flush=True)
            if time.monotonic() > deadline:
                break
        if trainer.step > first:
            folder.parent.mkdir(parents=True, exist_ok=True)
            trainer.save(folder)
    if not trainer.done:
        print(f"time ran out at step {trainer.step} of {config.train.steps}; the same command goes on")
        return None
    return trainer


@torch.no_grad()
def losses(model: ARBModel, task: FlowTask) -> dict[str, float]:
    """Mean square errors of the velocity on the held-out clips, by the names of `LOSSES`."""
    codec, head = autoencoder_of(model), video_head_of(model)
    latents = coded(model, random_clips(task.corpus.train, GAUSSIAN_CLIPS, 1))
    gaussians = {
        "gaussian_loss": Gaussian.of(latents, full=True),
        "independent_gaussian_loss": Gaussian.of(latents, full=False),
    }
    totals = dict.fromkeys(LOSSES, 0.0)
    count = 0
    for number, batch in enumerate(task.held_out_batches(len(task.corpus.held_out))):
        ids_BL, clips, noise, t_B = (tensor.to(model.device) for tensor in batch)
        condition = model.read(ids_BL)
        data = codec.encode(clips)
        t_B1111 = t_B[:, None, None, None, None]
        x_t = (1 - t_B1111) * noise + t_B1111 * data
        guesses = {name: gaussian.velocity(x_t, t_B) for name, gaussian in gaussians.items()}
        for name, guess in guesses.items():
            totals[name] += float((guess - (data - noise)).square().mean()) * len(clips)
        out_of_order = codec.encode(shuffled(clips, number))
        totals["velocity_loss"] += float(head.loss(data, condition, noise, t_B)) * len(clips)
        totals["shuffled_loss"] += float(head.loss(out_of_order, condition, noise, t_B)) * len(clips)
        count += len(clips)
    assert count == REPEATS * len(task.corpus.held_out)
    return {name: total / count for name, total in totals.items()}


@torch.no_grad()
def distances(
    model: ARBModel, corpus: VideoCorpus, options: argparse.Namespace, classifier: Checked
) -> dict[str, str]:
    """Fréchet distances to real held-out clips by the names of `DISTANCES`, shares by those of `NAMED`."""
    codec, count = autoencoder_of(model), options.clips

    def features(clips: Tensor) -> Tensor:
        return features_of(classifier.model, clips, model.device)

    real = random_clips(corpus.held_out, count, 2)
    other = random_clips(corpus.held_out, count, 3)
    gaussian = Gaussian.of(coded(model, random_clips(corpus.train, GAUSSIAN_CLIPS, 1)), full=True)
    noise = torch.randn((count, *codec.latent_shape), generator=torch.Generator().manual_seed(4))
    made = {
        "drawn_distance": drawn(model, captions_of(corpus.held_out, count, 7), options),
        "gaussian_distance": decoded(model, gaussian.sample(noise.to(model.device))),
        "shuffled_distance": shuffled(other, 5),
        "training_distance": random_clips(corpus.train, count, 6),
        "coded_distance": decoded(model, coded(model, other)),
    }
    of_real, of_made = features(real), {name: features(clips) for name, clips in made.items()}
    row = {name: format(frechet_distance(of, of_real), ".4f") for name, of in of_made.items()}
    shares = {
        "real_named": classifier.names,
        "real_velocities": classifier.velocities,
        **{
            f"{what}_named": named_right(
                classifier.model, of_made[f"{what}_distance"], captions_of(corpus.held_out, count, seed)
            )
            for what, seed in (("coded", 3), ("drawn", 7))
        },
    }
    return row | {name: format(share, ".4f") for name, share in shares.items()}


def summary(row: Row) -> str:
    """The figures, and what they are of the baselines'."""
    lines = [
        f"velocity loss {row['velocity_loss']}: "
        + "; ".join(
            f"{float(row['velocity_loss']) / float(row[name]):.3f} of {row[name]} ({words})"
            for name, words in (
                ("gaussian_loss", "Gaussian of whole covariance"),
                ("independent_gaussian_loss", "Gaussian of independent numbers"),
                ("shuffled_loss", "frames out of order"),
            )
        ),
        f"Fréchet distance {row['drawn_distance']}: "
        + "; ".join(
            f"{float(row['drawn_distance']) / max(1e-9, float(row[name])):.3f} of {row[name]} ({words})"
            for name, words in (
                ("gaussian_distance", "Gaussian"),
                ("shuffled_distance", "frames out of order"),
            )
        ),
        f"for scale: real training clips {row['training_distance']}, real ones in latents and "
        f"back {row['coded_distance']}",
        f"the classifier names {_percent(row['drawn_named'])} of the drawn clips as their captions do, "
        f"{_percent(row['real_named'])} of real held-out clips and {_percent(row['coded_named'])} of those "
        f"in latents and back (velocities of real ones: {_percent(row['real_velocities'])})",
        f"goal: at most {GOAL:g} of the Gaussian and of frames out of order, in both",
    ]
    return "\n".join(lines)


def _percent(share: str) -> str:
    return f"{100 * float(share):.1f} %" if share else "(not measured)"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.flow", description=__doc__)
    parser.add_argument("--codec-steps", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=4000, help="of the flow")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--dim", type=int, default=320, help="of the autoencoder and the flow's head")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--lr", type=float, default=0.025, help="of the flow, trits")
    parser.add_argument("--codec-lr", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sampler", default="heun", choices=("euler", "heun"))
    parser.add_argument("--sample-steps", type=int, default=32)
    parser.add_argument("--guidance", type=float, default=1.0)
    parser.add_argument("--clips", type=int, default=2048, help="in each set that distances are between")
    parser.add_argument("--classifier-steps", type=int, default=1500, help="that gives the features")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--minutes", type=float, default=60.0, help="training stops after so long")
    parser.add_argument("--work", type=Path, default=Path("runs") / "flow-benchmark", help="for checkpoints")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--commit", help="commit to note where there is no git")
    return parser


if __name__ == "__main__":
    sys.exit(main())
