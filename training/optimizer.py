"""What users write about the optimiser: AdamW, and the average of the weights that it trains."""

from pydantic import Field

from infra.config import Config


class OptimizerConfig(Config):
    """AdamW. The defaults are v2's stage 1 (train_ccsr_stage1.py)."""

    learning_rate: float = Field(5e-5, gt=0)
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = Field(1e-2, ge=0)
    clip_norm: float = Field(1.0, ge=0, description="0: no clipping")
    warmup_updates: int = Field(0, ge=0)


class EmaConfig(Config):
    """An exponential moving average of the trained weights in float32, begun as the weights after the first update. It
    is what a run validates and exports; training itself takes no notice of it."""

    decay: float = Field(0.999, gt=0, lt=1)
    warmup: bool = Field(True, description="no more than (1 + n) / (10 + n) at update n, counted from 0")

    def decay_at(self, update: int) -> float:
        """What is kept of the average at an update, from 0."""
        return min(self.decay, (1 + update) / (10 + update)) if self.warmup else self.decay
