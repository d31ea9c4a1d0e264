"""`ccsr verify`: does every byte of a shard set agree with its manifest?"""

import tempfile
from pathlib import Path

from infra.errors import DataError
from infra.manifest import Manifest, dataset_id_of
from infra.progress import progress
from infra.storage import download, exists, join, list_files, sha256_file


def verify(uri: str) -> Manifest:
    """Check each shard's hash, the byte index, the dataset id and that no other object lies there.

    Raises DataError naming every shard that is missing or changed and every object that does not belong.
    """
    manifest = Manifest.load(uri)
    faults: list[str] = []
    with progress("verifying", len(manifest.facts["shards"])) as advance, tempfile.TemporaryDirectory() as folder:
        for shard in manifest.facts["shards"]:
            place = join(uri, shard["shard"])
            if not exists(place):
                faults.append(f"{shard['shard']} is missing")
            else:
                local = download(place, Path(folder))
                if sha256_file(local) != shard["sha256"]:
                    faults.append(f"{shard['shard']} has changed")
                if local.parent == Path(folder):
                    local.unlink()
            advance()
    if dataset_id_of(manifest.facts["shards"]) != manifest.dataset_id:
        faults.append("the manifest's list of shards is not the one that its dataset id stands for")
    if len(manifest.entries) != manifest.num_samples:
        faults.append(f"the index lists {len(manifest.entries)} samples, the manifest {manifest.num_samples}")
    known = {join(uri, name) for name in ("manifest.json", "index.parquet", "run.json")}
    known |= {join(uri, shard["shard"]) for shard in manifest.facts["shards"]}
    known |= {join(uri, "records", f"{index:06d}.json") for index in range(len(manifest.facts["shards"]))}
    strays = [place for place in list_files(uri) if place not in known]
    faults += [f"{place.removeprefix(uri).lstrip(chr(47))} does not belong" for place in strays]
    if faults:
        raise DataError(
            f"{len(faults)} faults: {'; '.join(faults[:5])}{'; ...' if len(faults) > 5 else ''}",
            where=uri,
            todo="make the set again in a new output; remove what does not belong",
        )
    return manifest
