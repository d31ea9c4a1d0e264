"""Locations as users write them: every config field, argument and setting that names a file or folder is read here."""

import os
import re
from collections.abc import Callable, Collection, Iterable
from functools import partial
from pathlib import Path
from urllib.parse import unquote

from infra.errors import ConfigError
from infra.files.storage import is_s3

SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):/")
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
VARIABLE = re.compile(r"\$[A-Za-z_{(]")
DATABASES = ("sqlite", "postgresql", "mysql", "mssql")
TRACKING_SCHEMES = ("http", "https", *DATABASES, "databricks", "databricks-uc", "uc")


def parse_location(text: str, *, others: Collection[str] = ()) -> str:
    """An absolute local path, or an s3:// URI without trailing slash, or a URI of one of the schemes `others`.

    Schemes are read in any case, `file://` and `~` become the path that they mean. ValueError for another scheme, an
    unexpanded variable and for what no file can be called.
    """
    if not text.strip() or "\0" in text:
        raise ValueError("a location is a path or an s3:// URI")
    match = SCHEME.match(text)
    scheme = match[1].lower() if match else ""
    if scheme.split("+")[0] in others:
        return scheme + text[len(scheme) :]
    if VARIABLE.search(text):
        raise ValueError("a location is written out, without variables such as $HOME")
    if scheme == "s3":
        bucket, _, key = text[len("s3:/") :].removeprefix("/").rstrip("/").partition("/")
        if not text[len("s3:/") :].startswith("/") or not bucket or {".", ".."} & set(key.split("/")):
            raise ValueError("an s3 URI has the form s3://BUCKET/PATH, without . and .. in PATH")
        return f"s3://{bucket}/{key}".rstrip("/")
    if scheme == "file":
        host, slash, path = unquote(text[len("file:") :].removeprefix("//")).partition("/")
        if host not in ("", "localhost"):
            raise ValueError("a file URI has the form file:///ABSOLUTE/PATH")
        text = slash + path
    elif scheme:
        known = ", ".join(["a local path", "s3://", "file://", *(f"{name}:/" for name in others)])
        raise ValueError(f"a location here is one of {known}")
    else:
        text = os.path.expanduser(text)
        if text.startswith("~"):
            raise ValueError("a path with ~ needs a home folder; write ./~ for a folder of that name")
    return os.path.abspath(text)


def parse_model(text: str) -> str:
    """As `parse_location`, or MLflow's `runs:/ID` or `models:/NAME@ALIAS`. USER/NAME stays as it is unless that path
    exists: `infra.mlflow.models.find_model` reads it as a path, then as a hub id."""
    if HUB_ID.fullmatch(text) and not os.path.exists(text):
        return text
    return parse_location(text, others=("runs", "models"))


def parse_tracking(text: str) -> str:
    """As `parse_location`, or an address of an MLflow server or database."""
    text = parse_location(text, others=TRACKING_SCHEMES)
    path = text.removeprefix("sqlite:///")
    return text if path == text else f"sqlite:///{os.path.expanduser(path)}"


def location(text: str) -> str:
    """`parse_location` of an argument or setting; ConfigError instead of ValueError."""
    return _checked(parse_location, text)


def model_location(text: str) -> str:
    """`parse_model` of an argument; ConfigError instead of ValueError."""
    return _checked(parse_model, text)


def tracking_location(text: str) -> str:
    """`parse_tracking` of an argument or setting; ConfigError instead of ValueError."""
    return _checked(parse_tracking, text)


def local_path(text: str | Path) -> Path:
    """A path on this machine; ConfigError for anything else."""
    uri = location(str(text))
    if is_s3(uri):
        raise ConfigError("a local path is needed here", where=uri, todo="give a path on this machine")
    return Path(uri)


def address_or_location(text: str) -> str:
    """`parse_location` or an http(s) address; ConfigError instead of ValueError."""
    return _checked(partial(parse_location, others=("http", "https")), text)


def _checked(parse: Callable[[str], str], text: str) -> str:
    try:
        return parse(text)
    except ValueError as error:
        raise ConfigError(str(error), where=text, todo="correct the path or URI") from error


def is_relative(text: str) -> bool:
    """Whether a location as written depends on the working folder."""
    return not SCHEME.match(text) and not os.path.isabs(os.path.expanduser(text))


def is_inside(uri: str, folder: str) -> bool:
    """Whether `uri` is `folder` or below it, symbolic links followed."""
    place, root = (one if is_s3(one) else os.path.realpath(one) for one in (uri, folder))
    return f"{place}/".startswith(f"{root.rstrip('/')}/")


def check_output(output: str, inputs: Iterable[str]) -> None:
    """ConfigError where `output` is one of the folders `inputs` or below one: the next run would read it."""
    for folder in inputs:
        if is_inside(output, folder):
            raise ConfigError(
                "the output is inside an input: what is written there would be read as input by the next run",
                where=f"{output}, inside {folder}",
                todo="choose an output folder beside the input",
            )
