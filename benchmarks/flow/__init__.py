"""Whether integer training learns to draw: clips of moving digits by a flow, beside two that have not learnt.

    python -m benchmarks.flow --device cuda --minutes 8

An autoencoder is trained, then the flow on its latents, as `training/diffusion.py` does. What is measured, on
digits that were held out:

- The velocity loss at times spread evenly from 0 to 1. Beside it, the loss of the best guess that is linear
  in x_t, which is that of a Gaussian with the training latents' mean and whole covariance, and of one with
  their variances alone; and the loss of the trained flow on clips whose frames are out of order.
- The Fréchet distance to real held-out clips, on features of a float classifier of clips, of clips drawn by
  the flow, of clips drawn from the Gaussian of whole covariance, and of real clips whose frames are out of
  order. Real training clips, and real held-out ones in latents and back, tell how small it can be.
- The shares that the classifier names right of real held-out clips (`real_named`), of such in latents and
  back (`coded_named`) and of clips drawn to captions, each by its caption (`drawn_named`); `real_velocities`
  is the share of real held-out clips whose velocity it gives right, which cannot be told of those that begin
  at an edge. It is trained first, and refused where it names fewer than 95 % of the real held-out clips.

The goal is half of each baseline, or less. A row goes into `benchmarks/results/flow-<device>.csv`; distances
compare only where `data`, `clips`, `classifier` (`strided`, of rows from before it was pooled over places, or
`pooled`) and `classifier_steps` are the same. Beside it lie `flow-<device>.png`, a clip of each digit a row,
real ones above drawn ones, and `flow-<device>.gif`, in which three drawn clips of each digit play. Training
that was cut off by `--minutes` is kept in `--work`, and the same command goes on with it.
"""
