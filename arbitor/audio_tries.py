"""Trained runs on a sound or a text: reconstruct, hear, say."""

import numpy as np
import torch

from arbitor.data.clips import clip
from arbitor.data.waves import read_recording, write_recording
from arbitor.errors import UserError
from arbitor.model import ARBModel
from arbitor.speech import codec_of, hear, say
from arbitor.train.display import printable
from arbitor.verbs import open_model


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
        UserError: anything given that cannot be used.
    """
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


def _spoken(model: ARBModel, text: str, temperature: float, seed: int | None) -> np.ndarray:
    (wave,) = say(model, [text.encode("utf-8", "surrogateescape")], temperature=temperature, seed=seed)
    return wave


@torch.no_grad()
def _reconstructed(model: ARBModel, path: str) -> np.ndarray:
    wave = read_recording(path, model.config.audio_rate)
    return codec_of(model)(torch.from_numpy(wave)[None].to(model.device)).wave[0].cpu().numpy()
