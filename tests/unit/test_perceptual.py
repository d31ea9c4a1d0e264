"""LPIPS's structure with seeded weights and published file layout; the VAE encoder's feature distance."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import infra.weights
from infra import ModelError
from training.models import EncoderFeatures, ModelConfig, build_model, load_lpips

LAYERS = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M")


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).clamp(-1, 1)


@pytest.fixture(scope="module")
def vgg() -> nn.Sequential:
    """VGG16's trunk as torchvision lays it out, with seeded weights."""
    layers: list[nn.Module] = []
    previous = 3
    generator = torch.Generator().manual_seed(0)
    for width in LAYERS:
        if isinstance(width, str):
            layers.append(nn.MaxPool2d(2))
        else:
            convolution = nn.Conv2d(previous, width, 3, padding=1)
            convolution.weight.data = (
                torch.randn(convolution.weight.shape, generator=generator) * (2 / (9 * previous)) ** 0.5
            )
            layers += [convolution, nn.ReLU()]
            previous = width
    return nn.Sequential(*layers).requires_grad_(False)


@pytest.fixture
def folder(tmp_path: Path, vgg: nn.Sequential, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A weights folder with both files in their published layout; their sha256 stands in for the published one."""
    trunk = {f"features.{key}": value for key, value in vgg.state_dict().items()}
    torch.save({**trunk, "classifier.0.bias": torch.zeros(3)}, tmp_path / "vgg16-397923af.pth")
    heads = {
        f"lin{index}.model.1.weight": draw(1, width, 1, 1, seed=index).abs()
        for index, width in enumerate((64, 128, 256, 512, 512))
    }
    torch.save(heads, tmp_path / "lpips_v0.1_vgg.pth")
    known = {file.path: file for file in infra.weights.weight_files()}
    monkeypatch.setattr(infra.weights, "weight_files", lambda: [_unhashed(file) for file in known.values()])
    return tmp_path


def _unhashed(file: infra.weights.WeightFile) -> infra.weights.WeightFile:
    return infra.weights.WeightFile(**{**vars(file), "sha256": None})


def test_lpips_is_its_definition(folder: Path, vgg: nn.Sequential) -> None:
    lpips = load_lpips(str(folder))
    heads = torch.load(folder / "lpips_v0.1_vgg.pth", weights_only=True)
    a, b = draw(2, 3, 48, 32), draw(2, 3, 48, 32, seed=1)
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    x, y = ((image - shift[:, None, None]) / scale[:, None, None] for image in (a, b))
    expected = torch.zeros(2)
    stage = 0
    for index, layer in enumerate(vgg):
        x, y = layer(x), layer(y)
        if index in (3, 8, 15, 22, 29):  # relu1_2, 2_2, 3_3, 4_3, 5_3
            unit_x, unit_y = F.normalize(x, dim=1), F.normalize(y, dim=1)
            weight = heads[f"lin{stage}.model.1.weight"]
            expected += (weight * (unit_x - unit_y) ** 2).sum(1).mean((1, 2))
            stage += 1
    found = lpips(a, b)
    assert found.shape == (2, 1, 1, 1)
    torch.testing.assert_close(found.flatten(), expected, rtol=1e-4, atol=0)
    assert not lpips(a, a).any()


def test_lpips_is_frozen_and_passes_gradients(folder: Path) -> None:
    lpips = load_lpips(str(folder))
    assert not any(parameter.requires_grad for parameter in lpips.parameters())
    a = draw(1, 3, 32, 32).requires_grad_()
    lpips(a, draw(1, 3, 32, 32, seed=1)).mean().backward()
    assert a.grad.abs().max() > 0


def test_a_wrong_or_missing_file_is_named(folder: Path) -> None:
    torch.save({"features.0.weight": torch.zeros(64, 3, 3, 3)}, folder / "vgg16-397923af.pth")
    with pytest.raises(ModelError, match=r"tensor features\.0\.bias is missing"):
        load_lpips(str(folder))
    (folder / "lpips_v0.1_vgg.pth").unlink()
    with pytest.raises(ModelError, match="ccsr weights fetch lpips-vgg"):
        load_lpips(str(folder))


def test_encoder_features_grow_with_the_difference() -> None:
    model = build_model(ModelConfig(), seed=0)
    distance = EncoderFeatures(model.vae)
    a, noise = draw(2, 3, 32, 32), draw(2, 3, 32, 32, seed=1)
    near, far = distance(a + 0.05 * noise, a), distance(a + 0.5 * noise, a)
    assert near.shape == (2, 1, 1, 1)
    assert (near > 0).all()
    assert (near < far).all()
    assert not distance(a, a).any()
    assert not list(distance.parameters())
    assert not any(parameter.requires_grad for parameter in model.vae.encoder.parameters())
    image = a.clone().requires_grad_()
    distance(image, a + 0.1 * noise).mean().backward()
    assert image.grad.abs().max() > 0
