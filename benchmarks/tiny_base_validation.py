"""A tiny base on its validation photographs: its VAE, both chains, and stage 2 under several settings.

`python -m benchmarks.tiny_base_validation MODEL --photos FOLDER --out FOLDER --stage2 decoder_loss.gan_weight=0.5`.
Settings are chosen by this, never by held-out photographs.
"""

import argparse
import copy
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.pretrain import PretrainConfig, as_tensor, draw_crop, load_photos
from degradation.pipeline import degrade
from degradation.presets import load_preset
from evaluation import l_std, niqe, psnr_y
from infra.config import load_config
from infra.imaging.pictures import resized
from infra.imaging.pixels import gradient_energy, grey_levels, l_std_equal_sharpness
from infra.seeding import rng_for
from training.config import SamplingConfig, TrainConfig
from training.data.batches import Batch
from training.data.samples import SAMPLED
from training.models import CcsrModel, load_model, save_model
from training.restore.seeded_runs import decode_images, prepare_image, sample_rows
from training.run.step.stages import DecoderStage

CONFIG = Path(__file__).with_name("pretrain.yaml")
STAGE2 = CONFIG.parents[1] / "configs" / "demo" / "train_stage2.yaml"
NIQE_PX = 200  # two blocks of 96 px inside a border of 4
CHAINS = {"uniform": SamplingConfig(sampler="uniform"), "truncated": SamplingConfig()}


