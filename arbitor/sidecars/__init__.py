"""What turns other media into positions of the residual stream, ahead of the bytes; each is opt-in."""
