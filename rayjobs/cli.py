"""What the commands share: flags from dataclasses, one-paragraph errors, exit codes."""

from __future__ import annotations

import dataclasses
import logging
import os
import sys
import textwrap
import typing
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Annotated, Any, TypeVar

from rich.console import Console
from rich.markup import escape

__all__ = [
    "EXIT_INTERRUPTED",
    "EXIT_USAGE",
    "differences",
    "flat",
    "flat_parse",
    "make_console",
    "option_value",
    "plain",
    "quiet_libraries",
    "show_warnings",
    "user_errors",
]

T = TypeVar("T")
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130  # what shells report for Ctrl-C


def flat(kind: Any) -> Any:
    """A nested dataclass whose flags carry no prefix (its own nested dataclasses keep theirs)."""
    import tyro

    return Annotated[kind, tyro.conf.arg(name="")]


def _with_lines(description: str) -> str:
    """Lines that show commands stay lines: tyro joins all but paragraphs."""
    paragraphs = description.split("\n\n")
    return "\n\n".join(p.strip().replace("\n", "\n\n") if "rayjobs/" in p else p for p in paragraphs)


def flat_parse(kind: type[T], default: T | None, argv: Sequence[str] | None, description: str) -> T:
    """Flags from a dataclass whose direct dataclass fields become groups without a prefix.

    A wrong flag ends the program with exit code 2 and says what is allowed.
    """
    import tyro

    hints = typing.get_type_hints(kind, include_extras=True)
    fields: list[Any] = []
    for f in dataclasses.fields(kind):  # type: ignore[arg-type]
        hint = flat(hints[f.name]) if dataclasses.is_dataclass(hints[f.name]) else hints[f.name]
        value = getattr(default, f.name) if default is not None else _default_of(f)
        fields.append((f.name, hint, dataclasses.field(default_factory=lambda v=value: v)))
    shown = dataclasses.make_dataclass(kind.__name__, fields, frozen=True)
    shown.__doc__ = kind.__doc__
    arguments = sys.argv[1:] if argv is None else list(argv)
    text = _with_lines(description)
    parsed: Any = tyro.cli(shown, args=arguments, description=text, config=(tyro.conf.FlagCreatePairsOff,))
    return kind(**{name: getattr(parsed, name) for name, *_ in fields})


def _default_of(field: dataclasses.Field) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    assert field.default_factory is not dataclasses.MISSING
    return field.default_factory()


def option_value(argv: Sequence[str], name: str, default: str) -> str:
    """The value of one option before the real parse (the method decides which options exist)."""
    for i, word in enumerate(argv):
        if word == f"--{name}" and i + 1 < len(argv):
            return argv[i + 1]
        if word.startswith(f"--{name}="):
            return word.split("=", 1)[1]
    return default


@contextmanager
def user_errors() -> Iterator[None]:
    """Print a ValueError and exit with code 2; for the part of a command before long work starts.

    Each line of the message is filled by itself, and indented ones (trees, lists) stay as they are.
    """
    try:
        yield
    except (ValueError, FileNotFoundError, PermissionError) as error:
        width = min(120, max(60, os.get_terminal_size(2).columns if sys.stderr.isatty() else 100))
        lines = f"error: {error}".splitlines()
        text = [line if line.startswith(" ") else textwrap.fill(line, width, break_long_words=False) for line in lines]
        print("\n".join(text), file=sys.stderr)
        sys.exit(EXIT_USAGE)


def plain(console: Console) -> Callable[[str], None]:
    """Print lines as they are: paths are neither wrapped nor read as markup."""
    return partial(console.print, markup=False, soft_wrap=True)


def make_console() -> Console:
    """The terminal; logs and pipes, which have no width, get room for the tables."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else 150)


def quiet_libraries() -> None:
    """Keep the warnings of libraries out of the user's terminal; errors stay."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    for name in ("ray", "optuna", "mlflow", "alembic", "matplotlib"):
        logging.getLogger(name).setLevel(logging.ERROR)


def show_warnings(console: Console) -> None:
    """Our own warnings as one line each, said once, instead of Python's two with a place in the code."""
    said: set[str] = set()

    def show(message: Any, category: type[Warning], *_: Any, **__: Any) -> None:
        text = str(message)
        if issubclass(category, RuntimeWarning) and text not in said:
            said.add(text)
            console.print(f"[yellow]Warning:[/yellow] {escape(text)}", soft_wrap=True, highlight=False)

    warnings.simplefilter("always", RuntimeWarning)
    warnings.showwarning = show


def differences(mine: Any, stored: Any, default: Any) -> list[str]:
    """Fields that the user changed against a stored configuration; a default value counts as not given."""
    found = []
    for field in dataclasses.fields(mine):
        a, b, d = (getattr(x, field.name) for x in (mine, stored, default))
        if dataclasses.is_dataclass(a):
            found += [f"{field.name}.{name}" for name in differences(a, b, d)]
        elif a not in (b, d):
            found.append(field.name)
    return found
