"""The data of mixed pretraining: a corpus for every modality that is drawn."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from arbitor.config import RunConfig
from arbitor.data.audio import open_training_audio
from arbitor.data.corpus import ByteCorpus, open_corpus
from arbitor.data.docstrings import open_docstrings
from arbitor.data.documents import HubDocuments, open_hub_corpus
from arbitor.data.holding_out import exact_share, spelled_number
from arbitor.data.hub import is_hub
from arbitor.data.images import Geometry, open_training_images
from arbitor.data.video import ClipGeometry, open_videos
from arbitor.errors import UserError


@dataclass(frozen=True, slots=True)
class MixCorpus:
    """What each modality learns from and is measured on.

    Attributes:
        parts: corpora by the names of `arbitor.config.MIXED`, those with a weight above 0.
    """

    parts: dict[str, Any]


@dataclass(frozen=True, slots=True)
class HubText:
    """A data set of the hub.

    Attributes:
        corpus: what is held out.
        documents: what is learnt from.
    """

    corpus: ByteCorpus
    documents: HubDocuments


def open_mix(config: RunConfig) -> MixCorpus:
    """Open the data of every modality whose weight is above 0.

    Raises:
        UserError: data that cannot be used, beginning with its flag; or a modality that cannot be mixed yet.
    """
    share = _share(config.data.held_out)
    parts = {}
    for name in config.mix.active:
        if name not in OPENERS:
            raise UserError(
                f"{name}_weight is {config.mix.weight(name):g}, and this version cannot mix {name}; leave it "
                f"at 0 (it mixes {', '.join(OPENERS)})"
            )
        try:
            parts[name] = OPENERS[name](config, share)
        except UserError as error:
            given = getattr(config.mix, f"{name}_data", ())
            advice = "" if given else f" (--{name}-weight 0 leaves it out)"
            raise UserError(f"--{name}-data: {error}{advice}") from error
    return MixCorpus(parts)


def _share(held_out: str | None) -> Fraction | None:
    """The share of every part's data that is held out; None is each one's own.

    Raises:
        UserError: something else than a share.
    """
    if held_out is None:
        return None
    number = spelled_number(held_out)
    if number is None or not 0 < number < 1:
        raise UserError(
            f"--held-out must be a share above 0 and below 1, of the data of every modality, got {held_out!r}"
        )
    return exact_share(number)


def _spelled(share: Fraction | None) -> str | None:
    return None if share is None else repr(float(share))


def _open_bytes(config: RunConfig, data: Sequence[str], share: Fraction | None) -> Any:
    if any(map(is_hub, data)):
        if len(data) > 1:
            raise UserError("a data set of the hub stands alone: give one, or files without it")
        return HubText(*open_hub_corpus(data[0], config.model.ctx))
    return open_corpus(data, _spelled(share), config.data.field, min_bytes=config.model.ctx)


def _open_text(config: RunConfig, share: Fraction | None) -> Any:
    if not config.mix.text_data:
        return open_docstrings(share, min_bytes=config.model.ctx)
    return _open_bytes(config, config.mix.text_data, share)


def _open_code(config: RunConfig, share: Fraction | None) -> Any:
    return _open_bytes(config, config.mix.code_data, share)


def _open_image(config: RunConfig, share: Fraction | None) -> Any:
    model = config.model
    if not model.image_size:
        raise UserError("image_weight is set for a model without the image sidecar; set image_size as well")
    geometry = Geometry(size=model.image_size, channels=model.image_channels)
    data, field = config.mix.image_data, config.data.field
    # "text" is the usual field of texts; of captions, two names are usual. A data set of the hub has its own.
    named = None if field == "text" or any(map(is_hub, data)) else field
    return open_training_images(data, _spelled(share), geometry, named)


def _open_audio(config: RunConfig, share: Fraction | None) -> Any:
    if not config.model.audio_rate:
        raise UserError("audio_weight is set for a model without the audio sidecar; set audio_rate as well")
    return open_training_audio(config.mix.audio_data, _spelled(share), config.model.audio_rate)


def _open_video(config: RunConfig, share: Fraction | None) -> Any:
    model = config.model
    if not model.video_size:
        raise UserError("video_weight is set for a model without the video sidecar; set video_size as well")
    geometry = ClipGeometry(size=model.video_size, frames=model.video_frames, channels=model.video_channels)
    return open_videos(config.mix.video_data, _spelled(share), geometry)


OPENERS: dict[str, Callable[[RunConfig, Fraction | None], Any]] = {
    "text": _open_text,
    "code": _open_code,
    "image": _open_image,
    "audio": _open_audio,
    "video": _open_video,
}
"""What opens the data of a modality, given the run's settings and the share to hold out."""
