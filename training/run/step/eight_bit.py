"""8-bit AdamW of bitsandbytes (extra `[bnb]`), and its moments as the float32 tensors that checkpoints hold."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from infra.errors import ConfigError
from training.config import OptimizerConfig
from training.run.checkpoint import ADAM_MOMENTS

BLOCK = 256  # values that share a scale, as bitsandbytes' AdamW has it
MAPS = ("dynamic", "udynamic")  # what each moment's bytes mean: the first has a sign


def optimizer_libraries(settings: OptimizerConfig) -> tuple[str, ...]:
    """The optional libraries that an optimiser comes from, where they are installed."""
    return ("bitsandbytes",) if settings.kind == "adamw8bit" and find_spec("bitsandbytes") else ()


def check_optimizer(settings: OptimizerConfig) -> None:
    """ConfigError where an optimiser's library is not installed."""
    if settings.kind == "adamw8bit" and not optimizer_libraries(settings):
        raise ConfigError(
            "adamw8bit is bitsandbytes', which is not installed here",
            where="optimizer.kind",
            todo="pip install 'ccsr-cluster[bnb]', on every node, or write kind: adamw",
        )


def make_adamw8bit(groups: list[dict[str, Any]], settings: OptimizerConfig) -> torch.optim.Optimizer:
    """All moments in 8 bits: under ZeRO a small parameter is a part of a large partition and would have them anyway."""
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(
        groups,
        lr=settings.learning_rate,
        betas=settings.betas,
        weight_decay=settings.weight_decay,
        min_8bit_size=0,
    )


def is_eight_bit(optimizer: torch.optim.Optimizer) -> bool:
    """By name, so that a run without it does not import bitsandbytes."""
    return type(optimizer).__name__ == "AdamW8bit"


@contextmanager
def float_moments(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Inside the block the states of an 8-bit AdamW hold their moments in float32 too, under AdamW's names.

    `quantize_moments` makes the same bytes of them. The signed map ends at 1 and at -0.993, so the largest value of a
    block, if negative, would come back smaller and with it the block's scale: here -0.993 becomes -1, which that value
    was before it was rounded.
    """
    from bitsandbytes.functional import dequantize_blockwise

    for state in optimizer.state.values():
        for number, kind in enumerate(ADAM_MOMENTS, start=1):
            meaning = state[f"qmap{number}"].clone()
            meaning[0] = meaning[0].sign()
            scale = state[f"absmax{number}"]
            state[kind] = dequantize_blockwise(state[f"state{number}"], absmax=scale, code=meaning, blocksize=BLOCK)
    try:
        yield
    finally:
        for state in optimizer.state.values():
            for kind in ADAM_MOMENTS:
                del state[kind]


def quantize_moments(optimizer: Any, num_updates: int) -> None:
    """Make the float32 moments in the states of an 8-bit AdamW its own after `num_updates` steps."""
    for weight, state in optimizer.state.items():
        state["step"] = num_updates
        for number, (kind, name) in enumerate(zip(ADAM_MOMENTS, MAPS, strict=True), start=1):
            meaning = optimizer.name2qmap[name].to(weight.device)
            codes, scales = _quantized(state.pop(kind), meaning)
            state |= {f"state{number}": codes, f"qmap{number}": meaning, f"absmax{number}": scales}


def _quantized(moment: Tensor, meaning: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest codes and each block's scale. bitsandbytes' own function on a CPU misses the nearest code of some
    values near zero, that of a code itself too."""
    blocks = F.pad(moment.flatten(), (0, -moment.numel() % BLOCK)).view(-1, BLOCK)
    scales = blocks.abs().amax(1)
    middles = (meaning[1:] + meaning[:-1]) / 2
    codes = torch.bucketize(blocks / torch.where(scales > 0, scales, 1)[:, None], middles, out_int32=True)
    return codes.to(torch.uint8).flatten()[: moment.numel()].view_as(moment), scales
