"""Measurements of a worker's updates: rates, counted FLOPs against the card's peak, memory, a profile."""

import re
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop, sdpa_flop, shape_wrapper

from infra.files.publish import temporary_folder, upload
from infra.files.storage import join
from training.config import TrainConfig
from training.run.agreement import WorkerContext, attempt

# Dense bf16 peaks in FLOP/s by a part of the card's name, from the vendors' datasheets (V100: fp16); the first counts.
PEAK_FLOPS = {
    "GB200": 2500e12,
    "B200": 2250e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "GH200": 989e12,
    "A100": 312e12,
    "A10": 125e12,
    "L40S": 362e12,
    "L4": 121e12,
    "RTX 5090": 209e12,
    "RTX 4090": 165e12,
    "V100": 125e12,
}
PROFILED_UPDATES = 3


def peak_flops(card: str) -> float | None:
    """The dense half-precision peak of a card by its name, None where it is not known."""
    return next((peak for name, peak in PEAK_FLOPS.items() if re.search(rf"\b{name}\b", card)), None)


class FlopCounter(TorchDispatchMode):
    """Counts the FLOPs of matrix products, convolutions and attention, forward and backward, as they are executed.

    torch's FlopCounterMode takes other operations apart on the way (silu's backward, for one), which changes the last
    bits of gradients: a resumed run, which counts at another update, would no longer be bit-equal.
    """

    # torch's table has the attention of GPUs only; its formulas take the same shapes.
    formulas = flop_registry | {
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: shape_wrapper(lambda *s, **_: sdpa_flop(*s)),
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: shape_wrapper(
            lambda *s, **_: sdpa_backward_flop(*s)
        ),
    }

    def __init__(self) -> None:
        super().__init__()
        self._total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        formula = self.formulas.get(getattr(func, "_overloadpacket", None))
        if formula is not None:
            self._total += formula(*args, **kwargs, out_val=out)
        return out

    def get_total_flops(self) -> int:
        return self._total


def flop_counter() -> FlopCounter:
    return FlopCounter()


def peak_memory_bytes(device: str) -> int:
    """On a GPU the most that was allocated since the last reset, else the process's largest resident size."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Meter:
    """Rates since the last point. FLOPs are counted on the first micro-batch of one update: the first of this process,
    and once more where another set of loss terms shows that the work has changed. They are not where `flops_per_sample`
    is given: the counter does not see into compiled blocks."""

    def __init__(
        self, config: TrainConfig, device: str, world_size: int, *, flops_per_sample: float | None = None
    ) -> None:
        self.config, self._device, self._world_size = config, device, world_size
        card = torch.cuda.get_device_name() if device.startswith("cuda") else ""
        self.peak = peak_flops(card) if config.precision == "bf16" else None
        self.flops_per_sample = flops_per_sample or 0.0
        self._counts = self._count_is_due = flops_per_sample is None
        self._terms: set[str] | None = None
        self._restart()

    def _restart(self) -> None:
        if self._device.startswith("cuda"):
            torch.cuda.reset_peak_memory_stats(self._device)
        self._since = self._waiting_since = time.perf_counter()
        self._waited = self._aside = 0.0
        self._num_updates = 0

    @contextmanager
    def counting(self, micro_step: int) -> Iterator[None]:
        """Around forward and backward of every micro-batch; counts where a count is due."""
        if micro_step or not self._count_is_due:
            yield
            return
        with flop_counter() as counter:
            yield
        self.flops_per_sample = counter.get_total_flops() / self.config.runtime.micro_batch_size
        self._count_is_due = False

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Time that is no training: validation."""
        began = time.perf_counter()
        yield
        self._aside += time.perf_counter() - began

    def batch_arrived(self) -> None:
        self._waited += time.perf_counter() - self._waiting_since

    def update_done(self, terms: dict[str, float]) -> None:
        self._num_updates += 1
        self._count_is_due = self._counts and self._terms is not None and self._terms != set(terms)
        self._terms = set(terms)

    def wait_for_batch(self) -> None:
        self._waiting_since = time.perf_counter()

    def values(self) -> dict[str, float]:
        """Rates since the last call. A share of the peak is given only where the peak is known: "mfu", or "hfu" where
        activation checkpointing computes parts of the forward twice and the count holds both."""
        elapsed = max(time.perf_counter() - self._since - self._aside, 1e-9)
        rate = self._num_updates * self.config.global_batch_size / elapsed
        flops = self.flops_per_sample * rate / self._world_size
        values = {
            "samples_per_second": rate,
            "samples_per_second_per_worker": rate / self._world_size,
            "data_wait_share": self._waited / elapsed,
            "tflops_per_second_per_worker": flops / 1e12,
            "peak_memory_gib": peak_memory_bytes(self._device) / 2**30,
        }
        if self.peak:
            values["hfu" if self.config.runtime.activation_checkpointing else "mfu"] = flops / self.peak
        if self._aside:
            values["validation_seconds"] = self._aside
        self._restart()
        return values


class Profile:
    """torch's profile of three updates after two others, as OUT/profile/trace.json and top_ops.txt; a block, at whose
    end what was recorded so far is written. Where it cannot be written, training continues with a warning."""

    def __init__(self, config: TrainConfig, context: WorkerContext) -> None:
        self._folder, self._context = join(config.output, "profile"), context
        schedule = torch.profiler.schedule(wait=1, warmup=1, active=PROFILED_UPDATES, repeat=1)
        self._profiler = torch.profiler.profile(schedule=schedule, on_trace_ready=self._write)

    def __enter__(self) -> "Profile":
        self._profiler.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._profiler.stop()

    def update_done(self) -> None:
        self._profiler.step()

    def _write(self, profiler: torch.profiler.profile) -> None:
        _, error = attempt(lambda: self._save(profiler))
        if error is not None:
            self._context.warn(f"the profile was not written: {error.what} ({error.where})")

    def _save(self, profiler: torch.profiler.profile) -> None:
        key = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        table = profiler.key_averages().table(sort_by=key, row_limit=20, max_name_column_width=60)
        with temporary_folder("profile") as scratch:
            profiler.export_chrome_trace(str(scratch / "trace.json"))
            (scratch / "top_ops.txt").write_text(table + "\n")
            for name in ("trace.json", "top_ops.txt"):
                upload(scratch / name, join(self._folder, name))
        if self._context.tracker is not None:
            self._context.tracker.file("profile/top_ops.txt", table.encode())
