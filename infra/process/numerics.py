"""Numerics of a process: whether float32 stays float32 on a GPU, and whether the same work gives the same bits."""

import os

from pydantic import Field

from infra.config import Config


class NumericsConfig(Config):
    """Both change last bits on a GPU, so both are part of the result and of its fingerprint."""

    tf32: bool = Field(False, description="float32 products and convolutions in TF32: faster, 10 bits of mantissa")
    deterministic: bool = Field(
        False, description="only kernels that give the same bits each time: slower, an operation without one fails"
    )


def set_numerics(numerics: NumericsConfig) -> None:
    """Apply `numerics` to this process, before its first CUDA operation: cuBLAS reads its workspace's size once.

    torch's own default is TF32 in convolutions. cuDNN's benchmark mode is off: it picks kernels by their time, so the
    next process may round differently.
    """
    if numerics.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    import torch

    torch.backends.cuda.matmul.allow_tf32 = numerics.tf32
    torch.backends.cudnn.allow_tf32 = numerics.tf32
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = numerics.deterministic
    if torch.are_deterministic_algorithms_enabled() != numerics.deterministic:  # the call imports torch's compiler
        torch.use_deterministic_algorithms(numerics.deterministic)
