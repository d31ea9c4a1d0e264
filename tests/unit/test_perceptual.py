"""LPIPS and DISTS by their definitions, with seeded weights in published files; the VAE encoder's distance."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import infra.files.weights
from evaluation.metrics.registry import Quality
from infra import ModelError
from training.config import ModelConfig
from training.models import EncoderFeatures, build_model, load_dists, load_lpips

LAYERS = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M")


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).clamp(-1, 1)


def seeded(convolution: nn.Conv2d, generator: torch.Generator) -> nn.Conv2d:
    weight = convolution.weight
    weight.data = torch.randn(weight.shape, generator=generator) * (2 / weight[0].numel()) ** 0.5
    convolution.bias.data = torch.randn(convolution.bias.shape, generator=generator) * 0.05
    return convolution


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
            layers += [seeded(nn.Conv2d(previous, width, 3, padding=1), generator), nn.ReLU()]
            previous = width
    return nn.Sequential(*layers).requires_grad_(False)


@pytest.fixture(scope="module")
def alexnet() -> nn.Sequential:
    """AlexNet's trunk as torchvision lays it out, with seeded weights."""
    layers = [
        *(nn.Conv2d(3, 64, 11, stride=4, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(192, 384, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(384, 256, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(256, 256, 3, padding=1), nn.ReLU()),
    ]
    generator = torch.Generator().manual_seed(1)
    seeds = [seeded(layer, generator) if isinstance(layer, nn.Conv2d) else layer for layer in layers]
    return nn.Sequential(*seeds).requires_grad_(False)


@pytest.fixture
def folder(tmp_path: Path, vgg: nn.Sequential, alexnet: nn.Sequential, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A weights folder with all files in their published layout; their sha256 replaces the published one."""
    for network, name in ((vgg, "vgg16-397923af.pth"), (alexnet, "alexnet-owt-7be5be79.pth")):
        trunk = {f"features.{key}": value for key, value in network.state_dict().items()}
        torch.save({**trunk, "classifier.0.bias": torch.zeros(3)}, tmp_path / name)
    for name, widths in (("vgg", (64, 128, 256, 512, 512)), ("alex", (64, 192, 384, 256, 256))):
        heads = {
            f"lin{index}.model.1.weight": draw(1, width, 1, 1, seed=index).abs() for index, width in enumerate(widths)
        }
        torch.save(heads, tmp_path / f"lpips_v0.1_{name}.pth")
    shares = {name: draw(1, 1475, 1, 1, seed=index).abs() for index, name in enumerate(("alpha", "beta"))}
    torch.save(shares, tmp_path / "dists_weights.pt")
    known = {file.path: file for file in infra.files.weights.weight_files()}
    monkeypatch.setattr(infra.files.weights, "weight_files", lambda: [_unhashed(file) for file in known.values()])
    return tmp_path


def _unhashed(file: infra.files.weights.WeightFile) -> infra.files.weights.WeightFile:
    return infra.files.weights.WeightFile(**{**vars(file), "sha256": None})


@pytest.mark.parametrize(
    ("trunk", "heads", "outputs", "recorded"),  # outputs: relu1_2 .. 5_3, relu1 .. relu5
    [  # recorded: the lpips package 0.1.4 on these weights and images
        ("vgg16", "vgg", (3, 8, 15, 22, 29), (0.8893552, 0.9070776)),
        ("alexnet", "alex", (1, 4, 7, 9, 11), (1.2292678, 1.1945878)),
    ],
)
def test_lpips_is_its_definition(
    folder: Path,
    vgg: nn.Sequential,
    alexnet: nn.Sequential,
    trunk: str,
    heads: str,
    outputs: tuple[int, ...],
    recorded: tuple[float, ...],
) -> None:
    lpips = load_lpips(str(folder), trunk=trunk)
    weights = torch.load(folder / f"lpips_v0.1_{heads}.pth", weights_only=True)
    a, b = draw(2, 3, 64, 70), draw(2, 3, 64, 70, seed=1)
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    x, y = ((image - shift[:, None, None]) / scale[:, None, None] for image in (a, b))
    expected = torch.zeros(2)
    for index, layer in enumerate(vgg if trunk == "vgg16" else alexnet):
        x, y = layer(x), layer(y)
        if index in outputs:
            unit_x, unit_y = F.normalize(x, dim=1), F.normalize(y, dim=1)
            weight = weights[f"lin{outputs.index(index)}.model.1.weight"]
            expected += (weight * (unit_x - unit_y) ** 2).sum(1).mean((1, 2))
    found = lpips(a, b)
    assert found.shape == (2, 1, 1, 1)
    torch.testing.assert_close(found.flatten(), expected, rtol=1e-4, atol=0)
    assert found.flatten().tolist() == pytest.approx(recorded, rel=1e-5)
    assert not lpips(a, a).any()


def test_dists_is_its_definition(folder: Path, vgg: nn.Sequential) -> None:
    a, b = (draw(1, 3, 48, 40, seed=seed) / 2 + 0.5 for seed in (0, 1))
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    window = torch.hann_window(5, periodic=False)[1:-1]
    window = window[:, None] * window / window.sum() ** 2
    stages: list[list[Tensor]] = []
    for image in (a, b):
        x, found = (image - mean[:, None, None]) / std[:, None, None], [image]
        for index, layer in enumerate(vgg):
            if isinstance(layer, nn.MaxPool2d):
                patches = F.unfold(F.pad(x, (1, 1, 1, 1)).square(), 3, stride=2).view(1, x.shape[1], 9, -1)
                pooled = (patches * window.reshape(9, 1)).sum(2) + 1e-12
                x = pooled.sqrt().view(1, x.shape[1], (x.shape[2] + 1) // 2, -1)
            else:
                x = layer(x)
            if index in (3, 8, 15, 22, 29):
                found.append(x)
        stages.append(found)
    textures, structures = [], []
    for x, y in zip(*stages, strict=True):
        x, y = x[0].flatten(1).double().numpy(), y[0].flatten(1).double().numpy()
        (mx, my), (vx, vy) = (x.mean(1), y.mean(1)), (x.var(1), y.var(1))
        covariance = ((x - mx[:, None]) * (y - my[:, None])).mean(1)
        textures.append((2 * mx * my + 1e-6) / (mx**2 + my**2 + 1e-6))
        structures.append((2 * covariance + 1e-6) / (vx + vy + 1e-6))
    shares = torch.load(folder / "dists_weights.pt", weights_only=True)
    alpha, beta = (shares[name].double().numpy().ravel() for name in ("alpha", "beta"))
    weighted = (alpha * np.concatenate(textures) + beta * np.concatenate(structures)).sum()
    dists = load_dists(str(folder))
    assert dists(a, b).shape == (1, 1, 1, 1)
    assert dists(a, b).item() == pytest.approx(1 - weighted / (alpha + beta).sum(), abs=2e-5)
    assert dists(a, b).item() == pytest.approx(0.0866520, abs=2e-6)  # recorded: the authors' DISTS_pytorch 0.1
    assert dists(a, a).item() == pytest.approx(0, abs=1e-6)
    assert not any(parameter.requires_grad for parameter in dists.parameters())


def test_lpips_is_frozen_and_passes_gradients(folder: Path) -> None:
    lpips = load_lpips(str(folder))
    assert not any(parameter.requires_grad for parameter in lpips.parameters())
    a = draw(1, 3, 32, 32).requires_grad_()
    lpips(a, draw(1, 3, 32, 32, seed=1)).mean().backward()
    assert a.grad.abs().max() > 0


def test_evaluation_scores_images_without_their_border(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CCSR_WEIGHTS", str(folder))
    sr, hr = (np.random.default_rng(seed).integers(0, 256, (72, 80, 3), dtype=np.uint8) for seed in (0, 1))
    found = Quality(["lpips", "dists"], crop_border=4)(sr, hr)
    a, b = (torch.from_numpy(image[4:-4, 4:-4].copy()).permute(2, 0, 1)[None] / 255 for image in (sr, hr))
    assert found["lpips"] == pytest.approx(
        load_lpips(str(folder), trunk="alexnet")(a * 2 - 1, b * 2 - 1).item(), rel=1e-5
    )
    assert found["dists"] == pytest.approx(load_dists(str(folder))(a, b).item(), rel=1e-5)
    assert Quality(["lpips"])(sr, None) == {"lpips": None}


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
