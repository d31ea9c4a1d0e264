"""One table for the terminal, for HTML and for JSON; words and numbers are never broken."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infra.display.templating import render

if TYPE_CHECKING:
    from markupsafe import Markup
    from rich.console import Console, ConsoleOptions
    from rich.text import Text

TEMPLATE = Path(__file__).with_name("table.html.j2")
# What a part of a cell is -> its style in the terminal, its element in HTML.
STYLES = {
    "": ("", ""),
    "best": ("bold", "b"),
    "second": ("underline", "u"),
    "good": ("green", ""),
    "bad": ("bold red", "b"),
    "between": ("dim", "i"),
    "beside": ("dim", "small"),
}


@dataclass(frozen=True)
class Cell:
    """One cell. `parts`: (text, one of STYLES), for people; `value`: the same for JSON."""

    value: Any
    parts: tuple[tuple[str, str], ...]

    @property
    def is_number(self) -> bool:
        values = self.value if isinstance(self.value, list) else [self.value]
        return any(isinstance(value, int | float) for value in values)


def cell(value: Any, form: str = "", style: str = "") -> Cell:
    """One value, formatted by a format specification; None is an empty cell."""
    return Cell(value, ((format(value, form), style),) if value is not None else ())


@dataclass
class Table:
    """Rows of cells under the names of their columns, with a title above and notes below."""

    columns: Sequence[str]
    title: str = ""
    notes: Sequence[str] = ()
    rows: list[list[Cell]] = field(default_factory=list)

    def add(self, *values: Any) -> None:
        """Add a row. A plain number has commas between thousands, other values are shown as they are."""
        forms = (("," if isinstance(value, int) else "") for value in values)
        cells = (v if isinstance(v, Cell) else cell(v, form) for v, form in zip(values, forms, strict=True))
        self.rows.append(list(cells))

    @classmethod
    def of(cls, columns: Sequence[str], records: Iterable[Mapping[str, Any]]) -> "Table":
        """A row per record, of its values under `columns`."""
        table = cls(columns)
        for record in records:
            table.add(*(record[name] for name in columns))
        return table

    def records(self) -> list[dict[str, Any]]:
        """One dict per row: name of the column -> value."""
        return [dict(zip(self.columns, (one.value for one in row), strict=True)) for row in self.rows]

    def html(self) -> "Markup":
        """The table and its notes, escaped; without the title."""
        from markupsafe import Markup

        return Markup(render(TEMPLATE, table=self, styles=STYLES))

    def __rich_console__(self, console: "Console", options: "ConsoleOptions") -> "Iterator[Text]":
        """The table in the terminal's width; where its words do not fit side by side, a line for each cell."""
        from rich.text import Text

        if self.title:
            yield from _folded(Text(self.title, "bold"), options.max_width)
        head = [Text(name) for name in self.columns]
        rows = [
            [Text.assemble(*((text, STYLES[style][0]) for text, style in c.parts)) for c in row] for row in self.rows
        ]
        widths, gap = _widths([*zip(head, *rows, strict=True)], options.max_width)
        if widths:
            rule = [Text(("-" if options.ascii_only else "─") * width) for width in widths]
            right = [any(one.is_number for one in column) for column in zip(*self.rows, strict=True)]
            for row in (head, rule, *rows):
                yield from _side_by_side(row, widths, gap, right or [False] * len(head))
        else:
            label = max(name.cell_len for name in head)
            for row in rows:
                for name, text in zip(head, row, strict=True):
                    if text:
                        yield from _side_by_side([name, text], [label, options.max_width - label - 2], 2, [False] * 2)
                yield Text()
        for note in self.notes:
            yield from _folded(Text(note, "dim"), options.max_width)


def print_listing(table: Table, *, as_json: bool = False) -> None:
    """Print a table of things; as JSON a list of its rows."""
    if as_json:
        print(json.dumps(table.records(), indent=1))
    else:
        print_report([table])


def print_report(tables: Sequence[Table], *, as_json: bool = False) -> None:
    """Print tables of results; as JSON a list of objects with title, rows and notes."""
    from rich.console import Console

    if as_json:
        report = [{"title": table.title, "rows": table.records(), "notes": list(table.notes)} for table in tables]
        print(json.dumps(report, indent=1))
        return
    console = Console(soft_wrap=True)  # the terminal breaks words that are longer than its line
    for number, table in enumerate(tables):
        console.print(*([""] if number else []), table, sep="\n")


def _widths(columns: "Sequence[Sequence[Text]]", room: int) -> tuple[list[int], int]:
    """The width of each column and of the gap between two. The widest columns are narrowed until all fit, at most to
    their longest word; no widths where that does not fit either."""
    from rich.cells import cell_len

    widths = [max(cell_len(line) for text in column for line in text.plain.split("\n")) for column in columns]
    least = [max((cell_len(word) for text in column for word in text.plain.split()), default=0) for column in columns]
    gaps = len(columns) - 1
    gap = 2 if sum(widths) + 2 * gaps <= room else 1
    if sum(least) + gap * gaps > room:
        return [], gap
    while sum(widths) + gap * gaps > room:
        widest = max((i for i, width in enumerate(widths) if width > least[i]), key=lambda i: widths[i])
        widths[widest] -= 1
    return widths, gap


def _side_by_side(row: "Sequence[Text]", widths: Sequence[int], gap: int, right: Sequence[bool]) -> "Iterator[Text]":
    """The lines of a row, each cell folded to its width."""
    from rich.text import Text

    folded = [_folded(text, width) for text, width in zip(row, widths, strict=True)]
    for number in range(max(map(len, folded))):
        line = Text(no_wrap=True, overflow="ignore")
        for i, lines in enumerate(folded):
            text = lines[number] if number < len(lines) else Text()
            space = Text(" " * max(0, widths[i] - text.cell_len))
            line = line + (space + text if right[i] else text + space) + Text(" " * gap)
        line.rstrip()
        yield line


def _folded(text: "Text", width: int) -> "list[Text]":
    """`text` in lines of at most `width`, folded at spaces alone: a longer word gets its own line."""
    from rich.cells import cell_len

    lines = []
    for line in text.split("\n", allow_blank=True):
        cuts, used = [], 0
        for word in re.finditer(r"\s*\S+\s*", line.plain):
            if used and used + cell_len(word[0].rstrip()) > width:
                cuts.append(word.start())
                used = 0
            used += cell_len(word[0])
        for part in line.divide(cuts):
            part.rstrip()
            part.no_wrap, part.overflow = True, "ignore"
            lines.append(part)
    return lines
