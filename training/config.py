"""What users write about models: which networks, how to sample from them, how to train them."""

from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import BeforeValidator, Field, model_validator

from degradation.config import DegradationConfig
from infra.config import EXTENDABLE, LATER, Config, FieldError, Location, ModelLocation
from infra.mlflow.server import TrainTracking
from infra.process.numerics import NumericsConfig
from training.objective import DecoderLossConfig, VsdConfig
from training.optimizer import EmaConfig, OptimizerConfig
from training.runtime import TrainRuntime, legal_world_sizes

SizeRule = Literal["pad", "v1", "v1_tiled", "v2"]

# StableSR-S200 of the paper's tables: from noise, as the published benchmark script does.
SAMPLING_PRESETS: dict[str, dict[str, Any]] = {
    "stablesr_s200": {"sampler": "uniform", "num_steps": 200, "start": "noise", "enlargement": "bilinear"}
}


class Family(NamedTuple):
    """What the schemas know of a method: the fields that have an effect. What it computes is in `training.method`."""

    trains: dict[int, set[str]]  # of TrainConfig's fields that not every stage uses, by stage
    samples: set[str]  # of SamplingConfig's fields that not every method uses
    adapter: str = "controlnet"  # the part that shows the UNet the LR latent
    stores_samples: bool = False  # stage 2 can start from latents that the shards store
    frozen_decoder: bool = False  # no stage trains the VAE's decoder
    decoder: str = "vae"  # the network that stage 2 trains
    decoder_parts: tuple[str, ...] = ("decoder",)  # the parts of it that are trained; none: all


_CHAIN = {"sampler", "num_steps"}
_STAGE2 = {"inputs", "num_steps", "t_max", "t_min", "decoder_loss"}
FAMILIES = {
    "v1": Family(
        trains={0: {"inputs"}, 1: {"inputs", "start_from", "t_max"}, 2: _STAGE2},
        samples={*_CHAIN, "t_max", "t_min"},
        decoder_parts=("decoder", "post_quant_conv"),
    ),
    "v2": Family(
        trains={0: {"inputs"}, 1: {"inputs", "start_from", "t_max"}, 2: {*_STAGE2, "start_from"}},
        samples={*_CHAIN, "t_max", "t_min", "start"},
    ),
    "stablesr": Family(
        trains={1: {"inputs"}, 2: {"inputs", "num_steps", "decoder_loss"}},
        samples={"num_steps", "start", "wrapping"},
        adapter="adapter",
        stores_samples=True,
        frozen_decoder=True,
        decoder="wrapping",
        decoder_parts=(),
    ),
    "onestep": Family(trains={1: {"decoder_loss", "vsd"}}, samples=set(), adapter="lora", frozen_decoder=True),
}


class ModelConfig(Config):
    """Which networks. `family` says whose habits the weights were trained with: v1 conditions on the posterior's mean,
    v2 on a sample of it; stablesr and onestep (OSEDiff) are other methods. `prediction` is what the UNet puts out:
    noise, or the velocity of Salimans & Ho (2022). `custom` marks converted networks of another size; it can be loaded,
    not built."""

    preset: Literal["tiny", "sd21", "custom"] = "tiny"
    family: Literal["v1", "v2", "stablesr", "onestep"] = "v2"
    prediction: Literal["eps", "v"] = "eps"

    @property
    def facts(self) -> Family:
        return FAMILIES[self.family]


