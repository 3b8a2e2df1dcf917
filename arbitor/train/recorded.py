"""A training step as one CUDA graph, so that a GPU does not wait for Python to launch its kernels.

The first steps run as they are, which compiles kernels and fills caches; then one is recorded and from there
on replayed. What a replay must read anew, the batch and the numbers of `VoteOptimizer.prepare`, lies in
tensors that keep their place. A replay runs the kernels that were recorded, so its results are those of the
step that was recorded, bit for bit.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from arbitor.model import ARBModel

WARM_UP = 3  # steps before one is recorded


def can_record(model: ARBModel) -> bool:
    """Whether a step of the model can be recorded: it is on a GPU and nothing in it asks the host.

    What asks: iterations that end when all positions have halted, and a memory in host memory.
    """
    config = model.config
    iterates = config.has_core and config.max_moe_iters > 1
    return model.device.type == "cuda" and not iterates and not (config.memory_rows and config.memory_host)


class RecordedStep:
    """Calls `work` at first, and replays it later.

    Args:
        work: (batch) -> scalars on the device. It must not ask the device anything, and whatever it changes
            must keep its place.
        device: a GPU.

    Attributes:
        recorded: whether the next call is a replay.
    """

    def __init__(
        self, work: Callable[[Sequence[Tensor]], Mapping[str, Tensor]], device: torch.device
    ) -> None:
        self._work = work
        self._stream = torch.cuda.Stream(device)
        self._calls = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._batch: list[Tensor] = []
        self._names: list[str] = []
        self._figures: Tensor | None = None

    @property
    def recorded(self) -> bool:
        """Whether a step was recorded."""
        return self._graph is not None

    def __call__(self, batch: Sequence[Tensor]) -> dict[str, Tensor]:
        """A step.

        Args:
            batch: tensors on the host, of the same shapes and dtypes every time.

        Returns:
            fp64 scalars on the device, new ones in every call.
        """
        if not self._batch:
            self._batch = [torch.empty_like(t, device=self._stream.device) for t in batch]
        for place, tensor in zip(self._batch, batch, strict=True):
            place.copy_(tensor.pin_memory() if tensor.device.type == "cpu" else tensor, non_blocking=True)
        self._calls += 1
        if self._graph is None and self._calls <= WARM_UP:
            # On a stream of its own, as the recording will be: autograd keeps to the stream of the forward.
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
            with torch.cuda.stream(self._stream):
                figures = self._packed(self._work(self._batch))
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)
            return self._unpacked(figures)
        if self._graph is None:
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph, stream=self._stream):
                self._figures = self._packed(self._work(self._batch))
        self._graph.replay()
        assert self._figures is not None
        return self._unpacked(self._figures.clone())

    def _packed(self, figures: Mapping[str, Tensor]) -> Tensor:
        self._names = list(figures)
        return torch.stack([figure.detach().to(torch.float64) for figure in figures.values()])

    def _unpacked(self, figures: Tensor) -> dict[str, Tensor]:
        return dict(zip(self._names, figures.unbind(), strict=True))
