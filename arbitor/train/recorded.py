"""A training step as one CUDA graph, so that a GPU does not wait for Python to launch its kernels.

The first steps run as they are, which compiles kernels and fills caches; then one is recorded and from there
on replayed. What a replay must read anew, the batch and the numbers of `VoteOptimizer.prepare`, lies in
tensors that keep their place. A replay runs the kernels that were recorded, so its results are those of the
step that was recorded, bit for bit.

Where steps are of a few kinds (of text, of images, ...), each kind has a graph of its own. They share their
memory: a graph's work is over, and its figures are copied, before another one runs.
"""

import collections
import contextlib
import functools
import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from arbitor.model import ARBModel
from arbitor.ops.backend import environment_choice

VARIABLE = "ARB_REPLAY"
CHOICES = ("auto", "off")
WARM_UP = 3  # steps before one is recorded
MOST_AHEAD = 4  # replays of all kinds of steps that may wait for the GPU


def why_not_recorded(model: ARBModel) -> str | None:
    """Why a step of the model is known not to be recordable, in words for the user; None if it may be.

    Raises:
        UserError: `ARB_REPLAY` is none of its choices.
    """
    config = model.config
    wanted = environment_choice(VARIABLE, CHOICES)
    if model.device.type != "cuda":
        return "there is no GPU"
    if wanted == "off":
        return f"{VARIABLE} is off"
    if config.memory_rows and config.memory_host:
        return "the memory is on the host"
    return None


def can_record(model: ARBModel) -> bool:
    """Whether to try to record a step of the model."""
    return why_not_recorded(model) is None


class RecordedStep:
    """Calls `work` at first, and replays it later.

    The last call ahead of the recording is watched. Work in which the host waits for the device cannot be
    recorded, and is called every time: so do experts that are too large for the optimizer's workspace, and
    torch's grouped products on GPUs older than Hopper.

    Args:
        work: (batch) -> scalars on the device; whatever it changes must keep its place.
        device: a GPU.
        beside: a step whose stream, memory and place in the queue this one shares; None has its own.

    Attributes:
        recorded: whether the next call is a replay.
        waits: the host was seen to wait for the device, so the work will not be recorded.
    """

    def __init__(
        self,
        work: Callable[[Sequence[Tensor]], Mapping[str, Tensor]],
        device: torch.device,
        beside: "RecordedStep | None" = None,
    ) -> None:
        self._work = work
        self._stream: torch.cuda.Stream = torch.cuda.Stream(device) if beside is None else beside._stream
        self._pool: Any = torch.cuda.graph_pool_handle() if beside is None else beside._pool
        self._calls = 0
        self.waits = False
        self._graph: torch.cuda.CUDAGraph | None = None
        self._batch: list[Tensor] = []
        self._names: list[str] = []
        self._figures: Tensor | None = None
        self._ends: collections.deque[torch.cuda.Event] = (
            collections.deque() if beside is None else beside._ends
        )

    @property
    def recorded(self) -> bool:
        """Whether a step was recorded."""
        return self._graph is not None

    def __call__(self, batch: Sequence[Tensor]) -> dict[str, Tensor]:
        """A step. Waits for the device where it is `MOST_AHEAD` replays behind.

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
        if self._calls < WARM_UP or self.waits:
            return self._called()
        if self._calls == WARM_UP:
            with watched() as seen:
                figures = self._called()
            self.waits = bool(seen)
            return figures
        if self._graph is None:
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph, pool=self._pool, stream=self._stream):
                self._figures = self._packed(self._work(self._batch))
        self._replay(self._graph)
        assert self._figures is not None
        return self._unpacked(self._figures.clone())

    def _replay(self, graph: torch.cuda.CUDAGraph) -> None:
        if len(self._ends) == MOST_AHEAD:
            self._ends.popleft().synchronize()
        graph.replay()
        end = torch.cuda.Event()
        end.record(torch.cuda.current_stream(self._stream.device))
        self._ends.append(end)

    def _called(self) -> dict[str, Tensor]:
        # On a stream of its own, as the recording will be: autograd keeps to the stream of the forward.
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            figures = self._packed(self._work(self._batch))
        current.wait_stream(self._stream)
        return self._unpacked(figures)

    def _packed(self, figures: Mapping[str, Tensor]) -> Tensor:
        self._names = list(figures)
        return torch.stack([figure.detach().to(torch.float64) for figure in figures.values()])

    def _unpacked(self, figures: Tensor) -> dict[str, Tensor]:
        return dict(zip(self._names, figures.unbind(), strict=True))


class RecordedSteps:
    """A `RecordedStep` for every kind of step.

    Args:
        work: (batches, each with its tensors) -> scalars on the device.
        device: a GPU.

    Attributes:
        waits: of some kind, the host was seen to wait for the device.
    """

    def __init__(
        self, work: Callable[[Sequence[Sequence[Tensor]]], Mapping[str, Tensor]], device: torch.device
    ) -> None:
        self._work, self._device = work, device
        self._steps: dict[Hashable, RecordedStep] = {}

    @property
    def waits(self) -> bool:
        """See the class."""
        return any(step.waits for step in self._steps.values())

    @property
    def recorded(self) -> bool:
        """Whether a step of each kind that was taken so far was recorded, and of one at least."""
        return bool(self._steps) and all(step.recorded for step in self._steps.values())

    def __call__(
        self, kind: Hashable, batches: Sequence[Sequence[Tensor]], on_host: int = 0
    ) -> dict[str, Tensor]:
        """A step.

        Args:
            kind: what tells it from steps whose batches have other shapes, or do other work.
            batches: micro-batches of equally many tensors, on the host.
            on_host: so many tensors ahead of each stay there: steps of a kind have equal ones.

        Returns:
            See `RecordedStep`.
        """
        step = self._steps.get(kind)
        if step is None:
            heads = [batch[:on_host] for batch in batches]
            beside = next(iter(self._steps.values()), None)
            step = RecordedStep(functools.partial(self._of_one_kind, heads), self._device, beside)
            self._steps[kind] = step
        return step([tensor for batch in batches for tensor in batch[on_host:]])

    def _of_one_kind(
        self, heads: Sequence[Sequence[Tensor]], tensors: Sequence[Tensor]
    ) -> Mapping[str, Tensor]:
        width = len(tensors) // len(heads)
        parts = [tensors[first : first + width] for first in range(0, len(tensors), width)]
        return self._work([[*head, *part] for head, part in zip(heads, parts, strict=True)])


@contextlib.contextmanager
def watched() -> Iterator[list[str]]:
    """A list that holds, afterwards, what torch said of operations inside that made the host wait.

    Other warnings are passed on.
    """
    seen: list[str] = []
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield seen
        finally:
            torch.cuda.set_sync_debug_mode(mode)
    for warning in caught:
        text = str(warning.message)
        if "synchronizing CUDA operation" in text:
            seen.append(text)
        elif not text.startswith("Synchronization debug mode"):  # is a prototype feature, it says
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
