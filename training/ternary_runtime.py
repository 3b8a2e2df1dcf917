"""Runtime functions for training scripts.

from training.ternary_runtime import configure_ternary_training, reset_runtime_state
"""

from torch import nn

from arbitor.ternary.runtime import configure_ternary_training

__all__ = ["configure_ternary_training", "reset_runtime_state"]


def reset_runtime_state(model: nn.Module) -> None:
    """Clear every KV ledger that the model has read or written, and with them its sliding windows.

    Between texts that have nothing to do with each other nothing may be left of the one before. Weights and
    training state stay as they are. A model without ledgers is left alone.
    """
    for module in model.modules():
        for ledger in list(getattr(module, "ledgers", ())):
            ledger.clear()
