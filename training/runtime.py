"""What users write about how a training job runs."""

from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from infra.config import Config
from infra.process.ray_runtime import RayConfig


class WorkerRange(Config):
    """As many workers as the cluster can give: the largest legal world size from `min` to `max`."""

    min: int = Field(ge=1)
    max: int = Field(ge=1)

    @model_validator(mode="after")
    def _ordered(self) -> "WorkerRange":
        if self.min > self.max:
            raise ValueError(f"min ({self.min}) is above max ({self.max})")
        return self


class TrainRuntime(Config):
    """How the job runs. No field here changes the result beyond rounding, except stage 2's `micro_batch_size`.

    Stage 2 computes three things per micro-batch: BatchNorm's statistics (`discriminator: patch`), the adaptive GAN
    weight and the division of nll by N. There the micro-batch is part of the fingerprint and stays fixed; the number
    of workers may change in every stage, since all legal ones see the same micro-batches.
    """

    ray: RayConfig = RayConfig()
    num_workers: Annotated[
        Annotated[int, Field(ge=1), Tag("number")] | Annotated[WorkerRange, Tag("range")],
        Discriminator(lambda value: "range" if isinstance(value, dict | WorkerRange) else "number"),
    ] = Field(1, description="or {min, max}: as many as the cluster can give")
    micro_batch_size: int = Field(4, ge=1, description="samples of a forward pass; part of stage 2's result")
    zero_stage: Literal[0, 1, 2] = 1
    offload_optimizer: bool = Field(False, description="masters and moments in the host's memory, updated on its CPU")
    device: Literal["cpu", "cuda"] = "cpu"
    threads: int = Field(1, ge=1, description="torch threads of a CPU worker")
    activation_checkpointing: bool = Field(False, description="compute activations twice, keep fewer: less memory")
    compile: bool = Field(False, description="torch.compile of the transformer blocks; takes minutes at the start")
    channels_last: bool = Field(False, description="frozen convolution weights in channels-last order")
    join_passes: bool = Field(False, description="CCSR's stage 1: t and T in one pass of the networks: more memory")
    encode_ahead: bool = Field(
        False,
        description="the update's next micro-batch goes through the VAE on a GPU's second stream: more memory",
    )
    profile: bool = Field(False, description="rank 0 profiles a few updates into OUT/profile")
    ingest_cpus: int = Field(0, ge=0, description="CPUs anywhere that prepare one worker's samples; 0: its own threads")
    prefetch_batches: int = Field(2, ge=1, description="global batches that are prepared ahead")
    log_every: int = Field(1, ge=1, description="updates between two points in MLflow")
    checkpoint_every: int = Field(500, ge=1, description="updates between two checkpoints; the last always has one")
    keep_checkpoints: int = Field(2, ge=2, description="the newest ones; the best validated one stays too")
    export_every: int = Field(0, ge=0, description="every k-th checkpoint also as a model directory; 0: none")
    export_raw: bool = Field(False, description="with `ema`: the weights that it averages too, as OUT/model_raw")
    max_restarts: int = Field(3, ge=0, description="restarts from the last checkpoint after a worker was lost")
    collective_timeout_seconds: int = Field(600, ge=10, description="ranks that wait longer for another one give up")

    @property
    def workers(self) -> WorkerRange:
        """The fewest and the most."""
        number = self.num_workers
        return number if isinstance(number, WorkerRange) else WorkerRange(min=number, max=number)

    def unused(self) -> dict[str, str]:
        return {"threads": "on a GPU"} if self.device == "cuda" else {}


def legal_world_sizes(global_batch_size: int, micro_batch_size: int) -> list[int]:
    """The divisors of global_batch_size / micro_batch_size; none if that is not whole."""
    num_micro, rest = divmod(global_batch_size, micro_batch_size)
    return [] if rest else [size for size in range(1, num_micro + 1) if num_micro % size == 0]
