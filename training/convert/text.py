"""Prompt embeddings, computed once when weights are converted; no text tower is needed after that."""

from collections.abc import Mapping, Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from infra.errors import ModelError
from infra.process.memory import to_device
from training.convert.ldm import open_clip_names
from training.models.directory import PROMPTS, check_finite, check_keys, read_weights

CACHED = 256  # of 0.3 MB each in Stable Diffusion 2


def embed_prompts(base: Path, prompts: Sequence[str]) -> dict[str, Tensor]:
    """{prompt: float32 (1, L, C)}: last hidden state of `base`/text_encoder, a Stable Diffusion 2 directory.

    Texts other than the empty one are cut into tokens by `base`/tokenizer. Where `base` is a model directory, all the
    prompts that it caches. Raises ModelError where a file is missing, incomplete or of another kind.
    """
    if (base / PROMPTS).is_file():
        cached = read_weights(base / PROMPTS)
        if "" not in cached:
            raise ModelError(
                "the empty prompt's embedding is missing", where=str(base / PROMPTS), todo="give another base"
            )
        return cached
    tower = TextTower(base)
    return {text: tower(text) for text in prompts}


class TextTower:
    """`base`/text_encoder and `base`/tokenizer of a Stable Diffusion 2 directory. ModelError where a file is missing,
    incomplete or of another kind."""

    def __init__(self, base: Path) -> None:
        self._base, self._encoder = base, _read_encoder(base)
        self._embedded = lru_cache(CACHED)(self._embed)

    def __call__(self, text: str) -> Tensor:
        """A text's embedding, float32 (1, L, C), computed alone, so that it depends on no other; the last 256 are
        kept."""
        return self._embedded(text)

    def to(self, device: torch.device | str) -> "TextTower":
        """The same tower, moved; embeddings that were kept are then made anew."""
        if self._encoder.device != torch.device(device):
            self._encoder.to(device)
            self._embedded.cache_clear()
        return self

    def _embed(self, text: str) -> Tensor:
        return _embed(self._encoder, _tokens(self._encoder, self._base, text))


def _read_encoder(base: Path) -> Any:
    from transformers import CLIPTextModel
    from transformers.utils import logging

    logging.disable_progress_bar()  # each worker loads it
    place = base / "text_encoder"
    if not (place / "config.json").is_file():
        raise ModelError(
            "the text encoder is missing",
            where=str(place),
            todo="give a complete Stable Diffusion 2.1-base directory: ccsr weights fetch sd21-base",
        )
    try:
        encoder, info = CLIPTextModel.from_pretrained(place, local_files_only=True, output_loading_info=True)
    except (OSError, RuntimeError, ValueError) as error:
        raise ModelError(
            f"the text encoder cannot be read ({error})", where=str(place), todo="fetch it again"
        ) from error
    wrong = sorted(info["missing_keys"]) + sorted(info["unexpected_keys"])
    if wrong:
        raise ModelError(
            f"tensor {wrong[0]} is missing or has no place in a CLIP text encoder",
            where=str(place),
            todo="fetch the file again; it is incomplete or of another kind",
        )
    check_finite(encoder.state_dict(), where=place)
    return encoder.requires_grad_(False)


def embed_empty_prompt_open_clip(state: Mapping[str, Tensor], where: Path | str) -> Tensor:
    """The empty prompt's embedding, float32 (1, L, C), from an OpenCLIP text tower's tensors.

    Stable Diffusion 2 reads it after the last block but one, through the final norm. Heads are 64 wide.
    """
    from transformers import CLIPTextConfig, CLIPTextModel

    num_blocks = len({key.split(".")[2] for key in state if key.startswith("transformer.resblocks.")})
    names = open_clip_names(num_blocks - 1)
    missing = [source for source in names.values() if source not in state]
    if missing:
        raise ModelError(
            f"the text tower's tensor {missing[0]} is missing",
            where=str(where),
            todo="copy or fetch the checkpoint again",
        )
    vocabulary, width = state["token_embedding.weight"].shape
    encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=num_blocks - 1,
            num_attention_heads=max(1, width // 64),
            max_position_embeddings=len(state["positional_embedding"]),
            hidden_act="gelu",
        )
    )
    found = {}
    for key in encoder.state_dict():
        name = key.removeprefix("text_model.")
        tensor = state[names[name]]
        if "in_proj" in names[name]:  # q, k and v, one below the other
            tensor = tensor.chunk(3)["qkv".index(name.split("_proj.")[0][-1])]
        found[key] = tensor
    check_keys(encoder.state_dict(), found, where)
    check_finite(found, where)
    encoder.load_state_dict(found)
    return _embed(encoder, _empty_tokens(encoder))


def _tokens(encoder: torch.nn.Module, base: Path, text: str) -> list[int]:
    if not text:
        return _empty_tokens(encoder)
    tokenizer = _tokenizer(base / "tokenizer")
    length = encoder.config.max_position_embeddings
    return tokenizer(text, padding="max_length", max_length=length, truncation=True).input_ids


@cache
def _tokenizer(place: Path) -> Any:
    from transformers import CLIPTokenizer

    if not (place / "vocab.json").is_file():
        raise ModelError("the tokenizer is missing", where=str(place), todo="ccsr weights fetch sd21-base")
    return CLIPTokenizer.from_pretrained(place, local_files_only=True)


def _empty_tokens(encoder: torch.nn.Module) -> list[int]:
    """Start, end, then padding with 0: CLIP's start and end are the vocabulary's last two, and SD 2 pads with "!"."""
    vocabulary, length = encoder.config.vocab_size, encoder.config.max_position_embeddings
    return [vocabulary - 2, vocabulary - 1] + [0] * (length - 2)


def _embed(encoder: torch.nn.Module, tokens: list[int]) -> Tensor:
    with torch.no_grad():
        return encoder.eval()(input_ids=to_device(torch.tensor([tokens]), encoder.device)).last_hidden_state.float()
