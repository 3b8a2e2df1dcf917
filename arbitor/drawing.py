"""A trained model that draws clips of video: `draw`.

Shape letters: B texts, L ids, F frames, C channels, S pixels a side, D dim.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from arbitor.errors import UserError
from arbitor.generate import check_seed, new_generator
from arbitor.model import ARBModel
from arbitor.model.sequencer import WINDOW
from arbitor.model.vocab import EOS, PAD
from arbitor.sidecars.video import ClipAutoencoder, VideoHead


def autoencoder_of(model: ARBModel) -> ClipAutoencoder:
    """The autoencoder of a model.

    Raises:
        UserError: it has no video sidecar.
    """
    if "video" not in model.sidecars:
        raise UserError("this model has no sidecar for clips; train one with `arbitor diffusion`")
    codec = model.sidecars["video"].codec
    assert isinstance(codec, ClipAutoencoder)
    return codec


def video_head_of(model: ARBModel) -> VideoHead:
    """The head of a model that draws latents.

    Raises:
        UserError: it has no video sidecar.
    """
    autoencoder_of(model)
    head = model.heads["video"]
    assert isinstance(head, VideoHead)
    return head


def drawn_ids(texts: Sequence[bytes], length: int) -> Tensor:
    """Texts as the head's condition is read from them, int64 [B, L]: three PAD or more, the bytes, EOS.

    Args:
        texts: B of them; an empty one stands for no condition.
        length: L; longer texts are cut.
    """
    rows = []
    for text in texts:
        ids = [*text[: length - WINDOW - 1], EOS]
        rows.append([PAD] * (length - len(ids)) + ids)
    return torch.tensor(rows, dtype=torch.int64)


@torch.no_grad()
def draw(
    model: ARBModel,
    texts: Sequence[bytes],
    *,
    steps: int = 32,
    sampler: str = "heun",
    guidance: float = 1.0,
    seed: int | None = None,
) -> Tensor:
    """Clips to texts.

    Args:
        model: one that was trained by `arbitor diffusion`.
        texts: B of them; an empty one leaves the choice to the model.
        steps, sampler, guidance: see `VideoHead.sample`.
        seed: of the noise; None takes a fresh one.

    Returns:
        uint8 [B, F, C, S, S] on the CPU.

    Raises:
        UserError: the model has no video sidecar, there is no text, or a setting that cannot be used.
    """
    if not texts:
        raise UserError("there is nothing to draw: give a text")
    if not math.isfinite(guidance):
        raise UserError(f"guidance is {guidance}; it must be a finite number (1 is off)")
    check_seed(seed)
    codec, head = autoencoder_of(model), video_head_of(model)
    # On the CPU, so that a seed means the same noise everywhere.
    noise = torch.randn((len(texts), *codec.latent_shape), generator=new_generator(seed))
    nothing = None
    if guidance != 1.0:
        nothing = model.read(drawn_ids([b""] * len(texts), model.config.video_ids))
    latents = head.sample(
        noise.to(model.device),
        model.read(drawn_ids(texts, model.config.video_ids)),
        steps=steps,
        sampler=sampler,
        guidance=guidance,
        no_condition=nothing,
    )
    return codec.decode(latents).cpu()
