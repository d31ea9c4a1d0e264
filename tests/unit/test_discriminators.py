"""The discriminators: seeded weights, frozen features, explicit augmentation; the ViT against torch's own layers."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from infra import rng_for
from training.models import PatchDiscriminator, ProjectedDiscriminator, power_iteration, seeded_init
from training.models.judges.discriminators import TAPS, augment
from training.models.judges.vit import VisionTransformer


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def small_vit(image_px: int, patch_px: int, *, layer_scale: bool, seed: int) -> VisionTransformer:
    with seeded_init(seed):
        vit = VisionTransformer(image_px, patch_px, layer_scale=layer_scale, width=24, num_heads=2).eval()
        for parameter in vit.parameters():
            nn.init.normal_(parameter, std=0.1)
    return vit


@pytest.fixture(scope="module")
def projected() -> ProjectedDiscriminator:
    dino = small_vit(32, 8, layer_scale=False, seed=1)
    return ProjectedDiscriminator(dino, small_vit(28, 14, layer_scale=True, seed=2), seed=5)


def reference_layer(vit: VisionTransformer, index: int) -> nn.TransformerEncoderLayer:
    """torch's own pre-norm layer with the weights of block `index`; layer scale is folded into the projections."""
    block = vit.blocks[index]
    own = block.state_dict()
    width = len(own["norm1.weight"])
    layer = nn.TransformerEncoderLayer(
        width, 2, 4 * width, dropout=0.0, activation="gelu", layer_norm_eps=1e-6, batch_first=True, norm_first=True
    )
    attention, hidden = (own.get(f"{name}.gamma", torch.ones(width)) for name in ("ls1", "ls2"))
    state = {
        "self_attn.in_proj_weight": own["attn.qkv.weight"],
        "self_attn.in_proj_bias": own["attn.qkv.bias"],
        "self_attn.out_proj.weight": attention[:, None] * own["attn.proj.weight"],
        "self_attn.out_proj.bias": attention * own["attn.proj.bias"],
        "linear1.weight": own["mlp.fc1.weight"],
        "linear1.bias": own["mlp.fc1.bias"],
        "linear2.weight": hidden[:, None] * own["mlp.fc2.weight"],
        "linear2.bias": hidden * own["mlp.fc2.bias"],
    }
    state |= {key: value for key, value in own.items() if key.startswith("norm")}
    layer.load_state_dict(state)
    return layer.eval()


@torch.no_grad()
@pytest.mark.parametrize("layer_scale", [False, True])
def test_vit_is_a_pre_norm_transformer_over_patches(layer_scale: bool) -> None:
    vit = small_vit(28, 14, layer_scale=layer_scale, seed=1)
    image = draw(2, 3, 28, 28)
    patches = torch.stack(
        [
            (vit.patch_embed["proj"].weight * image[:, None, :, y : y + 14, x : x + 14]).sum((2, 3, 4))
            for y in (0, 14)
            for x in (0, 14)
        ],
        dim=1,
    )
    patches = patches + vit.patch_embed["proj"].bias
    tokens = torch.cat([vit.cls_token.expand(2, -1, -1), patches], dim=1) + vit.pos_embed
    token, taps = vit(image, TAPS)
    torch.testing.assert_close(taps[-1], tokens, rtol=1e-4, atol=1e-5)
    for index in range(12):
        tokens = reference_layer(vit, index)(tokens)
        if index in taps:
            torch.testing.assert_close(taps[index], tokens, rtol=1e-4, atol=1e-5)
    expected = nn.functional.layer_norm(tokens[:, 0], (24,), vit.norm.weight, vit.norm.bias, eps=1e-6)
    torch.testing.assert_close(token, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="px square"):
        vit(image[..., 1:])


