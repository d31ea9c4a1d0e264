"""Seeding: streams depend on their keys alone, and a batch's rows on theirs."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from infra import noise_for, rng_for

FIXED_WORDS = [8245207840329637661, 8460487911925362847]
KEY = st.integers(-(2**70), 2**70) | st.text(max_size=6)
KEYS = st.lists(KEY, max_size=4).map(tuple)


def words(seed: int, *keys: str | int) -> list[int]:
    return rng_for(seed, *keys).bit_generator.random_raw(2).tolist()


@given(st.integers(), KEYS, KEYS)
def test_streams_are_equal_exactly_where_the_keys_are(seed: int, one: tuple, other: tuple) -> None:
    assert words(seed, *one) == words(seed, *one)
    assert (words(seed, *one) == words(seed, *other)) == (one == other)
    assert words(seed, *one) != words(seed + 1, *one)


def test_the_keys_order_type_and_borders_count() -> None:
    variants = [("a", "b"), ("b", "a"), ("ab",), ("a,b",), ('a", "b',), (1,), ("1",), (1, 0), (), ("",)]
    streams = [tuple(words(0, *keys)) for keys in variants]
    assert len(set(streams)) == len(variants)
    assert words(0, 1) == words(0, np.int64(1))
    assert words(5) != words(0, 5)


def test_the_streams_are_the_same_from_release_to_release() -> None:
    """Philox and BLAKE2b are fixed by their definitions: these words were drawn once with NumPy 2.4."""
    assert words(0, "sample", 1) == FIXED_WORDS


@pytest.mark.parametrize("bad", [1.5, None, b"x", (1,)])
def test_other_keys_are_refused(bad: object) -> None:
    with pytest.raises(TypeError):
        rng_for(0, bad)  # type: ignore[arg-type]


def test_the_global_generator_is_not_touched() -> None:
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    torch_before = torch.get_rng_state()
    rng_for(0, "a").random(3)
    noise_for(0, [("a",)], "cpu", torch.float32)((1, 3))
    assert (np.random.get_state()[1] == before).all()  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), torch_before)


@given(st.lists(KEYS, min_size=2, max_size=5, unique=True), st.data())
def test_a_rows_noise_does_not_depend_on_the_batch(keys: list[tuple], data: st.DataObject) -> None:
    chosen = data.draw(st.permutations(range(len(keys))).map(lambda order: order[: max(1, len(order) - 1)]))
    assume(chosen != list(range(len(keys))))
    whole, part = (noise_for(3, k, "cpu", torch.float32) for k in (keys, [keys[i] for i in chosen]))
    for shape in ((2, 3), (4,)):  # a second draw continues each row's own stream
        everything = whole((len(keys), *shape))
        assert torch.equal(part((len(chosen), *shape)), everything[chosen])


def test_noise_is_standard_normal_and_independent() -> None:
    noise = noise_for(0, [("x", row) for row in range(16)], "cpu", torch.float32)((16, 4, 64, 64))
    assert noise.dtype == torch.float32
    n = noise.numel()
    assert abs(noise.mean()) < 5 / n**0.5
    assert abs(noise.var() - 1) < 5 * (2 / n) ** 0.5
    correlation = torch.corrcoef(noise.flatten(1)) - torch.eye(16)
    assert correlation.abs().max() < 6 / noise[0].numel() ** 0.5


def test_noise_is_drawn_in_float32_and_then_cast() -> None:
    shape = (1, 100)
    exact, cast = (noise_for(0, [("x",)], "cpu", dtype)(shape) for dtype in (torch.float32, torch.bfloat16))
    assert torch.equal(exact.to(torch.bfloat16), cast)


def test_a_batch_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match="2 keys"):
        noise_for(0, [("a",), ("b",)], "cpu", torch.float32)((3, 1))
