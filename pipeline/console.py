"""What a person sees of a verb: a progress bar while it works, and a closing box when it is done.

rich draws on a terminal. Anywhere else (a log file, CI) the same facts come as plain lines, a few a minute.
"""

import contextlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")
SECONDS_BETWEEN_PLAIN_LINES = 15.0


def say(message: str) -> None:
    """Print one line at once, also where stdout is a file that several processes share."""
    # A file name that is no text reaches Python as surrogates, which no stream takes.
    print(message.encode(errors="backslashreplace").decode(), flush=True)


def track(items: Iterable[Item], description: str, total: int, unit: str = "images") -> Iterator[Item]:
    """Yield `items` while showing how many are done, the rate per second and the time left."""
    with progress(description, total, unit) as show:
        for done, item in enumerate(items, start=1):
            yield item
            show(done)


@contextlib.contextmanager
def progress(description: str, total: int, unit: str = "images", already: int = 0) -> Iterator[Callable[[int], None]]:
    """Give a function that shows how many of `total` are done, the rate per second and the time left.

    `already` of them were done by an earlier run: they count for the bar, not for the rate.
    """
    kind = _progress_on_terminal if sys.stdout.isatty() else _progress_in_log
    with kind(description, total, unit, already) as show:
        yield show


@contextlib.contextmanager
def _progress_on_terminal(description: str, total: int, unit: str, already: int) -> Iterator[Callable[[int], None]]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    started = time.monotonic()
    with Progress(*columns) as bar:
        task = bar.add_task(description, total=total, completed=already, rate="")
        yield lambda done: bar.update(
            task, completed=done, rate=f"{(done - already) / max(time.monotonic() - started, 1e-9):,.0f}/s"
        )


@contextlib.contextmanager
def _progress_in_log(description: str, total: int, unit: str, already: int) -> Iterator[Callable[[int], None]]:
    started = last = time.monotonic()

    def show(done: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= SECONDS_BETWEEN_PLAIN_LINES and done > already:
            rate = (done - already) / (now - started)
            say(f"{description}: {done:,} of {total:,} {unit}, {rate:,.0f}/s, {(total - done) / rate:,.0f} s left")
            last = now

    yield show


def closing_box(title: str, facts: dict[str, str], next_command: str = "") -> None:
    """Print what was made, where, and the command that usually comes next."""
    rows = dict(facts)
    if next_command:
        rows["next"] = next_command
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.panel import Panel
        from rich.table import Table

        table = Table.grid(padding=(0, 2))
        for name, value in rows.items():
            table.add_row(f"[dim]{name}[/dim]", value.replace("[", r"\["))
        Console().print(Panel(table, title=title, title_align="left", expand=False))
        return
    width = max(map(len, rows), default=0)
    say("\n".join([title, *(f"  {name:<{width}}  {value}" for name, value in rows.items())]))


def show_table(columns: list[str], rows: list[list[str]]) -> None:
    """Print a table, its first column to the left and the others to the right."""
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table

        table = Table(box=None, pad_edge=False, header_style="dim")
        for place, name in enumerate(columns):
            table.add_column(name.replace("[", r"\["), justify="right" if place else "left")
        for row in rows:
            table.add_row(*(cell.replace("[", r"\[") for cell in row))
        Console().print(table)
        return
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    for first, *others in [columns, *rows]:
        cells = [f"{first:<{widths[0]}}", *(f"{cell:>{width}}" for cell, width in zip(others, widths[1:], strict=True))]
        say("  ".join(cells).rstrip())


def show_marked(rows: list[tuple[str, str, str]]) -> None:
    """Print sentences, each after a word for how grave it is, which a terminal shows in colour: (word, colour, sentence)."""
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table.grid(padding=(0, 2))
        for word, colour, text in rows:
            table.add_row(Text(word, style=colour), Text(text))
        Console().print(table)
        return
    width = max((len(word) for word, _, _ in rows), default=0)
    for word, _, text in rows:
        say(f"{word:<{width}}  {text}")
