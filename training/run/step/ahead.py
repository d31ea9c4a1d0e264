"""Micro-batches on their device; with `runtime.encode_ahead` the VAE encodes each while the one before is trained."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext

import torch

from training.config import TrainConfig
from training.data.batches import Batch
from training.run.step.stages import Stage

Mover = Callable[[Sequence[Batch]], Iterator[Batch]]


def mover(stage: Stage, config: TrainConfig, device: str) -> Mover:
    """A function from an update's micro-batches to the same ones on `device`, in order, each when it is asked for."""
    if config.runtime.encode_ahead:
        return _Ahead(stage, device)
    return lambda batches: (batch.to(device) for batch in batches)


class _Ahead:
    """On a GPU the encodes are a second stream's; on a CPU they come in the same order, one after another.

    An update's first micro-batch has none before it and encodes itself.
    """

    def __init__(self, stage: Stage, device: str) -> None:
        self._stage, self._device = stage, device
        self._stream = torch.cuda.Stream(device) if device.startswith("cuda") else None
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(device))  # which the weights come from

    def __call__(self, batches: Sequence[Batch]) -> Iterator[Batch]:
        batch, encoded = batches[0].to(self._device), None
        for following in batches[1:]:
            with nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
                next_batch = self._stage.encoded(following.to(self._device))
                next_encoded = None if self._stream is None else self._stream.record_event()
            yield self._ready(batch, encoded)
            batch, encoded = next_batch, next_encoded
        yield self._ready(batch, encoded)

    def _ready(self, batch: Batch, encoded: torch.cuda.Event | None) -> Batch:
        """The batch, once the stream that trains waits for its encodes and holds its memory."""
        if encoded is not None:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(encoded)
            for tensor in (batch.hr, batch.lr, *batch.moments.values()):
                tensor.record_stream(stream)
        return batch
