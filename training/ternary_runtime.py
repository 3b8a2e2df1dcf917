"""Runtime functions for training scripts.

from training.ternary_runtime import configure_ternary_training, reset_runtime_state
"""

from arbitor.model.ledger import reset_runtime_state
from arbitor.ternary.runtime import configure_ternary_training

__all__ = ["configure_ternary_training", "reset_runtime_state"]
