"""A frozen variational autoencoder of images with integer weights, applied to each frame of a clip.

It is the one of Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion Models", section
3.1, computed by diffusers. How its weights are kept is in `arbitor/sidecars/frozen.py`. Nothing of it is
trained.

Shape letters: B clips, F frames, C channels, S pixels a side, K = 16 channels of the latents, H rows and W
columns of the latents, N frames of all clips.
"""

import functools
import json
import math
import os
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from arbitor.config import AUTOENCODER_FIELDS, LATENT_CHANNELS
from arbitor.errors import UserError, extra_command
from arbitor.sidecars.frozen import FrozenWeights
from arbitor.sidecars.video import ClipAutoencoder, exact

PIXELS_AT_A_TIME = 1 << 18  # of frames that are coded together, each of which needs some KB
WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"


def _autoencoder_kl() -> Any:
    try:
        from diffusers import AutoencoderKL
    except (ImportError, RuntimeError) as error:  # the latter where a library that it needs does not fit
        raise UserError(
            "a frozen autoencoder is computed by diffusers, of the extra autoencoder: "
            f"{extra_command('autoencoder')}; without one, leave --autoencoder out"
        ) from error
    return AutoencoderKL


def read_architecture(source: str) -> str:
    """The architecture of an `AutoencoderKL` as `ModelConfig.video_autoencoder` holds it: a line of JSON.

    Args:
        source: a folder with `config.json`, or a name on the hub, with a folder in it if need be
            (`owner/name/vae`).

    Raises:
        UserError: it is not there, is another kind of model, or has latents that do not suit.
    """
    kind = _autoencoder_kl()
    where, place = f"--autoencoder {source}", _place(source)
    try:
        given = kind.load_config(**place)
    except (OSError, ValueError) as error:
        raise UserError(f"{where}: {_one_line(error)}") from error
    name = given.get("_class_name") if isinstance(given, dict) else None
    if name != "AutoencoderKL":
        raise UserError(f"{where} is {_article(name)}; only an AutoencoderKL of diffusers can be used")
    if given.get("latents_mean") is not None or given.get("latents_std") is not None:
        raise UserError(
            f"{where} has latents_mean or latents_std, which cannot be used; it must have neither"
        )
    try:
        with torch.device("meta"):
            made = kind.from_config({key: given[key] for key in AUTOENCODER_FIELDS if key in given}).config
    except Exception as error:  # of any kind: the file may hold anything
        raise UserError(f"{where}: its config.json makes no autoencoder: {_one_line(error)}") from error
    fields = {key: made[key] for key in AUTOENCODER_FIELDS}
    _refuse_unfit(fields, where)
    return json.dumps(fields, sort_keys=True)


def geometry_of(architecture: str) -> dict[str, int]:
    """Fields of `ModelConfig` that suit an autoencoder: every frame by itself, in squares of its factor."""
    levels = len(json.loads(architecture)["block_out_channels"])
    return {"video_patch": 1 << (levels - 1), "video_stride": 1}


def _refuse_unfit(fields: dict[str, Any], where: str) -> None:
    channels = fields["latent_channels"]
    if channels != LATENT_CHANNELS:
        raise UserError(
            f"{where} has latents of {channels} channels; they must be {LATENT_CHANNELS}, as of Stable "
            "Diffusion 3 and FLUX, since the head that draws clips has so many"
        )
    both = fields["in_channels"], fields["out_channels"]
    if both not in ((1, 1), (3, 3)):
        raise UserError(f"{where} turns {both[0]} channels into {both[1]}; it must be 1 or 3 on both sides")
    scale, shift = fields["scaling_factor"], fields["shift_factor"]
    if not (_is_number(scale) and scale > 0 and (shift is None or _is_number(shift))):
        raise UserError(
            f"{where}: scaling_factor is {scale!r} and shift_factor {shift!r}; they must be finite "
            "numbers, the first above 0"
        )


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _place(source: str) -> dict[str, Any]:
    """Arguments that say where a library of the hub finds `source`.

    Raises:
        UserError: it is neither a folder nor of the form of a name.
    """
    if os.path.isdir(source):
        return {"pretrained_model_name_or_path": source}
    parts = source.split("/", 2)
    if len(parts) < 2 or not all(re.fullmatch(r"\w[\w.-]*", part) for part in source.split("/")):
        raise UserError(f"--autoencoder {source}: no such folder; a name on the hub is owner/name")
    return {
        "pretrained_model_name_or_path": "/".join(parts[:2]),
        "subfolder": parts[2] if len(parts) == 3 else None,
    }


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _article(name: object) -> str:
    if not isinstance(name, str):
        return "of no kind that its config.json names"
    return f"{'an' if name[:1] in 'AEIOU' else 'a'} {name[:80]}"


@functools.lru_cache(maxsize=4)
def _skeleton(architecture: str) -> nn.Module:
    """The autoencoder without weights, on the meta device."""
    with torch.device("meta"):
        return _autoencoder_kl().from_config(json.loads(architecture)).eval()


