"""`ccsr export`: the images of a shard set as folders of files, for other trainers."""

from concurrent.futures import ThreadPoolExecutor

from infra.display.progress import progress
from infra.errors import ConfigError
from infra.files.locations import check_output
from infra.files.publish import write_bytes
from infra.files.storage import join
from infra.imaging.images import decode_image, encode_png
from infra.shards.manifest import Manifest
from infra.shards.shard import CAPTION, Entry, image_of, read_sample

LAYOUTS = {"pairs": ("hr", "lr"), "basicsr": ("GT", "LQ")}
CAPTIONS = {"pairs": "hr", "basicsr": "captions"}
NUM_THREADS = 8


def export(uri: str, folder: str, layout: str) -> int:
    """Write every sample's images below `folder`; returns the number of samples. Safe to repeat.

    `pairs`: hr/KEY.png and lr/KEY.png as they are stored (a whole JPEG is KEY.jpg), which a `pairs` source reads.
    `basicsr`: GT/KEY.png, LQ/KEY.png, always PNG, and meta_info.txt ("KEY.png (height,width,3)" of each GT image), as
    BasicSR's PairedImageDataset reads. LR only where the set has it. Captions are hr/KEY.txt, in `basicsr`
    captions/KEY.txt, as that reads all files of GT. ConfigError for another layout.
    """
    if layout not in LAYOUTS:
        raise ConfigError(f"no layout {layout!r}", where="--layout", todo=f"one of {', '.join(LAYOUTS)}")
    check_output(folder, [uri])
    manifest = Manifest.load(uri)
    sides = list(zip(("hr", "lr"), LAYOUTS[layout], strict=True))[: 1 + manifest.has_lr]

    def write(entry: Entry) -> str:
        members = read_sample(uri, entry)
        line = ""
        for side, name in sides:
            data = image_of(members, side)
            suffix = "png" if data.startswith(b"\x89PNG") else "jpg"
            if layout == "basicsr":
                image = decode_image(data, where=f"{uri}/{entry.shard}: {entry.key}")
                data, suffix = data if suffix == "png" else encode_png(image), "png"
                line = line or f"{entry.key}.png ({image.shape[0]},{image.shape[1]},3)\n"
            write_bytes(join(folder, name, f"{entry.key}.{suffix}"), data)
        if CAPTION in members:
            write_bytes(join(folder, CAPTIONS[layout], f"{entry.key}.{CAPTION}"), members[CAPTION])
        return line

    lines = []
    with progress("exporting", manifest.num_samples) as advance, ThreadPoolExecutor(NUM_THREADS) as pool:
        for start in range(0, manifest.num_samples, 1024):  # a few in memory, whatever the set's size
            for line in pool.map(write, manifest.entries[start : start + 1024]):
                lines.append(line)
                advance()
    if layout == "basicsr":
        write_bytes(join(folder, "meta_info.txt"), "".join(lines).encode())
    return manifest.num_samples
