"""What `ccsr train` may be asked for."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from degradation import DegradationConfig
from infra.config import EXTENDABLE, Config, Location
from infra.ray_runtime import RayConfig
from infra.tracking import TrackingConfig
from training.models import ModelConfig
from training.order import legal_world_sizes
from training.restore import SamplingConfig


class OptimizerConfig(Config):
    """AdamW. The defaults are v2's stage 1 (train_ccsr_stage1.py)."""

    learning_rate: float = Field(5e-5, gt=0)
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = Field(1e-2, ge=0)
    clip_norm: float = Field(1.0, ge=0, description="0: no clipping")
    warmup_updates: int = Field(0, ge=0)


class DecoderLossConfig(Config):
    """Stage 2's loss; see `training.generator_loss`. Defaults: v1's, but with a perceptual term that needs no file and
    a discriminator that learns from update 0 on (v1: 1).

    v2: l2, lpips, dino, gan_weight 0.05, neither adaptive nor divided, both terms from update 101 on. StableSR: l1,
    lpips, patch, gan_weight 0.025, not adaptive, GAN term and discriminator from update 501 on.
    """

    reconstruction: Literal["l1", "l2"] = "l1"
    perceptual: Literal["lpips", "encoder_features", "none"] = "encoder_features"
    perceptual_start_update: int = Field(0, ge=0, description="updates before this one train without that term")
    discriminator: Literal["patch", "dino"] = Field("patch", description="PatchGAN (v1) or DINO heads (v2)")
    gan_weight: float = Field(0.5, ge=0)
    adaptive: bool = True
    divide_by_batch: bool = True
    gan_start_update: int = Field(1, ge=0, description="updates before this one train without the GAN term")
    discriminator_start_update: int = Field(0, ge=0, description="before this update the discriminator learns nothing")
    discriminator_width: int = Field(64, ge=4, description="channels of the first PatchGAN layer")
    discriminator_learning_rate: float = Field(5e-6, gt=0)


class TrainRuntime(Config):
    """How the job runs. No field here changes the result beyond rounding, except stage 2's `micro_batch_size`.

    Stage 2 computes three things per micro-batch: BatchNorm's statistics (`discriminator: patch`), the adaptive GAN
    weight and the division of nll by N. There the micro-batch is part of the fingerprint and stays fixed; the number
    of workers may change in every stage, since all legal ones see the same micro-batches.
    """

    ray: RayConfig = RayConfig()
    num_workers: int = Field(1, ge=1)
    micro_batch_size: int = Field(4, ge=1, description="samples of a forward pass; part of stage 2's result")
    zero_stage: Literal[0, 1, 2] = 1
    use_gpu: bool = False
    threads_per_worker: int = Field(1, ge=1, description="torch threads of a CPU worker")
    activation_checkpointing: bool = Field(False, description="compute activations twice, keep fewer: less memory")
    profile: bool = Field(False, description="rank 0 profiles a few updates into OUT/profile")
    ingest_cpus: int = Field(0, ge=0, description="CPUs anywhere that prepare one worker's samples; 0: its own threads")
    prefetch_batches: int = Field(2, ge=1, description="global batches that are prepared ahead")
    log_every: int = Field(1, ge=1, description="updates between two points in MLflow")
    checkpoint_every: int = Field(500, ge=1, description="updates between two checkpoints; the last always has one")
    keep_checkpoints: int = Field(2, ge=1, description="the newest ones; the best validated one stays too")
    export_every: int = Field(0, ge=0, description="every k-th checkpoint also as a model directory; 0: none")
    max_restarts: int = Field(3, ge=0, description="restarts from the last checkpoint after a worker was lost")
    collective_timeout_seconds: int = Field(600, ge=10, description="ranks that wait longer for another one give up")


class ValidationConfig(Config):
    """Held-out pairs that are restored every `every` updates and after the last one."""

    data: Annotated[tuple[Location, ...], Field(min_length=1, description="shard sets with HR and LR images")]
    every: int = Field(500, ge=1)
    num_images: int = Field(8, ge=1, description="spread evenly over the sets")
    num_runs: int = Field(2, ge=2, description="seeded runs per image; L-STD needs two")
    sampling: SamplingConfig | None = Field(None, description="none: the chain that the stage trains")


class TrainingSet(Config):
    """A shard set and how often an epoch takes each of its samples, on average. May be written as its path alone."""

    path: Location
    weight: float = Field(1.0, gt=0, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _from_path(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value


class TrainConfig(Config):
    """One stage. CCSR's 0: noise prediction (v2's start, and the conventional model); 1: NUTL; 2: the decoder.
    StableSR's 1: noise prediction by encoder and modulation; 2: controllable feature wrapping."""

    job: Literal["train"]
    output: Location
    seed: int = 0
    stage: Literal[0, 1, 2]
    data: Annotated[tuple[TrainingSet, ...], Field(min_length=1, description="shard sets, or {path, weight}")]
    inputs: Literal["pixels", "latents"] = Field("pixels", description="latents: those that the shards store")
    init_from: Location | None = Field(None, description="a model directory to start from; none: random weights")
    model: ModelConfig = ModelConfig()
    crop_px: int = Field(512, ge=32)
    degradation: str | DegradationConfig | None = Field(None, description="none: the LR that the shards store")
    start_from: Literal["hr", "lr"] = Field("hr", description="which latent is noised to T")
    num_steps: int = Field(45, ge=1, description="stage 2: steps of the whole chain (CCSR truncates it)")
    t_max: float = Field(0.6667, gt=0, le=1)
    t_min: float = Field(0.3333, ge=0, lt=1)
    precision: Literal["fp32", "bf16"] = "fp32"
    global_batch_size: int = Field(96, ge=1)
    num_updates: Annotated[int, EXTENDABLE] = Field(ge=1)
    optimizer: OptimizerConfig = OptimizerConfig()
    decoder_loss: DecoderLossConfig = DecoderLossConfig()
    validation: ValidationConfig | None = None
    tracking: TrackingConfig = TrackingConfig()
    runtime: TrainRuntime = TrainRuntime()

    def runtime_in_result(self) -> dict[str, Any]:
        return {"micro_batch_size": self.runtime.micro_batch_size} if self.stage == 2 else {}

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
        if self.model.family == "stablesr" and self.stage == 0:
            raise ValueError("StableSR's stages are 1 and 2: its stage 1 is what stage 0 is for CCSR")
        if self.model.family == "stablesr" and self.stage == 2 and self.decoder_loss.adaptive:
            raise ValueError(
                "StableSR's decoder is frozen, so its GAN weight cannot adapt: decoder_loss.adaptive: false"
            )
        if self.inputs == "latents" and self.degradation is not None:
            raise ValueError("`inputs: latents` are of the LR that the shards store: leave `degradation` out")
        return self
