"""Trained parts hooked into frozen networks: inside a `with` block only, and where activations are computed again."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from training.models.library import ModelMixin

Hook = tuple[nn.Module, Callable[..., Any]]


@contextmanager
def hooked(network: ModelMixin, hooks: Sequence[Hook]) -> Iterator[None]:
    """Register forward hooks on modules of `network`; afterwards it is as before, to the bit.

    A backward pass may come after the block: what activation checkpointing computes again sees its own hooks and
    forward pass, also when there were others since.
    """
    checkpointed = network.is_gradient_checkpointing
    if checkpointed:
        again = partial(checkpoint, use_reentrant=False, context_fn=lambda: (nullcontext(), _placed(hooks)))
        network.enable_gradient_checkpointing(again)
    try:
        with _placed(hooks):
            yield
    finally:
        if checkpointed:
            network.enable_gradient_checkpointing()


def before_norm(frozen: Tensor) -> Tensor:
    """What a frozen network hands to a trained GroupNorm, in a layout that the norm's backward survives.

    torch 2.13 on CPUs ends the process where only the norm's weights require a gradient and its input is channels last.
    """
    return frozen.contiguous() if torch.is_grad_enabled() and not frozen.requires_grad else frozen


@contextmanager
def _placed(hooks: Sequence[Hook]) -> Iterator[None]:
    # Those that are in place already are left alone: a backward pass inside the block finds them there.
    absent = [(module, hook) for module, hook in hooks if hook not in module._forward_hooks.values()]
    handles = [module.register_forward_hook(hook) for module, hook in absent]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
