"""From positions to batches, in order and ahead of the loop, by threads here or by tasks anywhere in the cluster."""

from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from infra.errors import ConfigError
from infra.process.memory import to_device
from infra.process.ray_runtime import RayConfig, cpu_work, user_error
from training.config import TrainConfig
from training.data.order import positions_of
from training.data.samples import Place, SampleMaker, SampleReader, TrainingSample
from training.runtime import TrainRuntime

if TYPE_CHECKING:
    from torch import Tensor

LOCAL_THREADS = 2


@dataclass(frozen=True)
class Batch:
    """One micro-batch: `hr` and `lr` (B, 3, S, S) RGB, the LR enlarged to the size of the HR.

    uint8 as the ingest makes it, float32 in [0, 1] after `to`. `moments`: stored latents by name, float16 and float32.
    `prompts`: a text for each sample, or none for empty ones.
    """

    keys: list[str]
    positions: list[int]
    hr: "Tensor"
    lr: "Tensor"
    moments: dict[str, "Tensor"] = field(default_factory=dict)
    prompts: tuple[str, ...] = ()

    @classmethod
    def of(cls, keys: list[str], positions: list[int], arrays: dict[str, np.ndarray]) -> "Batch":
        """From what `stack` returns, in its memory."""
        import torch

        prompts = tuple(arrays.get("prompts", np.array(())).tolist())
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items() if name != "prompts"}
        hr, lr = (tensors.pop(name).permute(0, 3, 1, 2) for name in ("hr", "lr"))
        return cls(keys, positions, hr, lr, tensors, prompts)

    def to(self, device: str) -> "Batch":
        """On a device, in float32. Moved first: bytes are a quarter of the way."""
        return replace(
            self,
            hr=to_device(self.hr, device).float() / 255,
            lr=to_device(self.lr, device).float() / 255,
            moments={name: to_device(moment, device).float() for name, moment in self.moments.items()},
        )


