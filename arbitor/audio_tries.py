"""Trained runs on a sound or a text: reconstruct, hear, say."""

import shlex
import sys

import numpy as np
import torch

from arbitor.config import load_config
from arbitor.data.clips import clip
from arbitor.data.waves import read_recording, write_recording
from arbitor.errors import UserError
from arbitor.finetune.adapter import find_adapter
from arbitor.model import ARBModel
from arbitor.speech import codec_of, hear, say
from arbitor.train.checkpoint import CONFIG_FILE
from arbitor.train.display import printable
from arbitor.train.runs import find_checkpoint
from arbitor.verbs import open_model

TASKS = {"hear": "listen", "say": "speak"}  # that the tries of a model, unlike those of its codec, need


def try_run(
    run: str | None, what: str, value: str, out: str, temperature: float, seed: int | None, device: str
) -> int:
    """Do one of "reconstruct", "hear" and "say" with a run's best checkpoint; returns the exit code.

    Args:
        run: as `open_model` takes it, a finetune among others.
        what: which of them.
        value: audio file to read, or text to say.
        out: WAV file to write.
        temperature, seed: of "say".
        device: auto, cpu or cuda.

    Raises:
        UserError: anything given that cannot be used, a run that has learnt nothing but the codec, or a model
            that says nothing; nothing is written then.
    """
    if what in TASKS:
        _refuse_unlearnt(run, TASKS[what])
    model, source = open_model(run, None, device)
    if "audio" not in model.sidecars:
        raise UserError(f"{source} has no sidecar for sounds; train one with training/audio.py")
    if what == "hear":
        wave = read_recording(value, model.config.audio_rate)
        (text,) = hear(model, torch.from_numpy(clip(wave, model.config.audio_samples))[None])
        print(printable(text.decode("utf-8", "replace")))
        return 0
    wave = _spoken(model, value, temperature, seed) if what == "say" else _reconstructed(model, value)
    write_recording(out, wave, model.config.audio_rate)
    print(
        f"{out}: {len(wave) / model.config.audio_rate:.2f} s at {model.config.audio_rate:,} Hz, from {source}"
    )
    return 0


def _refuse_unlearnt(run: str | None, task: str) -> None:
    """Raise UserError if the settings of a run say that only its codec was trained, the last time.

    The codes of a codec that was trained mean something new, so what was learnt from them before is lost. Of
    the runs that another one started from nothing is known, and an adapter may have learnt anything.
    """
    if run is not None and find_adapter(run) is not None:
        return
    folder = find_checkpoint(run)
    if not (folder / CONFIG_FILE).is_file():
        return
    trained = load_config(folder / CONFIG_FILE).data.audio_task
    if trained == "codec":
        raise UserError(
            f"{folder} has learnt its codec only, not to {task}; first train a run that does: "
            f"python training/audio.py --task {task} --base {shlex.quote(str(folder))}"
        )
    if trained in TASKS.values() and trained != task:
        print(
            f"arbitor: note: {folder} was trained to {trained}; this is of use only if a run that it started "
            f"from had learnt to {task}",
            file=sys.stderr,
        )


def _spoken(model: ARBModel, text: str, temperature: float, seed: int | None) -> np.ndarray:
    (wave,) = say(model, [text.encode("utf-8", "surrogateescape")], temperature=temperature, seed=seed)
    if not len(wave):
        raise UserError(
            "the model ended its sound before the first code, and nothing was written: another --seed or "
            "--temperature may give one, and --task speak with more --steps a model that does"
        )
    return wave


@torch.no_grad()
def _reconstructed(model: ARBModel, path: str) -> np.ndarray:
    wave = read_recording(path, model.config.audio_rate)
    return codec_of(model)(torch.from_numpy(wave)[None].to(model.device)).wave[0].cpu().numpy()
