"""The ``weightdiff`` command: its own commands, and those that other packages register.

A package joins with an entry point in the group ``weightdiff.commands``; it is imported only when
its command is named or listed, so nothing here depends on it.
"""

import os
import sys
import traceback
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

import click

from weightdiff import __version__

_OWN = {"compare": "weightdiff.cli.compare:compare", "refusal": "weightdiff.cli.refusal:refusal"}
_GROUP = "weightdiff.commands"


def _locations() -> dict[str, str]:
    """Map every command's name to its ``module:attribute``."""
    return {point.name: point.value for point in entry_points(group=_GROUP)} | _OWN


class Main(click.Group):
    """A group that imports a command when it is asked for and turns surprises into sentences."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Name the commands, in the order in which a project uses them."""
        order = ["pipeline", "train", "compare", "refusal", "report"]
        names = _locations()
        return [n for n in order if n in names] + sorted(set(names) - set(order))

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        """Import the command ``name``, or return None when there is none."""
        location = _locations().get(name)
        if location is None:
            return None
        module, _, attribute = location.partition(":")
        command: click.Command = getattr(import_module(module), attribute)
        return command

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Accept ``--debug`` anywhere on the line."""
        head, bar, tail = _split_at(args, "--")
        ctx.obj = {"debug": "--debug" in head}
        return super().parse_args(ctx, [a for a in head if a != "--debug"] + bar + tail)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; without ``--debug`` a failure is one line on stderr, exit code 1."""
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort) as error:
            if ctx.obj["debug"] and isinstance(error, click.ClickException):
                traceback.print_exc()
            raise
        except BrokenPipeError:
            # The reader (head, less) has closed: not an error, and nothing more can be said.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            ctx.exit(1)
        except KeyboardInterrupt:
            raise click.ClickException("interrupted; nothing half-written was kept") from None
        except Exception as error:
            if ctx.obj["debug"]:
                raise
            raise click.ClickException(_sentence(error)) from error


def _split_at(args: list[str], separator: str) -> tuple[list[str], list[str], list[str]]:
    index = args.index(separator) if separator in args else len(args)
    return args[:index], args[index : index + 1], args[index + 1 :]


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}"
    text = " ".join(str(error).split()) or "no message"
    return f"{type(error).__name__}: {text} (run again with --debug for the traceback)"


@click.group(
    cls=Main,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "color": False if os.environ.get("NO_COLOR") else None,
    },
)
@click.version_option(__version__, prog_name="weightdiff")
def main() -> None:
    """Measure what alignment changed in a model's weights, and how that relates to refusal.

    Every command takes --debug, which shows the traceback of a failure.
    """
