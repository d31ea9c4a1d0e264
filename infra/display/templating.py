"""Jinja2 templates that read as what they become; every value is quoted for the kind of text that it enters."""

import math
import shlex
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml


def render(template: Path, **values: Any) -> str:
    """The text of NAME.KIND.j2 with `values`. A name that is missing is an error, never an empty place.

    KIND says how each value is written: "html" escapes it, "yaml" writes a YAML value on one line, "sbatch" a shell
    word, "md" one line for a table. `| safe` marks the few that are already such text.
    """
    return _environment(template.parent, template.name.split(".")[-2]).get_template(template.name).render(values)


@cache  # it keeps the compiled templates
def _environment(folder: Path, kind: str) -> Any:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    quote = _QUOTES.get(kind, lambda value: value)
    environment = Environment(
        loader=FileSystemLoader(folder),
        undefined=StrictUndefined,
        autoescape=kind == "html",
        finalize=lambda value: value if isinstance(value, (Markup, StrictUndefined)) else quote(value),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["yaml_lines"] = lambda texts: Markup(_yaml_lines(texts))
    return environment


class _OneLine(yaml.SafeDumper):
    """All strings in double quotes: what YAML 1.1 reads as text, YAML 1.2 may read as a number or a boolean."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


class _Lines(yaml.SafeDumper):
    """Text of several lines as lines."""


_OneLine.add_representer(str, lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"'))
_Lines.add_representer(str, lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|"))


def _yaml(value: Any) -> str:
    value = list(value) if isinstance(value, tuple) else value
    text = yaml.dump(value, Dumper=_OneLine, default_flow_style=True, width=math.inf, sort_keys=False)
    return text.removesuffix("...\n").rstrip("\n")


def _yaml_lines(texts: Mapping[str, str]) -> str:
    """A block mapping of names to texts, which are kept as they are written where YAML can."""
    return yaml.dump(dict(texts), Dumper=_Lines, width=math.inf, sort_keys=False).removesuffix("...\n")


_QUOTES: dict[str, Callable[[Any], str]] = {
    "yaml": _yaml,
    "sbatch": lambda value: shlex.quote(str(value)),
    "md": lambda value: " ".join(str(value).replace("|", "\\|").split()),
}
