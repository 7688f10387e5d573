"""What a person sees of a verb: a progress bar while it works, and a closing box when it is done.

rich draws on a terminal. Anywhere else (a log file, CI) the same facts come as plain lines, a few a minute.
"""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")
SECONDS_BETWEEN_PLAIN_LINES = 15.0


def say(message: str) -> None:
    """Print one line at once, also where stdout is a file that several processes share."""
    print(message, flush=True)


def track(items: Iterable[Item], description: str, total: int, unit: str = "images") -> Iterator[Item]:
    """Yield `items` while showing how many are done, the rate per second and the time left."""
    if sys.stdout.isatty():
        yield from _track_on_terminal(items, description, total, unit)
    else:
        yield from _track_in_log(items, description, total, unit)


def _track_on_terminal(items: Iterable[Item], description: str, total: int, unit: str) -> Iterator[Item]:
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
    with Progress(*columns) as progress:
        task = progress.add_task(description, total=total, rate="")
        for done, item in enumerate(items, start=1):
            yield item
            progress.update(task, completed=done, rate=f"{done / (time.monotonic() - started):,.0f}/s")


def _track_in_log(items: Iterable[Item], description: str, total: int, unit: str) -> Iterator[Item]:
    started = last = time.monotonic()
    for done, item in enumerate(items, start=1):
        yield item
        now = time.monotonic()
        if now - last >= SECONDS_BETWEEN_PLAIN_LINES:
            rate = done / (now - started)
            say(f"{description}: {done:,} of {total:,} {unit}, {rate:,.0f}/s, {(total - done) / rate:,.0f} s left")
            last = now


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