@pytest.mark.parametrize(("size", "patch", "layer_scale", "count"), [(224, 16, False, 150), (518, 14, True, 174)])
def test_vit_has_the_published_files_names(size: int, patch: int, layer_scale: bool, count: int) -> None:
    """The names and shapes in facebookresearch's dino and dinov2 repositories; DINOv2's file adds mask_token."""
    with torch.device("meta"):
        shapes = {
            key: tuple(value.shape)
            for key, value in VisionTransformer(size, patch, layer_scale=layer_scale).state_dict().items()
        }
    assert len(shapes) == count
    assert shapes["pos_embed"] == (1, 1 + (size // patch) ** 2, 384)
    assert shapes["patch_embed.proj.weight"] == (384, 3, patch, patch)
    assert shapes["blocks.11.attn.qkv.weight"] == (1152, 384)
    assert shapes["blocks.11.mlp.fc2.bias"] == (384,)
    assert ("blocks.11.ls2.gamma" in shapes) == layer_scale


def test_projected_discriminator_gives_logits_per_head_and_patch(projected: ProjectedDiscriminator) -> None:
    image, lr = draw(2, 3, 64, 48).requires_grad_(), draw(2, 3, 16, 12, seed=1).sigmoid()
    condition = projected.condition(lr)
    assert condition.shape == (2, 24)
    assert not condition.requires_grad
    logits = projected(image, condition)
    assert logits.shape == (2, 5 * 16)
    logits.mean().backward()
    assert image.grad.abs().max() > 0
    trained = {name for name, parameter in projected.named_parameters() if parameter.requires_grad}
    assert trained
    assert all(name.startswith("heads.") for name in trained)
    assert not torch.equal(projected(image, condition.flip(0)), logits)


@torch.no_grad()
def test_a_forward_pass_changes_neither_discriminator(projected: ProjectedDiscriminator) -> None:
    """So logits and state do not depend on how many micro-batches a rank has."""
    images, condition = draw(3, 2, 3, 64, 48), draw(2, 24, seed=1)
    patch = PatchDiscriminator(8, 2, seed=0)
    judges = {patch: lambda image: patch(image), projected: lambda image: projected(image, condition)}
    for module, logits in judges.items():
        state = {name: tensor.clone() for name, tensor in module.train().state_dict().items()}
        first = logits(images[0])
        for image in images[1:]:
            logits(image)
        assert torch.equal(logits(images[0]), first)
        assert all(torch.equal(tensor, state[name]) for name, tensor in module.state_dict().items())


@torch.no_grad()
def test_power_iteration_follows_the_weights(projected: ProjectedDiscriminator) -> None:
    heads = copy.deepcopy(projected.heads)
    layer = heads[0].classify
    original = layer.parametrizations.weight.original
    original.copy_(draw(*original.shape, seed=3))
    largest = lambda: torch.linalg.matrix_norm(layer.weight.flatten(1), ord=2)  # noqa: E731
    far = abs(largest() - 1)
    power_iteration(heads)
    assert abs(largest() - 1) < far / 2
    for _ in range(100):
        power_iteration(heads)
    torch.testing.assert_close(largest(), torch.tensor(1.0), rtol=1e-4, atol=0)
    assert torch.equal(original, draw(*original.shape, seed=3))
    assert not any(part.training for part in heads.modules())


def test_augmentation_belongs_to_the_row_not_to_the_batch(projected: ProjectedDiscriminator) -> None:
    image, condition = draw(3, 3, 64, 48), draw(3, 24, seed=1)
    with torch.no_grad():
        together = projected(image, condition, [rng_for(0, row) for row in range(3)])
        alone = projected(image[1:2], condition[1:2], [rng_for(0, 1)])
        plain = projected(image, condition)
    torch.testing.assert_close(together[1:2], alone, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(together, plain)


def test_weights_are_a_function_of_the_seed(projected: ProjectedDiscriminator) -> None:
    before = torch.get_rng_state()
    one, same, other = (PatchDiscriminator(8, 2, seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
    assert not torch.equal(one.main[0].weight, other.main[0].weight)
    again = ProjectedDiscriminator(projected.dino, projected.dinov2, seed=5)
    assert torch.equal(again.heads[0].map_weight, projected.heads[0].map_weight)


@settings(max_examples=60, deadline=None)
@given(st.integers(8, 40), st.integers(8, 40), st.integers(0, 10**6))
def test_augment_shifts_and_cuts_one_square(height: int, width: int, seed: int) -> None:
    """Every pixel is 0 or the pixel (dy, dx) away; the shift and the hole are within their bounds."""
    image = 1 + torch.arange(height * width, dtype=torch.float32).view(1, height, width).repeat(3, 1, 1)
    found = augment(image, np.random.default_rng(seed))
    assert found.shape == image.shape
    kept = found[0].nonzero()
    sources = (found[0][tuple(kept.T)] - 1).long()
    shifts = {
        (int(value) // width - int(y), int(value) % width - int(x)) for (y, x), value in zip(kept, sources, strict=True)
    }
    assert len(shifts) == 1
    dy, dx = shifts.pop()
    assert abs(dy) <= int(height * 0.125 + 0.5)
    assert abs(dx) <= int(width * 0.125 + 0.5)
    lost = (found[0] == 0).sum() - (height * width - (height - abs(dy)) * (width - abs(dx)))
    assert 0 <= lost <= int(height * 0.2 + 0.5) * int(width * 0.2 + 0.5)
