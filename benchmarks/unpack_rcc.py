"""Unpack the pictures of Qt resource files: `python -m benchmarks.unpack_rcc FOLDER FILE.rcc ...` (gcompris-qt-data).

The format: https://github.com/qt/qtbase/blob/dev/src/tools/rcc/rcc.cpp; big-endian, versions 1 to 3.
"""

import sys
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from struct import unpack_from

PICTURES = (".jpg", ".png", ".webp")
COMPRESSED, FOLDER, ZSTD = 1, 2, 4


def pictures(data: bytes) -> Iterator[tuple[PurePosixPath, bytes]]:
    """Path and bytes of every picture that is stored as it is or by zlib."""
    version, tree, contents, names = unpack_from(">IIII", data, 4)
    entry_bytes = 14 if version == 1 else 22

    def walk(index: int, folder: PurePosixPath) -> Iterator[tuple[PurePosixPath, bytes]]:
        entry = tree + index * entry_bytes
        name_at, flags = unpack_from(">IH", data, entry)
        length = unpack_from(">H", data, names + name_at)[0] if index else 0  # the root has no name
        start = names + name_at + 6
        path = folder / data[start : start + 2 * length].decode("utf-16-be")
        if flags & FOLDER:
            count, first = unpack_from(">II", data, entry + 6)
            for child in range(first, first + count):
                yield from walk(child, path)
        elif path.suffix in PICTURES and not flags & ZSTD:
            start = contents + unpack_from(">I", data, entry + 10)[0]
            content = data[start + 4 : start + 4 + unpack_from(">I", data, start)[0]]
            yield path, zlib.decompress(content[4:]) if flags & COMPRESSED else content

    yield from walk(0, PurePosixPath())


def main() -> None:
    out, *files = map(Path, sys.argv[1:])
    for file in files:
        data = file.read_bytes()
        if not data.startswith(b"qres"):
            raise SystemExit(f"{file} is no Qt resource file")
        for path, content in pictures(data):
            if ".." in path.parts:
                raise SystemExit(f"{file} holds {path}, which leaves the folder")
            target = out / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)


if __name__ == "__main__":
    main()
