"""A frozen vision encoder: DINOv2 (Oquab et al. 2023) with integer weights, computed by transformers.

Matrices are int8 codes times a power of two for each row, vectors int16 codes times one power of two. The
weights belong to the model: a checkpoint holds them, and needs no other file. Nothing of it is trained.

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

INT8_MAX = 127
INT16_MAX = 32767
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


class _Integers(nn.Module):
    """Integer buffers under the names of the encoder's parameters, with "-" for "."."""


class FrozenEncoder(nn.Module):
    """Patches of images as vectors of a pretrained encoder.

    Attributes:
        width: H.
        codes, exponents: the integers.

    Args:
        architecture: as `read_architecture` gives it.
        device: where to make it. All weights are 0 until `take` or a checkpoint brings them.
    """

    def __init__(self, architecture: str, device: torch.device | None = None) -> None:
        super().__init__()
        self.architecture = architecture
        self.width = int(json.loads(architecture)["hidden_size"])
        self.codes, self.exponents = _Integers(), _Integers()
        for name, parameter in _skeleton(architecture).named_parameters():
            rows = _num_rows(name, parameter.shape)
            dtype = torch.int8 if rows else torch.int16
            code = torch.zeros(parameter.shape, dtype=dtype, device=device)
            exponent = torch.zeros(max(rows, 1), dtype=torch.int8, device=device)
            self.codes.register_buffer(name.replace(".", "-"), code)
            self.exponents.register_buffer(name.replace(".", "-"), exponent)

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
        for name, parameter in given.named_parameters():
            if not bool(torch.isfinite(parameter).all()):
                raise UserError(f"{source}: {name} holds numbers that are not finite")
            key = name.replace(".", "-")
            code, exponent = rounded(parameter.float(), _num_rows(name, parameter.shape))
            getattr(self.codes, key).copy_(code)
            getattr(self.exponents, key).copy_(exponent)

    def weights(self) -> dict[str, Tensor]:
        """The encoder's parameters as fp32, by name."""
        exponents = dict(self.exponents.named_buffers())
        decoded = {}
        for key, code in self.codes.named_buffers():
            exponent = exponents[key]
            values = torch.ldexp(code.float().view(len(exponent), -1), exponent[:, None].int())
            decoded[key.replace("-", ".")] = values.view(code.shape)
        return decoded

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


def _num_rows(name: str, shape: torch.Size) -> int:
    """Rows of a matrix, each with an exponent of its own; 0 for what counts as a vector."""
    if len(shape) < 2:
        return 0
    if name.endswith("position_embeddings"):
        return int(shape[1])
    return int(shape[0]) if name.endswith("weight") else 0


def rounded(values: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Float values as integer codes and exponents: value = code * 2^exponent, the codes as large as fits.

    Args:
        values: fp32 of any shape.
        rows: how many rows, of int8 codes and each with its exponent; 0 for int16 codes with one exponent.

    Returns:
        Codes of the values' shape, and int8 exponents [max(rows, 1)].
    """
    limit = INT8_MAX if rows else INT16_MAX
    flat = values.reshape(max(rows, 1), -1)
    absmax = flat.abs().amax(dim=1)
    # absmax / limit = m * 2^e with m < 1, so that absmax * 2^-e is at most the limit.
    exponent = torch.frexp(absmax / limit).exponent.clamp(-126, 126)
    exponent = torch.where(absmax > 0, exponent, 0)
    code = torch.ldexp(flat, -exponent[:, None]).round_().clamp_(-limit, limit)
    dtype = torch.int8 if rows else torch.int16
    return code.to(dtype).view(values.shape), exponent.to(torch.int8)
