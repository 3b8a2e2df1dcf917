"""The norm of activations that no linear normalises."""

from arbitor.ops.head_norm import RMS_EPS, rms_norm

__all__ = ["RMS_EPS", "rms_norm"]
