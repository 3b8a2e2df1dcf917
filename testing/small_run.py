"""What tests of runs share: a model whose step takes milliseconds, on one thread."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

MODEL: dict[str, Any] = {
    "dim": 32,
    "num_prelude_layers": 1,
    "num_heads": 2,
    "head_dim": 8,
    "rope_dim": 8,
    "value_dim": 16,
    "kv_latent_dim": 32,
    "ffn_dim": 64,
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    former = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(former)
