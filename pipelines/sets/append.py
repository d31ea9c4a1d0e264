"""`ccsr append`: one manifest over the shards of several sets, where they are."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from infra.errors import DataError
from infra.files.locations import check_output, location
from infra.files.storage import resolve
from infra.shards.manifest import Manifest, put_manifest

SAME = ("scale", "has_lr", "latents_model", "sampled_steps")


def append(uris: Sequence[str], output: str) -> Manifest:
    """Write OUT/manifest.json for the samples of all sets in turn; no tar and no index is copied. Safe to repeat.

    The dataset id is that of a set with these shards. DataError where scale, LR images or latents differ, where two
    sets have a key in common, and where another set is already at `output`.
    """
    check_output(output, uris)
    sets = [Manifest.load(location(uri)) for uri in uris]
    for one in sets[1:]:
        wrong = [name for name in SAME if one.facts.get(name) != sets[0].facts.get(name)]
        if wrong:
            was, now = (", ".join(f"{name} {each.facts.get(name)}" for name in wrong) for each in (sets[0], one))
            raise DataError(
                f"the sets differ: {was} and {now}",
                where=f"{sets[0].uri} and {one.uri}",
                todo="shard one of them again; training takes several sets in `data`",
            )
    _check_keys(sets)
    return put_manifest(output, joined(sets))


def joined(sets: Sequence[Manifest]) -> dict[str, Any]:
    """The facts of the set that has the shards of all `sets`, themselves perhaps appended ones."""
    every = [one.facts for one in sets]
    dropped = sum((Counter(facts.get("dropped", {})) for facts in every), Counter[str]())
    sides = [facts.get("min_side_px") for facts in every]
    return {
        **{name: every[0][name] for name in SAME if name in every[0]},
        "shards": [shard for one in sets for shard in one.shard_facts],
        "index": [{**part, "name": resolve(one.uri, part["name"])} for one in sets for part in one.index_parts],
        "bases": [base for one in sets for base in one.facts.get("bases", [_base(one)])],
        "sources": [source for facts in every for source in facts.get("sources", [])],
        "quarantined": [item for one in sets for item in one.quarantined],
        "dropped": dict(dropped),
        "num_captions": sum(one.num_captions for one in sets),
        "min_side_px": None if None in sides else min(filter(None, sides)),
    }


def _base(one: Manifest) -> dict[str, Any]:
    return {"uri": one.uri, "dataset_id": one.dataset_id, "num_shards": len(one.shard_facts)}


def _check_keys(sets: Sequence[Manifest]) -> None:
    import pyarrow as pa
    import pyarrow.compute as pc

    keys = [one.index["key"] for one in sets]
    for number, mine in enumerate(keys[1:], 1):
        twice = mine.filter(pc.is_in(mine, value_set=pa.chunked_array([c for k in keys[:number] for c in k.chunks])))
        if len(twice):
            raise DataError(
                f"{len(twice)} keys are in an earlier set too, for one {twice[0].as_py()}",
                where=sets[number].uri,
                todo="give its source another name and shard it again; a set is appended once",
            )