def enlarge(lr: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 RGB (h, w, 3) -> (height, width, 3), bicubic without antialiasing, rounded to 8 bit, as CCSR trains."""
    import torch
    from torch.nn.functional import interpolate

    image = torch.tensor(lr).permute(2, 0, 1)[None].float()
    enlarged = interpolate(image, size=(height, width), mode="bicubic").round().clamp(0, 255)
    return enlarged[0].permute(1, 2, 0).to(torch.uint8).numpy()


def stack(samples: Sequence[TrainingSample]) -> dict[str, np.ndarray]:
    """The arrays of a micro-batch, each LR enlarged: plain NumPy, which Ray moves without copying it into a pickle."""
    size = samples[0].hr.shape[:2]
    lr = [sample.lr if sample.lr.shape[:2] == size else enlarge(sample.lr, *size) for sample in samples]
    images = {"hr": [sample.hr for sample in samples], "lr": lr}
    # In C order whatever the rows are: convolutions of another memory layout round otherwise.
    stacked = {name: np.ascontiguousarray(np.stack(rows)) for name, rows in images.items()}
    if samples[0].prompt is not None:
        stacked["prompts"] = np.array([sample.prompt for sample in samples])
    return stacked | {name: np.stack([sample.moments[name] for sample in samples]) for name in samples[0].moments}


def make_arrays(maker: SampleMaker, places: Sequence[Place]) -> dict[str, np.ndarray]:
    """Read and stack one micro-batch: what a thread here or a task elsewhere does."""
    return stack([maker(place) for place in places])


def updates(
    reader: SampleReader, config: TrainConfig, *, start: int, rank: int, world_size: int
) -> Generator[list[Batch], None, None]:
    """The micro-batches of `rank` for every update from `start` on, prepared ahead and always in order.

    At most `config.runtime.ingest_cpus` are made at a time, by Ray tasks anywhere in the cluster (0: by threads of this
    process), and at most `window(config, world_size)` are under way or waiting: a slow loop stops the ingest.
    """
    runtime = config.runtime
    sizes = {"global_batch_size": config.global_batch_size, "micro_batch_size": runtime.micro_batch_size}
    every = (
        positions
        for update in range(start, config.num_updates)
        for positions in positions_of(update, rank, world_size, **sizes)
    )
    make = (
        arrays_on_ray(reader.maker, runtime.ray)
        if runtime.ingest_cpus
        else lambda places: make_arrays(reader.maker, places)
    )

    def load(positions: range) -> Batch:
        places = [reader.place(position) for position in positions]
        return Batch.of([place.entry.key for place in places], list(positions), make(places))

    num_micro = config.global_batch_size // (runtime.micro_batch_size * world_size)
    ahead: deque[Future[Batch]] = deque()
    with ThreadPoolExecutor(runtime.ingest_cpus or LOCAL_THREADS, thread_name_prefix="ingest") as pool:

        def fill() -> None:
            ahead.extend(pool.submit(load, next_) for next_ in islice(every, window(config, world_size) - len(ahead)))

        def take() -> Batch:
            batch = ahead.popleft().result()
            fill()
            return batch

        try:
            fill()
            for _ in range(start, config.num_updates):
                yield [take() for _ in range(num_micro)]
        finally:
            for future in ahead:
                future.cancel()


def window(config: TrainConfig, world_size: int) -> int:
    """Micro-batches of one rank that may be under way or waiting: `prefetch_batches` updates, or two a CPU."""
    runtime = config.runtime
    num_micro = config.global_batch_size // (runtime.micro_batch_size * world_size)
    return max(runtime.prefetch_batches * num_micro, 2 * (runtime.ingest_cpus or LOCAL_THREADS))


def arrays_on_ray(maker: SampleMaker, config: RayConfig) -> Callable[[Sequence[Place]], dict[str, np.ndarray]]:
    """`make_arrays` as a Ray task of one CPU. A task whose machine dies is run again by Ray, with the same result."""
    import ray

    shared = ray.put(maker)
    # The strategy is named because a task would otherwise be held inside its training worker's placement group.
    task = ray.remote(num_cpus=1, scheduling_strategy="DEFAULT", **cpu_work(config))(_make_on_one_thread)

    def make(places: Sequence[Place]) -> dict[str, np.ndarray]:
        try:
            arrays = ray.get(task.remote(shared, places))
        except ray.exceptions.RayTaskError as error:
            raise (user_error(error) or error) from None
        # Copied, so that the object store holds no more than what is on its way.
        return {name: array.copy() for name, array in arrays.items()}

    return make


def _make_on_one_thread(maker: SampleMaker, places: Sequence[Place]) -> dict[str, np.ndarray]:
    import cv2
    import torch

    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    return make_arrays(maker, places)


def cpus_of_worker(runtime: TrainRuntime) -> int:
    """A worker's own CPU (Ray Train reserves a GPU worker's GPU alone) and those of its ingest."""
    return (runtime.device == "cpu") + runtime.ingest_cpus


def check_cpus(config: TrainConfig, cluster: Mapping[str, float]) -> None:
    """Fail fast on CPUs that the cluster (resource -> amount) does not have for the fewest workers; more workers start
    only where there are CPUs for them too. Raises ConfigError."""
    runtime = config.runtime
    own = cpus_of_worker(runtime) - runtime.ingest_cpus
    needed, present = runtime.workers.min * cpus_of_worker(runtime), int(cluster.get("CPU", 0))
    if needed > present:
        raise ConfigError(
            f"{runtime.workers.min} workers of {own} CPU and {runtime.ingest_cpus} for ingest need {needed} CPUs, "
            f"the cluster has {present}",
            where="runtime.ingest_cpus" if runtime.ingest_cpus else "runtime.num_workers",
            todo="lower runtime.ingest_cpus or runtime.num_workers, or add nodes",
        )
