"""A pretrained autoencoder for tests: the library's class, tiny and with random weights; needs diffusers."""

from pathlib import Path
from typing import Any

import pytest
import torch


def small_autoencoder(folder: Path, **changes: Any) -> Path:
    """Writes an `AutoencoderKL` that halves pictures into a folder, and returns the folder."""
    diffusers = pytest.importorskip("diffusers", reason="diffusers (extra `autoencoder`) is not installed")
    torch.manual_seed(0)
    options = {
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "block_out_channels": (8, 8),
        "latent_channels": 16,
        "norm_num_groups": 4,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        **changes,
    }
    diffusers.AutoencoderKL(**options).eval().save_pretrained(folder)
    return folder
