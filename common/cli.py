"""The `lichen` command: names to import strings, loaded only when asked for, so that `lichen --help` and an idle agent stay light."""

from __future__ import annotations

import importlib
import logging
import os
import sys
import traceback
from importlib.metadata import version
from typing import Any

import click
import typer
from rich.console import Console
from rich.logging import RichHandler

from lichen.common.disk import disk_failed
from lichen.common.errors import Code, LichenError

COMMANDS = {
    "demo": ("lichen.simulations.demo:app", "Run a real federation on this machine: a coordinator and four agents over mutual TLS."),
    "simulate": ("lichen.simulations.cli:app", "Run a plan on this machine, without a network."),
    "plan": ("lichen.common.plan_cli:app", "Make and check plans."),
    "coordinator": ("lichen.coordinator.cli:app", "The service that operators run."),
    "client": ("lichen.client.cli:app", "The agent that data owners run."),
    "export": ("lichen.coordinator.export:app", "Take a run's model out, for transformers and peft."),
    "report": ("lichen.coordinator.report:app", "Show a run, or write its report.html again."),
    "audit": ("lichen.simulations.audit:app", "Try to refute a finished run's privacy."),
    "bench": ("lichen.simulations.benchmarks.cli:app", "Measure this machine."),
}


class _Lazy(click.Group):
    """A group whose commands are imported when they are called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, _, name = COMMANDS[cmd_name][0].partition(":")
        found: Any = getattr(importlib.import_module(module), name)
        command: click.Command = typer.main.get_command(found)
        command.name = cmd_name
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, told) for name, (_, told) in COMMANDS.items()])


@click.group(
    cls=_Lazy,
    help="Federated, private, incremental fine-tuning of Transformers.\n\nStart with: lichen demo --out DIR",
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.option("-v", "--verbose", is_flag=True, help="Log more, and show tracebacks.")
@click.version_option(version("lichen"), prog_name="lichen")
def _root(verbose: bool) -> None:
    level = logging.DEBUG if verbose else logging.WARNING
    handler = RichHandler(console=Console(stderr=True), show_path=False, rich_tracebacks=False)
    logging.basicConfig(level=level, format="%(message)s", datefmt="%X", handlers=[handler])
    for noisy in ("asyncio", "filelock", "httpx", "httpcore", "urllib3", "matplotlib", "absl", "fsspec"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def main() -> None:
    """Run the command line, and leave with the error's number."""
    # before anything imports flwr: lichen sends no telemetry, nor does what it is built on
    for switch, value in (("FLWR_TELEMETRY_ENABLED", "0"), ("FLWR_DISABLE_UPDATE_CHECK", "1"), ("RAY_USAGE_STATS_ENABLED", "0")):
        os.environ.setdefault(switch, value)
    verbose = any(argument in {"-v", "--verbose"} for argument in sys.argv[1:2])
    try:
        status = _root(standalone_mode=False)
    except LichenError as error:
        if verbose:
            traceback.print_exc()
        click.secho(str(error), fg="red", err=True)
        status = int(error.code)
    except click.exceptions.Exit as leave:
        status = leave.exit_code
    except click.ClickException as error:
        error.show()
        status = error.exit_code
    except (KeyboardInterrupt, click.Abort):
        click.secho(str(LichenError(Code.INTERRUPTED, "interrupted; what was finished is on disk")), fg="yellow", err=True)
        status = int(Code.INTERRUPTED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # a reader such as `head` has seen enough
        status = 0
    except Exception as error:
        if verbose:
            traceback.print_exc()
        told = _unforeseen(error)
        click.secho(str(told), fg="red", err=True)
        status = int(told.code)
    sys.exit(status if isinstance(status, int) else 0)


def _unforeseen(error: Exception) -> LichenError:
    if disk_failed(error):
        fix = "Free some space; a run goes on from its last checkpoint by the same command with --resume."
        return LichenError(Code.OUTPUT_UNUSABLE, f"the disk failed: {error}", fix=fix)
    return LichenError(Code.INTERNAL, f"{type(error).__name__}: {error}", fix="Run `lichen --verbose …` for the traceback.")


if __name__ == "__main__":
    main()
