"""The VAE in bands of rows gives the whole image's numbers, whatever the bands' height and wherever activations are."""

import pytest
import torch

from infra import DataError
from training.models import seeded_init
from training.models.library import AutoencoderKL
from training.models.networks import VAE_CONFIGS
from training.restore import banded_vae
from training.restore.banded_vae import check_space, decode_in_bands, encode_in_bands, images_per_pass, plane_bytes

WITH_ATTENTION = VAE_CONFIGS["sd21"] | {"block_out_channels": (32, 32, 64, 64)}
SIZES = {"tiny": (52, 36), "attention": (72, 40)}


@pytest.fixture(scope="module", params=["tiny", "attention"])
def vae(request: pytest.FixtureRequest) -> AutoencoderKL:
    """Norms whose scale and shift differ by channel, so that a mix-up of channels or groups shows."""
    with seeded_init(3):
        vae = AutoencoderKL(**(VAE_CONFIGS["tiny"] if request.param == "tiny" else WITH_ATTENTION)).eval()
        for module in vae.modules():
            if isinstance(module, torch.nn.GroupNorm):
                torch.nn.init.uniform_(module.weight, 0.5, 1.5)
                torch.nn.init.uniform_(module.bias, -0.5, 0.5)
    vae.size = SIZES[request.param]
    return vae


@pytest.fixture
def image(vae: AutoencoderKL) -> torch.Tensor:
    """Brighter at the bottom: statistics of a band are not those of the image."""
    image = torch.rand(1, 3, *vae.size, generator=torch.Generator().manual_seed(0)) * 0.3
    return image + torch.linspace(0, 0.7, vae.size[0])[:, None]


@pytest.mark.parametrize("budget", [0, 100_000, 2**40], ids=["files", "mixed", "memory"])
@pytest.mark.parametrize("band_bytes", [1, 100_000, 2**30], ids=["single rows", "bands", "one band"])
def test_bands_equal_the_whole(
    vae: AutoencoderKL, image: torch.Tensor, budget: int, band_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(banded_vae.BAND_BYTES, "cpu", band_bytes)
    with torch.inference_mode():
        posterior = vae.encode(2 * image - 1).latent_dist
        scale = vae.config.scaling_factor
        mean, std = encode_in_bands(vae, image, budget)
        torch.testing.assert_close(mean, posterior.mean * scale, rtol=0, atol=1e-5)
        torch.testing.assert_close(std, posterior.std * scale, rtol=0, atol=1e-5)
        latents = torch.randn(mean.shape, generator=torch.Generator().manual_seed(1))
        whole = vae.decode(latents / scale).sample
        assert whole.std() > 0.1
        torch.testing.assert_close(decode_in_bands(vae, latents, budget), whole, rtol=0, atol=1e-4)


def test_activations_beyond_the_budget_lie_in_files(
    vae: AutoencoderKL, image: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[int, bool]] = []
    plane = banded_vae.Plane.__init__

    def watched(self, shape, dtype, device, *, in_memory):
        made.append((shape[0] * shape[1] * shape[2] * 4, in_memory))
        plane(self, shape, dtype, device, in_memory=in_memory)

    monkeypatch.setattr(banded_vae.Plane, "__init__", watched)
    largest = plane_bytes(vae, *vae.size)
    encode_in_bands(vae, image, largest // 2)
    sizes = [size for size, _ in made]
    assert max(sizes) <= largest
    assert any(not in_memory for _, in_memory in made)
    assert all(size <= largest // 2 for size, in_memory in made if in_memory)


def test_half_precision_comes_as_close_to_the_exact_numbers_as_the_whole_does(
    image: torch.Tensor, vae: AutoencoderKL
) -> None:
    half = AutoencoderKL(**{k: v for k, v in vae.config.items() if not k.startswith("_")}).eval()
    half.load_state_dict(vae.state_dict())
    torch.nn.Module.to(half, torch.bfloat16)
    with torch.inference_mode():
        exact = vae.encode(2 * image - 1).latent_dist.mean
        whole = half.encode((2 * image - 1).bfloat16()).latent_dist.mean.float()
    bands = encode_in_bands(half, image, 0)[0] / vae.config.scaling_factor
    assert (bands - exact).abs().mean() < 1.5 * (whole - exact).abs().mean()


def test_what_a_size_takes_is_known_before() -> None:
    with torch.device("meta"):
        vae = AutoencoderKL(**VAE_CONFIGS["sd21"])
    assert plane_bytes(vae, 512, 512) == 256 * 512 * 512 * 4  # the last upsampler's output
    assert images_per_pass(vae, 512, 512, banded_vae.VAE_BYTES["cpu"]) == 1
    assert images_per_pass(vae, 520, 512, banded_vae.VAE_BYTES["cpu"]) == 0
    vae.to(dtype=torch.bfloat16)
    assert images_per_pass(vae, 512, 512, banded_vae.VAE_BYTES["cuda"]) == 13
    assert banded_vae.SPILLED_PLANES * plane_bytes(vae, 2048, 2048) < banded_vae.VAE_BYTES["cuda"]
    check_space(vae, 512, 512, 0, where="x")
    with pytest.raises(DataError, match=r"GiB of temporary files") as error:
        check_space(vae, 2**18, 2**18, 0, where="photo.png")
    assert "photo.png" in error.value.where
