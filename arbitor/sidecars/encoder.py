"""A frozen vision encoder: DINOv2 (Oquab et al. 2023) with integer weights, computed by transformers.

How its weights are kept is in `arbitor/sidecars/frozen.py`. Nothing of it is trained.

Shape letters: B images, C channels, S pixels a side, P patches, H width of the encoder.
"""

import functools
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from arbitor.config import ENCODER_FIELDS, IMAGE_SIZE
from arbitor.errors import UserError, extra_command
from arbitor.sidecars.frozen import FrozenWeights

# Of ImageNet, which DINOv2 was trained with.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise UserError(
            "a frozen image encoder is computed by transformers, of the extra vision: "
            f"{extra_command('vision')}; without one, leave --image-encoder out"
        ) from error
    return transformers


def read_architecture(source: str) -> str:
    """The architecture of a DINOv2 as `ModelConfig.image_encoder` holds it: a line of JSON.

    Args:
        source: a folder with `config.json`, or a name on the hub.

    Raises:
        UserError: it is not there, or is another kind of model.
    """
    transformers = _transformers()
    try:
        config = transformers.AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise UserError(f"--image-encoder {source}: {' '.join(str(error).split())[:300]}") from error
    if config.model_type != "dinov2":
        raise UserError(f"--image-encoder {source} is a {config.model_type}; only dinov2 can be used")
    return json.dumps({name: getattr(config, name) for name in ENCODER_FIELDS}, sort_keys=True)


def geometry_of(architecture: str) -> dict[str, int]:
    """Fields of `ModelConfig` that suit an encoder: its patch and channels, and at most 224 pixels a side."""
    fields = json.loads(architecture)
    patch = int(fields["patch_size"])
    side = max(patch, min(IMAGE_SIZE, int(fields["image_size"])) // patch * patch)
    return {"image_size": side, "image_patch": patch, "image_channels": int(fields["num_channels"])}


@functools.lru_cache(maxsize=4)
def _skeleton(architecture: str) -> nn.Module:
    """The encoder without weights, on the meta device."""
    transformers = _transformers()
    with torch.device("meta"):
        return transformers.Dinov2Model(transformers.Dinov2Config(**json.loads(architecture))).eval()


class FrozenEncoder(FrozenWeights):
    """Patches of images as vectors of a pretrained encoder.

    Attributes:
        width: H.
        codes, exponents: the integers.

    Args:
        architecture: as `read_architecture` gives it.
        device: where to make it. All weights are 0 until `take` or a checkpoint brings them.
    """

    def __init__(self, architecture: str, device: torch.device | None = None) -> None:
        super().__init__(_skeleton(architecture).named_parameters(), device)
        self.architecture = architecture
        self.width = int(json.loads(architecture)["hidden_size"])

    @torch.no_grad()
    def take(self, source: str) -> None:
        """Round the weights of a pretrained encoder to integers, and own them.

        Args:
            source: a folder with `config.json` and `model.safetensors`, or a name on the hub.

        Raises:
            UserError: it is not there, or of another architecture.
        """
        if read_architecture(source) != self.architecture:
            raise UserError(f"{source} is an encoder of another architecture than this model's")
        if os.path.isdir(source) and not (Path(source) / "model.safetensors").is_file():
            raise UserError(f"{source} holds no model.safetensors")
        try:
            # Never a pickle: what has no safetensors is refused.
            given = _transformers().Dinov2Model.from_pretrained(source, use_safetensors=True)
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(f"--image-encoder {source}: {' '.join(str(error).split())[:300]}") from error
        self.round_from(given.named_parameters(), source)

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> Tensor:
        """Images uint8 [B, 3, S, S], S a multiple of the patch -> float [B, P, H], without gradient."""
        mean, std = (_of_channels(values, pixels.device) for values in (MEAN, STD))
        x_BCSS = (pixels.float() / 255 - mean) / std
        output = torch.func.functional_call(_skeleton(self.architecture), self.weights(), (x_BCSS,))
        return output.last_hidden_state[:, 1:]  # without the class token


@functools.cache
def _of_channels(values: tuple[float, ...], device: torch.device) -> Tensor:
    """fp32 [C, 1, 1], kept, since a CUDA graph cannot record the copy to the device."""
    return torch.tensor(values, device=device).view(-1, 1, 1)