class FrozenAutoencoder(ClipAutoencoder):
    """Every frame as the mean of a pretrained autoencoder's latents, and back.

    Latents are (mean - shift_factor) * scaling_factor, as its configuration says, which brings those of
    photographs to a variance of about 1; `standardise` changes nothing. A grey clip is given to an
    autoencoder of colours in three equal channels, and the mean of what comes back is taken.

    Args:
        architecture: as `read_architecture` gives it.
        size: S.
        frames: F.
        channels: C.
        device: where to make it. All weights are 0 until `take` or a checkpoint brings them.

    Attributes:
        latent_shape: (16, F, H, W).
        frozen: the integers.
    """

    def __init__(
        self,
        architecture: str,
        *,
        size: int = 16,
        frames: int = 8,
        channels: int = 1,
        device: torch.device | str | None = None,
    ) -> None:
        fields = json.loads(architecture)
        factor = geometry_of(architecture)["video_patch"]
        if size % factor:
            raise UserError(
                f"frames of {size} pixels do not divide into the autoencoder's squares of {factor}"
            )
        side = size // factor
        super().__init__(size, frames, channels, (LATENT_CHANNELS, frames, side, side))
        self.architecture = architecture
        self._channels = int(fields["in_channels"])
        self._scale, self._shift = float(fields["scaling_factor"]), float(fields["shift_factor"] or 0.0)
        place = None if device is None else torch.device(device)
        self.frozen = FrozenWeights(_skeleton(architecture).named_parameters(), place)

    @torch.no_grad()
    def take(self, source: str) -> None:
        """Round the weights of a pretrained autoencoder to integers, and own them.

        Args:
            source: a folder with `config.json` and `diffusion_pytorch_model.safetensors`, or a name on the
                hub; see `read_architecture`.

        Raises:
            UserError: it is not there, not whole, or of another architecture.
        """
        if read_architecture(source) != self.architecture:
            raise UserError(f"{source} is an autoencoder of another architecture than this model's")
        folder = Path(source)
        if (
            folder.is_dir()
            and not (folder / WEIGHTS_FILE).is_file()
            and not (folder / f"{WEIGHTS_FILE}.index.json").is_file()
        ):
            raise UserError(f"{source} holds no {WEIGHTS_FILE}")
        try:
            # Never a pickle: what has no safetensors is refused.
            given, found = _autoencoder_kl().from_pretrained(
                **_place(source), use_safetensors=True, low_cpu_mem_usage=False, output_loading_info=True
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(f"--autoencoder {source}: {_one_line(error)}") from error
        if missing := sorted(found["missing_keys"]):  # which the library draws at random
            raise UserError(
                f"--autoencoder {source}: {len(missing)} weights are not there, {missing[0]} first"
            )
        self.frozen.round_from(given.named_parameters(), source)

    @torch.no_grad()
    def forward(self, clips: Tensor, noise: Tensor | None = None) -> Tensor:
        """See `ClipAutoencoder.forward`; without gradient."""
        latents = self.encode(clips)
        return self._pixels(latents if noise is None else latents + noise)

    @torch.no_grad()
    def encode(self, clips: Tensor) -> Tensor:
        """See `ClipAutoencoder.encode`."""
        with exact(clips):
            x_NCSS = self._checked(clips).flatten(0, 1).float() / 127.5 - 1
            x_NCSS = x_NCSS.expand(-1, self._channels, -1, -1)
            means = self._in_parts(x_NCSS, ("encoder", "quant_conv")).chunk(2, dim=1)[0]
            latents = (means - self._shift) * self._scale
        return latents.unflatten(0, (len(clips), self.frames)).transpose(1, 2).contiguous()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """See `ClipAutoencoder.decode`."""
        return (self._pixels(latents) * 255).round_().clamp_(0, 255).to(torch.uint8)

    def _pixels(self, latents: Tensor) -> Tensor:
        """Latents [B, K, F, H, W] -> fp32 [B, F, C, S, S]; 0 to 1 is black to white."""
        with exact(latents):
            z_NKHW = self._checked_latents(latents).float().transpose(1, 2).flatten(0, 1)
            x_NCSS = self._in_parts(z_NKHW / self._scale + self._shift, ("post_quant_conv", "decoder"))
        if self.channels < self._channels:
            x_NCSS = x_NCSS.mean(dim=1, keepdim=True)
        return (x_NCSS / 2 + 0.5).unflatten(0, (len(latents), self.frames))

    def _in_parts(self, x: Tensor, names: tuple[str, str]) -> Tensor:
        """Some frames at a time through modules of the autoencoder, one after the other, those there are."""
        skeleton = _skeleton(self.architecture)
        there = [name for name in names if getattr(skeleton, name, None) is not None]
        chain = [(skeleton.get_submodule(name), self.frozen.weights(name)) for name in there]
        parts = []
        for part in x.split(max(1, PIXELS_AT_A_TIME // self.size**2)):
            for module, weights in chain:
                part = torch.func.functional_call(module, weights, (part,))
            parts.append(part)
        return torch.cat(parts)
