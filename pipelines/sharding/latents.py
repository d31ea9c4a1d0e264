"""Stored latents: the moments of HR and condition by a model's encoders, and what a StableSR model makes of the LR."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import islice

import numpy as np

from infra.errors import ConfigError
from infra.seeding import noise_for
from pipelines.sharding.config import LatentsConfig
from pipelines.sharding.sample import Sample
from training.config import SamplingConfig
from training.data.batches import enlarge
from training.data.samples import LATENT_MOMENTS, SAMPLED
from training.models import CcsrModel, fetch_model
from training.restore.seeded_runs import sample_latents


class LatentEncoder:
    """The encoders of a model directory, float32, on CPU or GPU; all of it where it is to sample too."""

    def __init__(self, config: LatentsConfig, device: str, seed: int = 0) -> None:
        model = fetch_model(config.model)
        self.encoder_id = model.encoder_id()
        self.factor = model.factor
        self._batch_size, self._device, self._seed = config.batch_size, device, seed
        self._sampling = None
        if config.sampled_steps:
            if not model.config.facts.stores_samples:
                raise ConfigError(
                    f"only StableSR's stage 2 takes sampled latents, this model is of family {model.config.family}",
                    where="latents.sampled_steps",
                    todo="leave it out; CCSR's stage 2 makes its few steps as it trains",
                )
            self._sampling = SamplingConfig(sampler="uniform", num_steps=config.sampled_steps, start="lr")
        # Only the encoders are kept; the UNet of the full model is six times as large.
        self._model = (model if self._sampling else _encoders(model)).to(device)

    def __call__(self, samples: Iterable[Sample]) -> Iterator[Sample]:
        """The samples in order, each with its member latent.safetensors before its json.

        Batches are consecutive samples, so their composition and the bytes depend on the plan alone.
        """
        pending = iter(samples)
        while batch := list(islice(pending, self._batch_size)):
            for sample, data in zip(batch, self._encode(batch), strict=True):
                members = dict(sample.members)
                facts = members.pop("json")
                yield replace(sample, members={**members, "latent.safetensors": data, "json": facts})

    def _encode(self, batch: list[Sample]) -> list[bytes]:
        import torch
        from safetensors.numpy import save

        hr = np.stack([sample.hr for sample in batch])
        lr = np.stack([_enlarged(sample) for sample in batch])
        with torch.inference_mode():
            images = [torch.from_numpy(a).to(self._device).permute(0, 3, 1, 2).float() / 255 for a in (hr, lr)]
            moments = [*self._model.encode_moments(images[0]), *self._model.encode_condition(images[1])]
            if self._sampling:
                keys = [("latent", sample.key) for sample in batch]
                noise = noise_for(self._seed, keys, self._device, torch.float32)
                moments.append(sample_latents(self._model, moments[2], moments[3], self._sampling, noise))
        names = (*LATENT_MOMENTS, SAMPLED)[: len(moments)]
        # safetensors writes memory in its order, and a convolution may leave it channels last.
        arrays = [np.ascontiguousarray(moment.half().cpu().numpy()) for moment in moments]
        return [save({name: a[i] for name, a in zip(names, arrays, strict=True)}) for i in range(len(batch))]


def _enlarged(sample: Sample) -> np.ndarray:
    height, width = sample.hr.shape[:2]
    condition = sample.hr if sample.condition is None else sample.condition
    return condition if condition.shape == sample.hr.shape else enlarge(condition, height, width)


def _encoders(model: CcsrModel) -> CcsrModel:
    from torch import nn

    model.vae.decoder = nn.Identity()
    return replace(model, unet=nn.Identity(), adapter=nn.Identity())
