"""From a file's path to its key: a name that is safe in a tar, on any file system and in an address."""

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TypeVar

MAX_KEY_BYTES = 200  # of 255 that file systems allow: a suffix and a temporary file's marks come on top
DIGEST_LENGTH = 8
ItemT = TypeVar("ItemT")


def key_of(path: str) -> str:
    """The key of an image file by its path below the input's root, without suffix.

    It depends on nothing else, so it also seeds the image's noise. Letters and digits of any script, `_`, `.` and `-`
    stay, every run of other characters becomes one `-`. A digest is added where the key is over 200 bytes, where it
    would have neither letter nor digit, and where the path is not UTF-8.
    """
    stem = _composed(path.rsplit(".", 1)[0])
    return bounded(_plain(stem), stem, MAX_KEY_BYTES)


def keys_of(paths: Sequence[str]) -> list[str]:
    """A key per path, all different: `key_of`'s; where several paths share it, with the suffix or else a digest."""
    forms = (
        key_of,
        lambda path: bounded(_plain(path), path, MAX_KEY_BYTES),
        lambda path: with_digest(key_of(path), path),
    )
    return tell_apart(paths, *forms)


def tell_apart(items: Sequence[ItemT], *forms: Callable[[ItemT], str]) -> list[str]:
    """Per item its first form that is no other item's key; where there is none, its last."""
    keys = [forms[0](item) for item in items]
    for form in forms[1:]:
        counts = Counter(keys)
        keys = [key if counts[key] == 1 else form(item) for item, key in zip(items, keys, strict=True)]
    return keys


def bounded(key: str, text: str, max_bytes: int) -> str:
    """`key`, from `text`; shortened by a digest of `text` where it is too long or would not say what `text` was."""
    if len(key.encode()) <= max_bytes and any(map(str.isalnum, key)) and is_utf8(text):
        return key
    start = key.encode()[: max_bytes - DIGEST_LENGTH - 1].decode(errors="ignore")
    return with_digest(start, text)


def with_digest(key: str, text: str) -> str:
    """`key` and 8 hex digits of the SHA-256 of the bytes of `text`."""
    return f"{key}-{hashlib.sha256(text.encode(errors='surrogateescape')).hexdigest()[:DIGEST_LENGTH]}"


def is_utf8(text: str) -> bool:
    """Whether a file's name is UTF-8; Python escapes other bytes by surrogates, which can be neither sent nor shown."""
    return text.isascii() or not any("\ud800" <= char <= "\udfff" for char in text)


def output_name(path: str, key: str) -> str:
    """Where the result for `path` belongs below an output, without suffix: as below the input, unless `key` had to tell
    it from others or its name is too long or cannot be shown."""
    stem = path.rsplit(".", 1)[0]
    short = max(len(part.encode(errors="replace")) for part in stem.split("/")) <= MAX_KEY_BYTES
    return stem if key == key_of(path) and short and stem.isprintable() else key


def _composed(text: str) -> str:
    return unicodedata.normalize("NFC", text)  # macOS spells an accented letter in two characters, Linux in one


def _plain(text: str) -> str:
    kept = (char if char in "_.-" or unicodedata.category(char)[0] in "LMN" else "\0" for char in _composed(text))
    return re.sub("\0+", "-", "".join(kept))