class SamplingConfig(Config):
    """How a model restores; or a preset's name. `ccsr`: the truncated chain of the model's family (StableSR has none
    and takes the whole one, OSEDiff takes one step); `uniform`: conventional DDPM over the whole chain."""

    sampler: Literal["ccsr", "uniform"] = "ccsr"
    num_steps: int = Field(45, ge=1, description="steps of the whole chain")
    t_max: float = Field(0.6667, gt=0, le=1)
    t_min: float = Field(0.3333, ge=0, lt=1)
    start: Literal["lr", "noise"] = Field("lr", description="v2's and StableSR's start point; v1's is noise")
    wrapping: float = Field(0.5, ge=0, le=1, description="StableSR's w: how far the decoder follows the LR's features")
    enlargement: Literal["bicubic", "bilinear"] = Field("bicubic", description="of the LR, where sizes is `pad`")
    color_fix: Literal["adain", "wavelet", "none"] = "adain"
    tile: int | None = Field(None, ge=64, description="px; larger images are denoised in overlapping tiles")
    sizes: SizeRule = Field("pad", description="pad by reflection, or a published script's rule")
    guidance: float = Field(1, ge=1, description="classifier-free guidance scale; 1: none")
    prompt: str = Field("", description="a text whose embedding the model directory caches")
    negative_prompt: str = ""

    @model_validator(mode="before")
    @classmethod
    def _from_preset(cls, value: Any) -> Any:
        if isinstance(value, str) and value not in SAMPLING_PRESETS:
            raise ValueError(f"no sampling preset is called {value!r}; there are {', '.join(SAMPLING_PRESETS)}")
        return SAMPLING_PRESETS[value] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _ordered(self) -> "SamplingConfig":
        if self.t_min >= self.t_max:
            raise ValueError(f"t_min ({self.t_min}) must be below t_max ({self.t_max})")
        return self

    def unused(self) -> dict[str, str]:
        """Beside these, what `check_family` knows."""
        unused = dict.fromkeys(("t_max", "t_min"), "in sampler: uniform") if self.sampler == "uniform" else {}
        return unused if self.sizes == "pad" else unused | {"enlargement": f"with sizes: {self.sizes}"}

    def unused_in_fingerprint(self) -> dict[str, str]:
        return {"negative_prompt": "with guidance: 1"} if self.guidance == 1 else {}

    def check_family(self, family: str) -> Self:
        """ValueError where a field has no effect on a model of this family. A preset may name its sampler anywhere."""
        used = FAMILIES[family].samples
        unused = set().union(*(other.samples for other in FAMILIES.values())) - used
        if self in [type(self).model_validate(preset) for preset in SAMPLING_PRESETS]:
            unused -= {"sampler"}
        places = dict.fromkeys(sorted(unused), f"on a model of family {family}")
        if self.sampler == "uniform" and "sampler" in used:
            places["start"] = f"in sampler: uniform of family {family}, which starts from noise"
        for name, where in places.items():
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"`{name}` has no effect {where}")
        return self


class ValidationConfig(Config):
    """Held-out pairs that are restored every `every` updates and after the last one."""

    data: Annotated[tuple[Location, ...], Field(min_length=1, description="shard sets with HR and LR images")]
    every: int = Field(500, ge=1)
    num_images: int = Field(8, ge=1, description="spread evenly over the sets")
    num_runs: int = Field(2, ge=2, description="seeded runs per image; L-STD needs two")
    best_by: Literal["psnr_y", "lpips", "dists", "l_std", "l_std_equal_sharpness"] | None = Field(
        "psnr_y", description="whose best checkpoint is kept; PSNR prefers blur; none: none"
    )
    sampling: SamplingConfig | None = Field(None, description="none: the chain that the stage trains")


