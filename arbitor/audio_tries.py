"""Trained runs on a sound or a text: reconstruct, hear, say."""

import numpy as np
import torch

from arbitor.data.clips import clip
from arbitor.data.waves import read_recording, write_recording
from arbitor.errors import UserError
from arbitor.flags import naming_flags
from arbitor.model import ARBModel
from arbitor.speech import codec_of, hear, say
from arbitor.train.display import printable
from arbitor.verbs import find_model

WANTED = {"reconstruct": ("codec", "listen", "speak"), "hear": ("listen",), "say": ("speak",)}
"""What a run must have learnt one of to be tried; a codec that stayed as it was drawn is tried as well."""


def try_run(
    run: str | None, what: str, value: str, out: str, temperature: float, seed: int | None, device: str
) -> int:
    """Do one of "reconstruct", "hear" and "say" with a run's best checkpoint; returns the exit code.

    Args:
        run: as `find_model` takes it, a finetune among others.
        what: which of them.
        value: audio file to read, or text to say.
        out: WAV file to write.
        temperature, seed: of "say".
        device: auto, cpu or cuda.

    Raises:
        UserError: anything given that cannot be used, a run that has learnt something else, or a model that
            says nothing; nothing is written then.
    """
    source = find_model(run, None, WANTED[what])
    model = source.open(device)
    if "audio" not in model.sidecars:
        raise UserError(f"{source} has no sidecar for sounds; train one with `arbitor audio`")
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
    with naming_flags(("temperature", "seed")):
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
