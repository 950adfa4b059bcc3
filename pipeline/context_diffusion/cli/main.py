"""The command line. Commands import torch and Ray only when they need them.

Logs and progress go to stderr; the last line of stdout is one JSON object; exit codes describe OUTPUT
(core/errors.py).
"""

from __future__ import annotations

import importlib.metadata
import os
import sys
import traceback
from contextlib import suppress
from typing import Annotated

import typer

from context_diffusion.cli import (
    cluster_commands,
    image_commands,
    output_commands,
    run_command,
    setup_commands,
)
from context_diffusion.cli.options import print_error, print_summary, stderr
from context_diffusion.core.errors import (
    EXIT_INTERRUPTED,
    EXIT_OK,
    EXIT_UNEXPECTED,
    ContextDiffusionError,
    JobError,
)
from context_diffusion.core.event_log import LOG, LogFormat, open_standard_streams
from context_diffusion.ray_jobs import RayJobsError

ABOUT = """Generates images that keep the layout of a query image, take the style of context images
and follow a prompt, in batches on Ray.

Logs and progress go to stderr; the last line of stdout is one JSON object.

Exit codes: 0 every row has its image, 3 some rows failed,
2 the job is invalid, 4 too many rows failed, 75 an external error,
130 and 143 stopped, 1 an unexpected error.
After 75, 130, 143 and 1 rerun the same command to resume.
"""

app = typer.Typer(
    add_completion=True,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help=ABOUT,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(is_requested: bool) -> None:
    if is_requested:
        print(importlib.metadata.version("context-diffusion"))
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="print the version and exit"),
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command of the process's arguments and end the process with its exit code.

    Ends at once, since threads of pyarrow and Ray may abort a process that waits for the end of its modules
    (signal 6, 3 of 25 short runs here), and the exit code would be lost."""
    open_standard_streams()
    code = _run()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # the reader is gone
            stream.flush()
    os._exit(code)


def _run() -> int:
    """Run a command. Errors that are raised on purpose become one message and their exit code."""
    try:
        return int(app(standalone_mode=False) or EXIT_OK)  # typer.Exit comes back as its code
    except (ContextDiffusionError, RayJobsError) as error:
        print_error(str(error))
        print_summary({"exit": error.exit_code, "error": str(error)})
        return error.exit_code
    except (typer.Abort, KeyboardInterrupt):
        return EXIT_INTERRUPTED
    except Exception as error:
        if type(error).__module__.startswith(("click", "typer")):  # a wrong option or argument
            text = error.format_message() if hasattr(error, "format_message") else str(error)
            print_error(text.replace("Value error, ", ""))
            return JobError.exit_code
        if LOG.format == LogFormat.JSON:
            print_error("".join(traceback.format_exception(error)))
        else:
            stderr.print_exception()
        return EXIT_UNEXPECTED


# In the order of work, which is the order of the help.
for command in (
    *(setup_commands.doctor, setup_commands.init, setup_commands.manifest, setup_commands.validate),
    *(image_commands.preview, run_command.run),
    *(cluster_commands.submit, cluster_commands.status, cluster_commands.stop, cluster_commands.warm),
    *(output_commands.report, output_commands.view, output_commands.verify, output_commands.compact),
    image_commands.reproduce,
):
    app.command()(command)


if __name__ == "__main__":
    main()
