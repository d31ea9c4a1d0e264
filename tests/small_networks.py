"""Small networks: frozen ones with seeded weights in place of stage 2's weight files, and a tenth of `preset: tiny`."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from training.models import Lpips
from training.models.judges.vit import VisionTransformer
from training.models.networks import UNET_CONFIGS, VAE_CONFIGS, seeded_init


@contextmanager
def smaller_tiny() -> Iterator[None]:
    """Inside the block `preset: tiny` is smaller still: bf16 costs twenty times fp32 on a CPU without it."""
    sizes = ((VAE_CONFIGS, (8, 8, 16)), (UNET_CONFIGS, (8, 16)))
    kept = [configs["tiny"] for configs, _ in sizes]
    for configs, channels in sizes:
        configs["tiny"] = configs["tiny"] | {"block_out_channels": channels}
    try:
        yield
    finally:
        for (configs, _), one in zip(sizes, kept, strict=True):
            configs["tiny"] = one


def small_dino(name: str) -> VisionTransformer:
    """Replaces training.models.load_dino."""
    with seeded_init(1):
        vit = VisionTransformer(32, 8, layer_scale=name == "dinov2", width=16, num_heads=2)
        for parameter in vit.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    return vit.requires_grad_(False)


def seeded_lpips() -> Lpips:
    """Replaces training.models.load_lpips: the real size, random."""
    with seeded_init(2):
        lpips = Lpips()
        for head in lpips.heads:
            torch.nn.init.ones_(head)
    return lpips.requires_grad_(False)


def save_text_tower(folder: Path) -> None:
    """text_encoder/ and tokenizer/ as of Stable Diffusion 2, 16 wide, of 7 tokens, for letters; its weights are drawn
    from torch's generator."""
    from transformers import CLIPTextConfig, CLIPTextModel  # two seconds, which few of this module's users need

    config = CLIPTextConfig(
        vocab_size=300,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=7,
        bos_token_id=298,
        eos_token_id=299,
    )
    CLIPTextModel(config).save_pretrained(folder / "text_encoder")
    tokenizer = folder / "tokenizer"
    tokenizer.mkdir()
    letters = [chr(code) for code in range(33, 127)]
    tokens = [*letters, *(letter + "</w>" for letter in letters)]
    tokens += [f"<unused{index}>" for index in range(298 - len(tokens))] + ["<|startoftext|>", "<|endoftext|>"]
    (tokenizer / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
    (tokenizer / "merges.txt").write_text("#version: 0.2\n")
    (tokenizer / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "CLIPTokenizer", "pad_token": "!", "model_max_length": 7})
    )