def pairs_of(photos: Sequence[np.ndarray], size: int, count: int, purpose: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """(hr, lr) of `count` detailed crops, the photographs in turn."""
    degradation, found = load_preset("ccsr"), []
    for index in range(count):
        rng = rng_for(0, "validation", purpose, index)
        pair = degrade(np.ascontiguousarray(draw_crop([photos[index % len(photos)]], size, rng)), degradation, rng)
        found.append((pair.hr, pair.lr))
    return found


class Scores:
    """Rows of one table: means over the images, and ratios to the truncated chain, image by image."""

    def __init__(self, pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> None:
        self.hrs = [hr for hr, _ in pairs]
        self.bicubic = [resized(lr, hr.shape[:2]) for hr, lr in pairs]
        self.reference: np.ndarray | None = None  # truncated's rows
        names = "PSNR-Y, minus bicubic's, energy / bicubic's, NIQE, L-STD, at equal sharpness"
        names += ", energy / truncated's (images), L-STD, at equal sharpness"
        print(f"| | {names.replace(', ', ' | ')} |\n|{'---|' * 10}")

    def row(self, name: str, runs_of: Sequence[list[np.ndarray]], reference: bool = False) -> None:
        rows = []
        for hr, bicubic, runs in zip(self.hrs, self.bicubic, runs_of, strict=True):
            # Not a number where the runs are less sharp than bicubic.
            stability = (l_std(runs), l_std_equal_sharpness(runs, bicubic)) if len(runs) > 1 else (np.nan, np.nan)
            energies = [gradient_energy(grey_levels(image)) for image in (bicubic, *runs)]
            energy = np.mean(energies[1:]) / energies[0]
            psnr = np.mean([psnr_y(run, hr) for run in runs])
            scores = np.mean([niqe(r) for r in runs]) if hr.shape[0] >= NIQE_PX else np.nan
            rows.append((psnr, psnr - psnr_y(bicubic, hr), energy, scores, *stability))
        found = np.array(rows)
        if reference:
            self.reference = found
        cells = [f"{found[:, i].mean():{form}}" for i, form in enumerate((".2f", "+.2f", ".2f", ".2f", ".4f", ".4f"))]
        if self.reference is not None:
            ratios = found[:, [2, 4, 5]] / self.reference[:, [2, 4, 5]]
            cells += [f"{np.nanmean(column):.2f} ({np.isfinite(column).sum()})" for column in ratios.T]
        print(f"| {' | '.join([name, *cells])} |", flush=True)


@torch.no_grad()
def stage2_batch(stage: DecoderStage, photos: Sequence[np.ndarray], count: int) -> Batch:
    """Crops with what the truncated chain makes of them, so that every setting starts from the same latents."""
    pairs = pairs_of(photos, stage.config.crop_px, count, "stage2")
    hr = as_tensor([hr for hr, _ in pairs], "cpu")
    lr = as_tensor([resized(lr, hr.shape[:2]) for hr, lr in pairs], "cpu")
    latents = []
    for rows in torch.arange(count).split(32):
        batch = Batch([""] * len(rows), rows.tolist(), hr[rows], lr[rows])
        latents.append(stage.sampled_latents(batch))
    return Batch([""] * count, list(range(count)), hr, lr, {SAMPLED: torch.cat(latents)})


def fine_tuned(model: CcsrModel, config: TrainConfig, crops: Batch) -> CcsrModel:
    """A copy of `model` after stage 2's updates on `crops`, in one process and without DeepSpeed."""
    model = copy.deepcopy(model)
    stage = DecoderStage(model, config)
    rate, betas = config.optimizer.learning_rate, config.optimizer.betas
    critic = stage.critic
    generator = torch.optim.AdamW(stage.trained.parameters(), rate, betas, weight_decay=0.0)
    adversary = torch.optim.AdamW(critic.trained.parameters(), critic.learning_rate, betas, weight_decay=0.0)
    order = rng_for(config.seed, "stage2 order")
    for update in range(config.num_updates):
        rows = order.permutation(len(crops.keys))[: config.global_batch_size].tolist()
        batch = Batch([""] * len(rows), rows, crops.hr[rows], crops.lr[rows], {SAMPLED: crops.moments[SAMPLED][rows]})
        generator.zero_grad()
        stage(batch, update)["loss"].backward()
        generator.step()
        adversary.zero_grad()
        critic.loss().backward()
        adversary.step()
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--photos", required=True)
    parser.add_argument("--out", type=Path, required=True, help="for reduced photographs and stage 2's models")
    parser.add_argument("--size", type=int, default=128, help="px of the crops; NIQE needs 200")
    parser.add_argument("--num-images", type=int, default=8)
    parser.add_argument("--num-runs", type=int, default=3)
    parser.add_argument("--num-crops", type=int, default=96, help="crops that stage 2 trains on")
    parser.add_argument("--chains", nargs="+", default=["truncated", "uniform"], choices=list(CHAINS))
    parser.add_argument("--stage2", nargs="*", default=[], metavar="FIELD=VALUE,...", help="of the demo's config")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    pretraining = load_config(CONFIG, PretrainConfig, [f"photos={arguments.photos}"])
    model = load_model(arguments.model)
    for network in model.networks.values():
        network.requires_grad_(False)
    pairs = pairs_of(
        load_photos(pretraining, "validation", arguments.out), arguments.size, arguments.num_images, "score"
    )
    scores = Scores(pairs)
    scores.row("bicubic", [[image] for image in scores.bicubic])
    images = [
        prepare_image(model, lr, hr.shape[:2], CHAINS["truncated"], key=f"{i}") for i, (hr, lr) in enumerate(pairs)
    ]

    def decoded(model: CcsrModel, latents: Sequence[Tensor]) -> list[list[np.ndarray]]:
        sets = zip(latents, images, strict=True)
        return [list(decode_images(model, z, [image] * len(z), CHAINS["truncated"])) for z, image in sets]

    with torch.no_grad():
        own = [model.encode_moments(as_tensor([hr], "cpu"))[0] for hr, _ in pairs]
        reconstructed = [model.decode(z) for z in own]
    scores.row("VAE of the ground truth", [[_levels(image)] for image in reconstructed])
    scores.row("decode(z_lr)", decoded(model, [image.mean for image in images]))
    latents = {}
    for name in arguments.chains:
        rows = [[(image, run) for run in range(arguments.num_runs)] for image in images]
        latents[name] = [sample_rows(model, row, CHAINS[name], 0) for row in rows]
        scores.row(name, decoded(model, latents[name]), reference=name == "truncated")
    configs = {text: load_config(STAGE2, TrainConfig, text.split(",")) for text in arguments.stage2}
    for text, config in configs.items():
        if text == arguments.stage2[0]:
            photos = load_photos(pretraining, "train", arguments.out)
            crops = stage2_batch(DecoderStage(copy.deepcopy(model), config), photos, arguments.num_crops)
        tuned = fine_tuned(model, config, crops)
        scores.row(text, decoded(tuned, latents["truncated"]))
        save_model(tuned.to(dtype=torch.float16), arguments.out / "stage2" / text)


def _levels(image: Tensor) -> np.ndarray:
    return ((image[0].permute(1, 2, 0) + 1) * 127.5).round().clamp(0, 255).byte().numpy()


if __name__ == "__main__":
    main()