class TrainingSet(Config):
    """A shard set, or WebDataset tars that others made (a tar, or braces: `{000..099}.tar`), and how often an epoch
    takes each of its samples, on average. May be written as its path alone."""

    path: Location
    weight: float = Field(1.0, gt=0, allow_inf_nan=False)
    degradation: Annotated[str | DegradationConfig | None, LATER] = Field(
        None, description="of this set; none: the run's"
    )

    @model_validator(mode="before")
    @classmethod
    def _from_path(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value


class TrainConfig(Config):
    """One stage. CCSR's 0: noise prediction (v2's start, and the conventional model); 1: NUTL; 2: the decoder.
    StableSR's 1: noise prediction by encoder and modulation; 2: controllable feature wrapping. OSEDiff has 1."""

    job: Literal["train"]
    output: Location
    seed: int = 0
    stage: Literal[0, 1, 2]
    data: Annotated[tuple[TrainingSet, ...], Field(min_length=1, description="shard sets, or {path, weight}")]
    inputs: Literal["pixels", "latents"] = Field("pixels", description="latents: those that the shards store")
    init_from: Annotated[ModelLocation | None, BeforeValidator(lambda place: None if place == "random" else place)] = (
        Field(description="a model or run's folder, runs:/ID, models:/NAME@ALIAS, hub id; `random` for random weights")
    )
    continue_from: Location | None = Field(
        None, description="RUN[@POSITION]: begin with another run's checkpoint: weights, moments, position"
    )
    model: ModelConfig = ModelConfig()
    crop_px: int = Field(512, ge=32)
    degradation: str | DegradationConfig | None = Field(None, description="of sets without one; none: the stored LR")
    prompt: Annotated[Literal["empty", "caption"], LATER] = Field(
        "empty", description="what the UNet reads; caption: each sample's own (KEY.txt), by the base's text tower"
    )
    prompt_drop_rate: Annotated[float, LATER] = Field(
        0.1, ge=0, lt=1, description="share of samples that keep the empty prompt, for guidance"
    )
    start_from: Literal["hr", "lr"] = Field("hr", description="which latent is noised to T")
    num_steps: int = Field(45, ge=1, description="stage 2: steps of the whole chain (CCSR truncates it)")
    t_max: float = Field(0.6667, gt=0, le=1)
    t_min: float = Field(0.3333, ge=0, lt=1)
    precision: Literal["fp32", "bf16"] = "fp32"
    numerics: NumericsConfig = NumericsConfig()
    global_batch_size: int = Field(96, ge=1)
    num_updates: Annotated[int, EXTENDABLE] = Field(ge=1)
    optimizer: OptimizerConfig = OptimizerConfig()
    ema: Annotated[EmaConfig | None, LATER] = None
    decoder_loss: DecoderLossConfig = DecoderLossConfig()
    vsd: Annotated[VsdConfig | None, LATER] = Field(None, description="in the GAN term's place")
    validation: ValidationConfig | None = None
    tracking: TrainTracking = TrainTracking()
    runtime: TrainRuntime = TrainRuntime()

    def runtime_in_result(self) -> dict[str, Any]:
        return {"micro_batch_size": self.runtime.micro_batch_size} if self.learns_images else {}

    @model_validator(mode="after")
    def _consistent(self) -> "TrainConfig":
        size, micro = self.global_batch_size, self.runtime.micro_batch_size
        if size % micro:
            near = [n for n in (size - size % micro, size - size % micro + micro) if n]
            raise FieldError(
                f"a global batch of {size} samples is not a multiple of runtime.micro_batch_size, {micro}",
                field="global_batch_size",
                todo=f"write {' or '.join(map(str, near))}, or another micro_batch_size",
            )
        legal = legal_world_sizes(size, micro)
        for number in {self.runtime.workers.min, self.runtime.workers.max} - set(legal):
            raise FieldError(
                f"{number} workers cannot share a global batch of {size} in micro-batches of {micro}",
                field="runtime.num_workers",
                todo=f"write one of {', '.join(map(str, legal))}",
            )
        if self.precision == "bf16" and self.runtime.zero_stage == 0:
            raise ValueError(
                "under runtime.zero_stage 0 DeepSpeed accumulates bf16 gradients in bf16: use zero_stage 1 or 2"
            )
        if self.optimizer.schedule.factor(self.num_updates - 1) == 0:
            raise FieldError(
                f"the learning rate is 0 before the last of {self.num_updates} updates",
                field="optimizer.schedule",
                todo=f"write `until: {self.num_updates}`, or a `lowest` above 0",
            )
        if self.runtime.join_passes and (self.stage != 1 or "start_from" in self.unused()):
            raise ValueError("`runtime.join_passes` has an effect in CCSR's stage 1 alone: leave it out")
        if self.runtime.encode_ahead and (self.inputs == "latents" or "inputs" in self.unused()):
            raise ValueError("`runtime.encode_ahead` has no effect where no frozen VAE encodes: leave it out")
        if self.runtime.compile and self.starts_from_stored_samples and self.validation is None:
            raise ValueError("`runtime.compile` has no effect where no transformer computes: leave it out")
        if self.runtime.export_raw and self.ema is None:
            raise ValueError("`runtime.export_raw` has no effect without `ema`: leave it out")
        if self.runtime.offload_optimizer and self.runtime.zero_stage == 0:
            raise ValueError("runtime.offload_optimizer needs the partitions of runtime.zero_stage 1 or 2")
        if self.t_min >= self.t_max and "t_min" not in self.unused():
            raise ValueError(f"t_min ({self.t_min}) must be below t_max ({self.t_max})")
        if self.learns_images and self.model.facts.frozen_decoder and self.vsd is None and self.decoder_loss.adapts:
            raise ValueError(
                f"the decoder of family {self.model.family} is frozen, so its GAN weight cannot adapt: "
                "decoder_loss.adaptive: false"
            )
        gan = [n for n in DecoderLossConfig.model_fields if n.split("_")[0] in ("gan", "discriminator", "adaptive")]
        for name in gan if self.vsd else ():
            if getattr(self.decoder_loss, name) != DecoderLossConfig.model_fields[name].default:
                raise ValueError(f"`vsd` takes the GAN term's place: leave decoder_loss.{name} out")
        if self.vsd and self.vsd.prompt and self.prompt == "caption":
            raise ValueError("`prompt: caption` takes the place of vsd.prompt: leave it out")
        if self.validation is not None:
            (self.validation.sampling or self.trained_sampling).check_family(self.model.family)
        on_dino = self.learns_images and self.decoder_loss.discriminator == "dino" and self.runtime.device == "cuda"
        if self.numerics.deterministic and on_dino:
            raise ValueError(
                "`discriminator: dino` reduces images by area, whose backward no GPU computes deterministically: "
                "numerics.deterministic: false"
            )
        if self.inputs == "latents" and (self.degradation or any(part.degradation for part in self.data)):
            raise ValueError("`inputs: latents` are of the LR that the shards store: leave `degradation` out")
        return self

    def unused(self) -> dict[str, str]:
        family, trains = self.model.family, self.model.facts.trains
        if self.stage not in trains:
            raise ValueError(f"a model of family {family} has the stages {', '.join(map(str, trains))}")
        every = {"inputs", "start_from", "num_steps", "t_max", "t_min", "decoder_loss", "vsd"}
        unused = every - trains[self.stage]
        if self.starts_from_stored_samples:  # nothing but the decoder computes
            unused |= {"num_steps", "prompt", "prompt_drop_rate"}
        where = f"in stage {self.stage} of family {family}"
        rate = {"prompt_drop_rate": "with prompt: empty"} if self.prompt == "empty" else {}
        return rate | dict.fromkeys(sorted(unused), where)

    def unused_in_fingerprint(self) -> dict[str, str]:
        return {"degradation": "where every set has its own"} if all(part.degradation for part in self.data) else {}

    @property
    def best_by(self) -> str | None:
        return self.validation.best_by if self.validation else None

    @property
    def trained_sampling(self) -> SamplingConfig:
        """How the stage's model is meant to restore: stage 0's is a conventional diffusion model."""
        if self.stage == 0:
            return SamplingConfig(sampler="uniform")
        facts = self.model.facts
        trained = facts.samples & facts.trains[self.stage]
        return SamplingConfig.model_validate({name: getattr(self, name) for name in trained})

    @property
    def learns_images(self) -> bool:
        """Whether the loss is on images, with a second network that judges them under its own optimiser."""
        return "decoder_loss" in self.model.facts.trains[self.stage]

    @property
    def starts_from_stored_samples(self) -> bool:
        """Whether stage 2 reads its latents from the shards instead of running the chain."""
        return self.stage == 2 and self.inputs == "latents" and self.model.facts.stores_samples
