"""A flow that knows the mean and variance of latents alone, which a learnt one is measured against.

Shape letters: B clips, N numbers of a clip's latents.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Gaussian:
    """A Gaussian over latents, in the axes of its covariance.

    Attributes:
        mean: fp32 [N].
        axes: fp32 [N, N], an axis a column; None where every number is independent.
        variances: fp32 [N], along the axes.
    """

    mean: Tensor
    axes: Tensor | None
    variances: Tensor

    @classmethod
    def of(cls, latents: Tensor, full: bool) -> "Gaussian":
        """The one with mean and variances (or, if `full`, the covariance) of some latents [B, ...]."""
        x_BN = latents.flatten(1).double()
        mean_N = x_BN.mean(dim=0)
        x_BN = x_BN - mean_N
        if not full:
            return cls(mean_N.float(), None, x_BN.square().mean(dim=0).float())
        variances, axes = torch.linalg.eigh(x_BN.mT @ x_BN / len(x_BN))
        return cls(mean_N.float(), axes.float(), variances.clamp_min(0).float())

    def velocity(self, x_t: Tensor, t: Tensor) -> Tensor:
        """The mean of data - noise given x_t = (1 - t) noise + t data, if the data were this Gaussian.

        Along an axis of variance s, data and noise given x_t have the means m + t s y / v and (1 - t) y / v,
        with y = x_t - t m and v = t^2 s + (1 - t)^2: no other function of x_t and t has a smaller mean square
        error on data with this mean and covariance, if it is linear in x_t.

        Args:
            x_t: float [B, ...].
            t: fp32 [B].

        Returns:
            Of the shape of x_t.
        """
        t_B1 = t[:, None]
        y_BN = x_t.flatten(1) - t_B1 * self.mean
        along = y_BN if self.axes is None else y_BN @ self.axes
        spread = t_B1.square() * self.variances + (1 - t_B1).square()
        along = along * (t_B1 * self.variances - (1 - t_B1)) / spread
        back = along if self.axes is None else along @ self.axes.mT
        return (self.mean + back).view_as(x_t)

    def sample(self, noise: Tensor) -> Tensor:
        """Latents made of noise [B, ...] of mean 0 and variance 1, of its shape."""
        along = noise.flatten(1) * self.variances.sqrt()
        back = along if self.axes is None else along @ self.axes.mT
        return (self.mean + back).view_as(noise)
