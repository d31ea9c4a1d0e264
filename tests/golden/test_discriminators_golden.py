"""Both discriminators against numbers recorded from the published code."""

from pathlib import Path

import numpy as np
import torch

from training.models import PatchDiscriminator
from training.models.judges.discriminators import DiscriminatorHead

DATA = Path(__file__).parent / "data"
NAMES = {
    "main.0.": "enter.",
    "main.1.fn.": "mix.",
    "cls.": "classify.",
    "cmapper.weight": "map_weight",
    "cmapper.bias": "map_bias",
    "weight_orig": "parametrizations.weight.original",
    "weight_u": "parametrizations.weight.0._u",
    "weight_v": "parametrizations.weight.0._v",
}


def test_patch_discriminators_logits() -> None:
    """The recording's weights are a formula over the parameters in their order (data/ccsr: v1_stage2_loss)."""
    with np.load(DATA / "ccsr" / "v1_stage2_loss.npz") as arrays:
        image, expected = torch.from_numpy(arrays["gt"]), torch.from_numpy(arrays["logits_real"])
    discriminator = PatchDiscriminator(ndf=64, n_layers=3)
    with torch.no_grad():
        for index, (name, parameter) in enumerate(discriminator.named_parameters()):
            wave = np.sin(0.37 * np.arange(parameter.numel()) + index)
            if parameter.dim() == 1:
                wave = 1 + 0.1 * wave if name.endswith("weight") else 0.02 * wave
            else:
                wave = wave * np.sqrt(1.5 / (parameter.numel() / parameter.shape[0]))
            parameter.copy_(torch.from_numpy(wave.reshape(parameter.shape)))
        logits = discriminator(image)
    assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_projected_discriminators_head() -> None:
    with np.load(DATA / "models" / "v2_dischead.npz") as arrays:
        recording = {key: torch.from_numpy(arrays[key]) for key in arrays.files}
    x, c, expected = (recording.pop(key) for key in ("x", "c", "out"))
    head = DiscriminatorHead(64, 32).eval()
    state = {}
    for key, value in recording.items():
        for old, new in NAMES.items():
            key = key.replace(old, new)
        state[key] = value
    head.load_state_dict(state)
    with torch.no_grad():
        assert (head(x, c) - expected).abs().max() <= 1e-5 * expected.abs().max()
