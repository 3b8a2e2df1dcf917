"""Growth of a trained model: weights and training state of a checkpoint in a model with more parts."""

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from arbitor.config import ModelConfig
from arbitor.errors import UserError
from arbitor.model import ARBModel
from arbitor.ternary import VoteOptimizer, named_ternary
from arbitor.train.checkpoint import Checkpoint

SIDECARS = {"image": "image_size", "audio": "audio_rate", "video": "video_size"}
"""What may be added, with the field of `ModelConfig` that says whether it is there."""


def added_sidecars(base: ModelConfig, settings: Mapping[str, Any]) -> list[str]:
    """Names of the sidecars that `settings` ask for and `base` does not have."""
    return [name for name, field in SIDECARS.items() if settings.get(field) and not getattr(base, field)]


def graft_weights(model: ARBModel, checkpoint: Checkpoint) -> list[str]:
    """Put the weights of a checkpoint into a fresh model that has more parts than it.

    Must come ahead of the optimizer, which takes over what initialisation left of the fresh parts alone.

    Args:
        model: freshly made; what the checkpoint has no weights for stays as it was drawn.
        checkpoint: of the smaller model.

    Returns:
        Lines that say what was added, and what was left out.

    Raises:
        UserError: a tensor is there in both, in another form.
    """
    own = model.state_dict()
    shared = _fitting(own, checkpoint.weights)
    for name in own.keys() & checkpoint.weights.keys() - shared.keys():
        raise UserError(
            f"{checkpoint.folder} cannot grow into this model: {name} has the shape "
            f"{list(checkpoint.weights[name].shape)} there and {list(own[name].shape)} here"
        )
    model.load_state_dict(shared, strict=False)
    added = [(n, m) for n, m in named_ternary(model) if not any(k.startswith(f"{n}.") for k in shared)]
    weights = sum(module.numel() for _, module in added)
    return [
        f"grown from {checkpoint.folder} (step {checkpoint.state['step']}): {len(shared)} tensors taken over",
        f"added, {weights:,} weights: {_listed([name for name, _ in added])}",
        f"left out: {_listed(sorted(checkpoint.weights.keys() - own.keys()))}",
    ]


def graft_state(optimizer: VoteOptimizer, checkpoint: Checkpoint) -> list[str]:
    """Put the training state of a checkpoint into the optimizer of a model that has more parts.

    Returns:
        A line about what was left out, or none if all was taken over.
    """
    own = optimizer.named_state()
    given = checkpoint.optimizer_state or {}
    shared = _fitting(own, given)
    optimizer.load_named_state({**own, **shared})
    left_out = sorted(given.keys() - shared.keys())
    kinds = sorted({name.rpartition(".")[2] for name in left_out})
    what = f"{len(left_out)} of its tensors left out ({', '.join(kinds)})" if left_out else "all of it"
    return [f"training state taken over: {what}; steps, schedule and data begin anew"]


def _fitting(own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The given tensors that are also there, in the same shape and dtype."""
    return {
        name: tensor
        for name, tensor in given.items()
        if name in own and own[name].shape == tensor.shape and own[name].dtype == tensor.dtype
    }


def _listed(names: Collection[str]) -> str:
    return ", ".join(names) or "nothing"
