"""`ccsr convert`: published weights to a model directory."""

import re
from pathlib import Path

from infra.errors import ConfigError, StorageError
from infra.files.locations import HUB_ID, check_output, location
from infra.files.publish import download, download_folder, temporary_folder
from infra.files.storage import exists, is_s3, join, list_files
from infra.files.weights import BASE_HUB_ID, fetch_weights, find_weights
from training.config import FAMILIES


def run_convert(
    out: str,
    *,
    v1: str | None = None,
    stablesr: str | None = None,
    osediff: str | None = None,
    wrapping: str | None = None,
    controlnet: str | None = None,
    vae: str | None = None,
    base: str | None = None,
    family: str | None = None,
    fetch: bool = False,
) -> str:
    """Write a model directory; all or nothing. Places are local or s3://; returns `out`.

    From `v1`, `stablesr` or `osediff`, the published file (of StableSR perhaps with `wrapping`, its second); or from
    `controlnet` and `vae`, v2's directories; or from `base` alone, with a fresh adapter of `family`. `base`: a Stable
    Diffusion 2.1-base directory, or a hub id whose files are in the weights folder, or are downloaded with `fetch`. A
    checkpoint that holds its text tower needs none.
    """
    kinds = [kind for kind in (v1, stablesr, osediff, controlnet, family) if kind]
    if (controlnet is None) != (vae is None) or len(kinds) > 1 or (wrapping and not stablesr):
        raise ConfigError(
            "these inputs do not go together",
            where="ccsr convert",
            todo="give --v1 FILE, or --stablesr FILE (and --wrapping FILE), or --osediff FILE, or --controlnet DIR and "
            "--vae DIR, or none of them and --family for a fresh start",
        )
    if family not in (None, *FAMILIES):
        todo = f"choose one of {', '.join(FAMILIES)}"
        raise ConfigError(f"no family is called {family!r}", where="--family", todo=todo)
    check_output(out, filter(None, (controlnet, vae)))
    with temporary_folder("convert") as folder:
        target = folder / "model" if is_s3(out) else Path(out)
        if is_s3(out) and list_files(out) and not exists(join(out, "ccsr.json")):
            raise StorageError(
                "the output holds something that is not a model directory", where=out, todo="choose another place"
            )
        for file in filter(None, (v1, stablesr, wrapping, osediff)):
            if not exists(file):
                todo = "ccsr weights fetch ccsr-v1" if file == v1 else "download the method's published files"
                raise StorageError("there is no such file", where=file, todo=f"{todo}, and give its path")
        checkpoint = v1 or stablesr
        base_dir = None if checkpoint and base is None else _base(base or BASE_HUB_ID, folder / "base", fetch=fetch)

        from training.convert import convert_base, convert_onestep, convert_stablesr, convert_v1, convert_v2
        from training.models import publish_model

        if v1:
            convert_v1(download(v1, folder), base_dir, target)
        elif stablesr:
            other = download(wrapping, folder / "wrapping") if wrapping else None
            convert_stablesr(download(stablesr, folder), other, base_dir, target)
        elif base_dir and osediff:
            convert_onestep(download(osediff, folder), base_dir, target)
        elif base_dir and controlnet and vae:
            controlnet_dir = download_folder(controlnet, folder / "controlnet")
            convert_v2(controlnet_dir, download_folder(vae, folder / "vae"), base_dir, target)
        elif base_dir:
            convert_base(base_dir, family or "v2", target)
        if is_s3(out):
            publish_model(target, out)
    return out


def _base(base: str, folder: Path, *, fetch: bool) -> Path:
    """A local folder of Stable Diffusion 2.1-base's files."""
    if not (HUB_ID.fullmatch(base) or re.fullmatch(r"[\w.-]+", base)) or Path(base).is_dir():
        return download_folder(location(base), folder)
    return fetch_weights(base) if fetch else find_weights(base)
