"""Keys: a function of the path alone, safe anywhere, all different, and the ones that existing results were made by."""

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra.shards.keys import MAX_KEY_BYTES, key_of, keys_of, output_name

NOT_UTF8 = os.fsdecode(b"caf\xe9.png")
NAME = st.text(st.sampled_from("ab-_. é/写👍\udce9\t"), min_size=1, max_size=300).filter(lambda n: "//" not in f"/{n}/")


@pytest.mark.parametrize(
    ("path", "key"),
    [
        ("a.png", "a"),
        ("deep/c d.png", "deep-c-d"),
        ("x.y_4-2.tar.JPG", "x.y_4-2.tar"),
        ("夕焼け/写真.jpg", "夕焼け-写真"),
        ("हिन्दी.png", "हिन्दी"),
        ("cafe\u0301.png", "caf\u00e9"),
        (NOT_UTF8, "caf--dafd66c0"),
        ("👍.png", "--5d57d39e"),
        ("x" * 251 + ".png", "x" * 191 + "-90d738c3"),
        ("写" * 80 + ".png", "写" * 63 + "-9c2c51da"),
    ],
    ids=ascii,
)
def test_a_path_has_its_key(path: str, key: str) -> None:
    assert key_of(path) == key
    assert keys_of([path]) == [key]


def test_where_stems_clash_the_suffix_tells_them_apart_and_then_a_digest() -> None:
    paths = ["photo.png", "photo.jpg", "other.png", "a b.png", "a-b.png", "a/b.png", "photo.png.webp"]
    keys = keys_of(paths)
    assert keys[1:3] == ["photo.jpg", "other"]
    assert all(key.startswith("a-b-") for key in keys[3:6])
    assert keys_of(paths[:2]) == ["photo.png", "photo.jpg"]
    assert len(set(keys)) == len(paths)


@given(st.lists(NAME.map(lambda name: f"{name}.png") | NAME.map(lambda name: f"{name}.jpg"), unique=True, max_size=8))
def test_keys_are_different_safe_and_found_again(paths: list[str]) -> None:
    keys = keys_of(paths)
    assert len(set(keys)) == len(paths)
    for path, key in zip(paths, keys, strict=True):
        assert len(key.encode()) <= MAX_KEY_BYTES + 9
        assert "/" not in key
        assert key.isprintable()
        name = output_name(path, key)
        assert all(len(part.encode()) <= MAX_KEY_BYTES + 9 for part in name.split("/"))
        assert key_of(f"{name}.png") == key
