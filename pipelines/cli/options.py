"""Options that several commands share."""

from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from infra.files.locations import location


class ConfigCommand(TyperCommand):
    """A command of a config: `ccsr train CONFIG` means `ccsr train -c CONFIG`."""

    def with_option(self, arguments: list[str]) -> list[str]:
        """The arguments with -c before a config that is given without it."""
        if any(argument.startswith(("-c", "--config")) for argument in arguments):
            return arguments
        flags = {name: getattr(param, "is_flag", True) for param in self.params for name in param.opts}
        index = 0
        while index < len(arguments) and arguments[index].startswith("-"):
            if arguments[index].partition("=")[0] not in (*flags, "--help"):  # the parser will refuse it
                return arguments
            index += 1 if flags.get(arguments[index], True) else 2
        return [*arguments[:index], *(["-c"] if index < len(arguments) else []), *arguments[index:]]

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, self.with_option(args))

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        return [*super().collect_usage_pieces(ctx), "[CONFIG]"]


ConfigFile = Annotated[
    str, typer.Option("-c", "--config", parser=location, help="The run's YAML file; -c may be left out.")
]
Overrides = Annotated[list[str] | None, typer.Option("--set", help="Override a value: a.b=c. May be repeated.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would run, where and how long; write nothing.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
