"""A trained model that speaks and listens: `say` and `hear`.

Shape letters: B texts or sounds, N samples, T times, Q codes of a time, L ids, D dim.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from arbitor.errors import UserError
from arbitor.generate import check_sampling, greedy_texts, new_generator
from arbitor.model import ARBModel
from arbitor.model.heads import TalkerHead
from arbitor.model.ledger import KVLedger
from arbitor.model.sequencer import WINDOW
from arbitor.model.vocab import EOS, PAD
from arbitor.sidecars.audio import AudioVQEncoder


def codec_of(model: ARBModel) -> AudioVQEncoder:
    """The codec of a model.

    Raises:
        UserError: it has no audio sidecar.
    """
    if "audio" not in model.sidecars:
        raise UserError("this model has no sidecar for sounds; train one with `arbitor audio`")
    codec = model.sidecars["audio"].codec
    assert isinstance(codec, AudioVQEncoder)
    return codec


def spoken_ids(texts: Sequence[bytes]) -> Tensor:
    """Texts as they stand ahead of their sounds, int64 [B, L]: three PAD or more, the bytes, EOS."""
    length = WINDOW + 1 + max(map(len, texts))
    rows = [[PAD] * (length - 1 - len(text)) + [*text, EOS] for text in texts]
    return torch.tensor(rows, dtype=torch.int64)


@torch.no_grad()
def say(
    model: ARBModel,
    texts: Sequence[bytes],
    *,
    seconds: float | None = None,
    temperature: float = 0.7,
    top_k: int = 0,
    seed: int | None = None,
) -> list[np.ndarray]:
    """Texts, spoken.

    Args:
        model: one that was trained to speak.
        texts: B of them, none empty.
        seconds: where a sound ends that the model does not end; None is the longest that it trained with.
        temperature: 0 takes the likeliest code always.
        top_k: draw among the k likeliest values of a code; 0 is off.
        seed: of the draws; None takes a fresh one.

    Returns:
        B waveforms, fp32 [N] at the codec's rate; perhaps empty.

    Raises:
        UserError: the model has no audio sidecar, there is no text, or an argument outside its range.
    """
    check_sampling(0, temperature, top_k, 1.0, seed)
    if not texts or not all(texts):
        raise UserError("there is nothing to say: give a text of one byte or more")
    codec, head = codec_of(model), model.heads["audio"]
    assert isinstance(head, TalkerHead)
    samples = model.config.audio_samples if seconds is None else max(1, round(seconds * codec.rate))
    most = -(-samples // codec.samples_per_time)
    generator = new_generator(seed)
    ids_BL = spoken_ids(texts)
    ledger = KVLedger(model.config, ids_BL.shape[1] + most)
    codes_BTQ = torch.zeros((len(texts), 0, codec.num_codes), dtype=torch.int64, device=model.device)
    counts = [0] * len(texts)
    running = set(range(len(texts)))
    state_BD = model.speak(ids_BL, codes_BTQ, ledger=ledger).logits
    for _ in range(most):
        codes_BQ, over_B = head.draw(state_BD, temperature, top_k, generator)
        running -= {row for row, over in enumerate(over_B.tolist()) if over}
        if not running:
            break
        for row in running:
            counts[row] += 1
        codes_BTQ = torch.cat([codes_BTQ, codes_BQ[:, None]], dim=1)
        state_BD = model.speak(None, codes_BQ[:, None], ledger=ledger).logits
    waves = [codec.decode(codes_BTQ[row : row + 1, :count])[0] for row, count in enumerate(counts)]
    return [wave.cpu().numpy() for wave in waves]


@torch.no_grad()
def hear(model: ARBModel, waves: Tensor, max_bytes: int = 64) -> list[bytes]:
    """The likeliest text of each of some sounds, fp32 [B, N] at the codec's rate.

    Raises:
        UserError: the model has no audio sidecar.
    """
    return greedy_texts(model, model.encode("audio", waves), max_bytes)
