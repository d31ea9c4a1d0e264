"""What `ccsr train` may be asked for."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from degradation import DegradationConfig
from infra.config import Config, Location
from infra.ray_runtime import RayConfig
from infra.tracking import TrackingConfig
from training.models import ModelConfig
from training.order import legal_world_sizes


class OptimizerConfig(Config):
    """AdamW. The defaults are v2's stage 1 (train_ccsr_stage1.py)."""

    learning_rate: float = Field(5e-5, gt=0)
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = Field(1e-2, ge=0)
    clip_norm: float = Field(1.0, ge=0, description="0: no clipping")
    warmup_updates: int = Field(0, ge=0)


class DecoderLossConfig(Config):
    """Stage 2's loss; see `training.generator_loss`. Defaults: v1's, with a perceptual term that needs no file.

    v2: l2, lpips, dino, gan_weight 0.05, neither adaptive nor divided, both terms from update 101 on.
    """

    reconstruction: Literal["l1", "l2"] = "l1"
    perceptual: Literal["lpips", "encoder_features", "none"] = "encoder_features"
    perceptual_start_update: int = Field(0, ge=0, description="updates before this one train without that term")
    discriminator: Literal["patch", "dino"] = Field("patch", description="PatchGAN (v1) or DINO heads (v2)")
    gan_weight: float = Field(0.5, ge=0)
    adaptive: bool = True
    divide_by_batch: bool = True
    gan_start_update: int = Field(1, ge=0, description="updates before this one train without the GAN term")
    discriminator_width: int = Field(64, ge=4, description="channels of the first PatchGAN layer")
    discriminator_learning_rate: float = Field(5e-6, gt=0)


class TrainRuntime(Config):
    """How the job runs. Any legal world size, micro-step order and ZeRO stage trains on the same global batches."""

    ray: RayConfig = RayConfig()
    num_workers: int = Field(1, ge=1)
    micro_batch_size: int = Field(4, ge=1)
    zero_stage: Literal[0, 1, 2] = 1
    use_gpu: bool = False
    threads_per_worker: int = Field(1, ge=1, description="torch threads of a CPU worker")
    prefetch_batches: int = Field(2, ge=1)
    log_every: int = Field(1, ge=1, description="updates between two points in MLflow")
    checkpoint_every: int = Field(500, ge=1, description="updates between two checkpoints; the last always has one")
    keep_checkpoints: int = Field(2, ge=1)


class TrainConfig(Config):
    """One stage of CCSR. 0: noise prediction (v2's start, and the conventional model); 1: NUTL; 2: the decoder."""

    job: Literal["train"]
    output: Location
    seed: int = 0
    stage: Literal[0, 1, 2]
    data: Annotated[tuple[Location, ...], Field(min_length=1)]
    init_from: Location | None = Field(None, description="a model directory to start from; none: random weights")
    model: ModelConfig = ModelConfig()
    crop_px: int = Field(512, ge=32)
    degradation: str | DegradationConfig | None = Field(None, description="none: the LR that the shards store")
    start_from: Literal["hr", "lr"] = Field("hr", description="which latent is noised to T")
    num_steps: int = Field(45, ge=1, description="stage 2: steps of the whole chain that is truncated")
    t_max: float = Field(0.6667, gt=0, le=1)
    t_min: float = Field(0.3333, ge=0, lt=1)
    precision: Literal["fp32", "bf16"] = "fp32"
    global_batch_size: int = Field(96, ge=1)
    num_updates: int = Field(ge=1)
    optimizer: OptimizerConfig = OptimizerConfig()
    decoder_loss: DecoderLossConfig = DecoderLossConfig()
    tracking: TrackingConfig = TrackingConfig()
    runtime: TrainRuntime = TrainRuntime()

    @model_validator(mode="after")
    def _consistent(self) -> "TrainConfig":
        legal = legal_world_sizes(self.global_batch_size, self.runtime.micro_batch_size)
        if self.runtime.num_workers not in legal:
            raise ValueError(
                f"a global batch of {self.global_batch_size} in micro-batches of {self.runtime.micro_batch_size} "
                f"can be shared by runtime.num_workers = {', '.join(map(str, legal)) or 'none'}"
            )
        if self.t_min >= self.t_max:
            raise ValueError(f"t_min ({self.t_min}) must be below t_max ({self.t_max})")
        return self
