"""What users write about the optimiser: AdamW, its learning rate at each update, the average of the weights it trains.

A schedule depends on the update, counted from 0, and on the schedule's fields alone, never on `num_updates`: extending
a run changes no update that it has done.
"""

import math
from typing import Annotated, Literal

from pydantic import Field, model_validator

from infra.config import LATER, Config


class Constant(Config):
    """The learning rate itself. A longer run keeps it."""

    kind: Literal["constant"] = "constant"

    def factor(self, update: int) -> float:
        return 1.0


class _Falling(Config):
    """Down to `lowest` times the learning rate. A run longer than `until` stays there, and is refused where that is 0;
    to let it fall later, `continue_from` this run under another `until`."""

    until: int = Field(ge=1, description="the update, from 0, from which on the rate is at its lowest")
    lowest: float = Field(0.0, ge=0, lt=1, description="times learning_rate")

    def factor(self, update: int) -> float:
        return 1 - (1 - self.lowest) * self._fallen(update)

    def _fallen(self, update: int, begin: int = 0) -> float:
        return min(max((update - begin) / (self.until - begin), 0.0), 1.0)


class Linear(_Falling):
    """Falls evenly from update 0 on."""

    kind: Literal["linear"]


class Cosine(_Falling):
    """Falls along half a cosine from update 0 on (Loshchilov & Hutter, "SGDR", 2017, eq. 5, without restarts)."""

    kind: Literal["cosine"]

    def _fallen(self, update: int, begin: int = 0) -> float:
        return (1 - math.cos(math.pi * super()._fallen(update, begin))) / 2


class Wsd(_Falling):
    """Warm-up, stable, decay (Hu et al., "MiniCPM", 2024): constant up to `decay_from`, then evenly down. To train
    longer, `continue_from` a checkpoint before `decay_from` under later fields: the stable part is the same."""

    kind: Literal["wsd"]
    decay_from: int = Field(ge=0)

    @model_validator(mode="after")
    def _ordered(self) -> "Wsd":
        if self.decay_from >= self.until:
            raise ValueError(f"decay_from ({self.decay_from}) must be below until ({self.until})")
        return self

    def _fallen(self, update: int, begin: int = 0) -> float:
        return super()._fallen(update, self.decay_from)


class Multistep(Config):
    """Multiplied by `gamma` at each of the updates `at`. A longer run keeps the last rate."""

    kind: Literal["multistep"]
    at: Annotated[tuple[int, ...], Field(min_length=1)]
    gamma: float = Field(0.5, gt=0, lt=1)

    def factor(self, update: int) -> float:
        return self.gamma ** sum(update >= milestone for milestone in self.at)


class OptimizerConfig(Config):
    """AdamW. The defaults are v2's stage 1 (train_ccsr_stage1.py). Warm-up multiplies whatever the schedule says; it,
    the schedule and `kind` are of the trained networks, a discriminator keeps its rate and float32 moments."""

    kind: Annotated[Literal["adamw", "adamw8bit"], LATER] = Field(
        "adamw", description="adamw8bit: moments in 8 bits, a quarter of their memory; bitsandbytes (extra [bnb])"
    )
    learning_rate: float = Field(5e-5, gt=0)
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = Field(1e-2, ge=0)
    no_decay: Annotated[bool, LATER] = Field(False, description="no weight decay on norms and biases")
    clip_norm: float = Field(1.0, ge=0, description="0: no clipping")
    warmup_updates: int = Field(0, ge=0)
    schedule: Annotated[Constant | Linear | Cosine | Wsd | Multistep, Field(discriminator="kind"), LATER] = Constant()

    def unused(self) -> dict[str, str]:
        return {} if self.weight_decay else {"no_decay": "with weight_decay: 0"}

    def rate_at(self, update: int) -> float:
        """The learning rate at an update, from 0."""
        warm = min(1.0, (update + 1) / max(1, self.warmup_updates))
        return self.learning_rate * warm * self.schedule.factor(update)


class EmaConfig(Config):
    """An exponential moving average of the trained weights in float32, begun as the weights after the first update. It
    is what a run validates and exports; training itself takes no notice of it."""

    decay: float = Field(0.999, gt=0, lt=1)
    warmup: bool = Field(True, description="no more than (1 + n) / (10 + n) at update n, counted from 0")

    def decay_at(self, update: int) -> float:
        """What is kept of the average at an update, from 0."""
        return min(self.decay, (1 + update) / (10 + update)) if self.warmup else self.decay
