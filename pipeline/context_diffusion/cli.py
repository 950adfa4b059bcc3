"""The command line. Nothing here imports torch or Ray before a command needs it.

Logs and progress go to stderr; the last line of stdout is one JSON object; exit codes describe OUTPUT (errors.py).
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from context_diffusion.config import GenerateJob
from context_diffusion.errors import (
    EXIT_INTERRUPTED,
    EXIT_OK,
    EXIT_UNEXPECTED,
    ContextDiffusionError,
    JobError,
)
from context_diffusion.ray_jobs import RayJobs, RayJobsError, known_address
from context_diffusion.strict import StrictModel

if TYPE_CHECKING:
    from context_diffusion.training.config import TrainingJob

ABOUT = """Makes images that keep the layout of a query, wear the style of context images and follow a prompt; in batches.

Logs and progress go to stderr; the last line of stdout is one JSON object. Exit codes: 0 every row has its image, 3 some
rows failed, 2 the job is wrong, 4 too many rows failed, 75, 143, 130 and 1: stopped or broken off, run it again.
"""

app = typer.Typer(add_completion=True, no_args_is_help=True, pretty_exceptions_enable=False, help=ABOUT)
errors = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)

JobFile = Annotated[str, typer.Argument(metavar="JOB", help="a job file, YAML or JSON")]
Folder = Annotated[str, typer.Argument(metavar="OUTPUT", help="the output folder of a job")]
Address = Annotated[str | None, typer.Option(help="of the cluster's dashboard; default: RAY_API_SERVER_ADDRESS")]
RetryFailed = Annotated[bool, typer.Option(help="make the rows that failed anew")]
Extend = Annotated[bool, typer.Option(help="the manifest has grown at its end: make what is new")]
AcceptChange = Annotated[bool, typer.Option(help="go on with other versions of torch or diffusers")]
Grace = Annotated[float, typer.Option(min=0, help="seconds after SIGTERM in which the shards that were begun may end")]
Sets = Annotated[list[str] | None, typer.Option("--set", metavar="key=value", help="overrides a key: settings.seed=7")]


def main() -> None:
    """The process: a command and its exit code. Ends at once: pyarrow's and Ray's threads may abort a process that
    waits for its modules' end (signal 6, 3 of 25 short runs here), and the code would be lost."""
    code = _run()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # nobody reads any more
            stream.flush()
    os._exit(code)


def _run() -> int:
    """Runs a command; errors that are meant become one message and their exit code."""
    try:
        return int(app(standalone_mode=False) or EXIT_OK)  # typer.Exit comes back as its code
    except (ContextDiffusionError, RayJobsError) as error:
        errors.print(f"error: {error}")
        _print({"exit": error.exit_code, "error": str(error)})
        return error.exit_code
    except (typer.Abort, KeyboardInterrupt):
        return EXIT_INTERRUPTED
    except Exception as error:
        if type(error).__module__.startswith(("click", "typer")):  # a wrong option or argument
            errors.print(f"error: {error.format_message() if hasattr(error, 'format_message') else error}")
            return JobError.exit_code
        errors.print_exception()
        return EXIT_UNEXPECTED


def _print(summary: dict[str, Any]) -> None:
    print(json.dumps(summary), flush=True)


def _load(job: str, sets: list[str] | None) -> StrictModel:
    from context_diffusion.jobfile import load_job

    return load_job(job, sets)


def _load_generate(job: str, sets: list[str] | None) -> GenerateJob:
    loaded = _load(job, sets)
    if not isinstance(loaded, GenerateJob):
        raise JobError(f"{job}: this command takes a job of kind generate")
    return loaded


@app.command()
def run(
    job: JobFile,
    sets: Sets = None,
    address: Annotated[str | None, typer.Option(help="a Ray cluster; default: RAY_ADDRESS, else one started here")] = None,
    retry_failed: RetryFailed = False,
    extend: Extend = False,
    accept_change: AcceptChange = False,
    grace: Grace = 20.0,
) -> None:
    """Runs a job, or what is missing of it.

    Example: context-diffusion run jobs/demo.yaml --set settings.num_inference_steps=30
    """
    loaded = _load(job, sets)
    if isinstance(loaded, GenerateJob):
        from context_diffusion.supervise import supervise

        options = {"address": address, "accept_change": accept_change, "retry_failed": retry_failed, "extend": extend}
        summary = supervise(loaded, options, grace)
    else:
        summary = _run_other(loaded, address)
    if "error" in summary:
        errors.print(f"error: {summary['error']}")
    _print(summary)
    raise typer.Exit(summary["exit"])


def _run_other(job: StrictModel, address: str | None) -> dict[str, Any]:
    """The kinds that need no supervisor. -> the summary, `exit` in it."""
    from context_diffusion.evaluation.config import EvaluateJob
    from context_diffusion.training.config import TrainingJob

    if isinstance(job, EvaluateJob):
        from context_diffusion.evaluation.run import run_evaluate

        return run_evaluate(job)
    assert isinstance(job, TrainingJob)
    return {"exit": EXIT_OK, **_train(job, address)}


def _train(job: TrainingJob, address: str | None) -> dict[str, Any]:
    if job.workers == 1 and not address:
        from context_diffusion.training import run_training

        return run_training(job)
    from context_diffusion.ray_train import train_on_ray

    return train_on_ray(job, address)


@app.command()
def validate(
    job: JobFile,
    sets: Sets = None,
    sample: Annotated[int, typer.Option(min=0, help="rows whose pictures are loaded")] = 8,
) -> None:
    """Checks job, model, manifest and storage; loads the pictures of some rows. Starts no Ray and writes nothing.

    Example: context-diffusion validate jobs/demo.yaml --sample 20
    """
    from context_diffusion.validate import validate_job

    found = validate_job(_load_generate(job, sets), sample)
    for problem in found["problems"]:
        errors.print(f"row {problem['id']}: {problem['error_code']}: {problem['error_message']}")
    errors.print(f"{found['rows']} rows in {found['shards']} shards; {len(found['problems'])} of those looked at would fail")
    _print({**found, "exit": EXIT_OK})


@app.command()
def submit(
    job: JobFile,
    sets: Sets = None,
    address: Address = None,
    wait: Annotated[bool, typer.Option("--wait", help="follows its log and ends with its code")] = False,
    wheel: Annotated[str | None, typer.Option(metavar="FILE|build", help="ships the package, where the image lacks it")] = None,
    env: Annotated[list[str] | None, typer.Option(metavar="KEY=VALUE", help="for the job's processes")] = None,
    retry_failed: RetryFailed = False,
    extend: Extend = False,
    accept_change: AcceptChange = False,
    grace: Grace = 20.0,
) -> None:
    """Runs a job on a cluster, through Ray's Jobs API. Submitted again while it runs, it is joined; later, resumed.

    Example: context-diffusion submit jobs/demo.yaml --address http://127.0.0.1:8265 --wait
    """
    from context_diffusion import ray_jobs
    from context_diffusion.submitting import absolute, local_paths, runtime_env, wheel_of

    values, jobs = absolute(_load(job, sets)), RayJobs.known(address)
    chosen = {"--retry-failed": retry_failed, "--extend": extend, "--accept-change": accept_change}
    variables = dict(pair.split("=", 1) for pair in env or [] if "=" in pair)
    if len(variables) < len(env or []):
        raise JobError(f"--env {' '.join(env or [])}: write KEY=VALUE, each KEY once")
    flags = tuple(flag for flag, on in chosen.items() if on)
    made = ray_jobs.submit(jobs, values, flags, runtime_env(jobs, wheel_of(wheel), variables), grace)
    for path in local_paths(values, jobs.address):
        errors.print(f"warning: {path} is a path of this machine: every node of {jobs.address} must have it")
    errors.print(f"{made.id} {'runs already' if made.attached else 'is submitted'}; context-diffusion status {made.id}")
    code = jobs.follow(made.id, errors.print) if wait else EXIT_OK
    _print({"submission_id": made.id, "attached": made.attached, "output": values["output"], "exit": code})
    raise typer.Exit(code)


@app.command()
def stop(submission: Annotated[str, typer.Argument(metavar="SUBMISSION")], address: Address = None) -> None:
    """Stops a submitted job so that it can be resumed. Example: context-diffusion stop demo-0a1b2c3d-4e5f60-1"""
    stopped = RayJobs.known(address).stop(submission)
    errors.print(f"{submission} {'is told to stop' if stopped else 'does not run'}")
    _print({"submission_id": submission, "stopped": stopped, "exit": EXIT_OK})


@app.command()
def status(
    output: Annotated[str, typer.Argument(metavar="OUTPUT|SUBMISSION", help="an output folder, or what `submit` named")],
    address: Address = None,
) -> None:
    """How far a job is, from the parts of its OUTPUT, whatever became of its run.

    Example: context-diffusion status build/demo
    """
    from context_diffusion.output import Output
    from context_diffusion.storage import Storage, normal
    from context_diffusion.watching import progress_of, submission_of

    opened, job = Output(normal(output), Storage()), None
    if not opened.storage.exists(opened.plan):
        job = submission_of(output, RayJobs.known(address) if address or known_address() else None)
        opened = Output(job["output"], Storage())
    told = progress_of(opened)
    if job:
        errors.print(f"{output}: {job['status']}{': ' + job['message'] if job['message'] else ''}")
    for line in told.lines:
        errors.print(line)
    _print({**({"submission": job} if job else {}), **told.values, "exit": EXIT_OK})


@app.command()
def report(
    output: Folder,
    price_per_hour: Annotated[float | None, typer.Option(min=0, help="of all the run's machines: gives cost_per_image")] = None,
) -> None:
    """(Re)builds summary.json and report.html. Example: context-diffusion report build/demo --price-per-hour 2.5"""
    from context_diffusion.report import rebuild

    opened = _open(output)
    summary = rebuild(opened, price_per_hour)
    errors.print(f"{opened.report}")
    _print({**summary, "exit": EXIT_OK})


@app.command()
def view(
    output: Folder,
    port: Annotated[int, typer.Option(min=0, max=65535, help="on 127.0.0.1; 0: any that is free")] = 8000,
) -> None:
    """Shows all rows of an OUTPUT in the browser, local or in an object store. Example: context-diffusion view build/demo"""
    try:
        from context_diffusion.report.serving import serve
    except ModuleNotFoundError as error:
        raise JobError(f"view needs {error.name}: pip install 'context-diffusion[view]'") from None

    opened = _open(output)
    url = serve(opened, port, errors.print)
    _print({"output": opened.root, "url": url, "exit": EXIT_OK})


@app.command()
def verify(output: Folder) -> None:
    """Checks every part, picture, count and checksum of a finished OUTPUT. Example: context-diffusion verify build/demo"""
    from context_diffusion.closing import verify as find_wrong

    opened = _open(output)
    wrong = find_wrong(opened)
    for line in wrong:
        errors.print(line)
    code = EXIT_UNEXPECTED if wrong else EXIT_OK
    _print({"output": opened.root, "wrong": len(wrong), "exit": code})
    raise typer.Exit(code)


@app.command()
def compact(
    output: Folder,
    to: Annotated[str, typer.Option(metavar="DIR", help="an empty folder, a path or URL")],
    rows: Annotated[int, typer.Option(min=1, help="of a file; it has fewer where it would be larger than 256 MiB")] = 10_000,
    partition_by: Annotated[str | None, typer.Option(metavar="COLUMN", help="a folder for each of its values")] = None,
) -> None:
    """Copies a finished OUTPUT into few large Parquet files with the pictures in them.

    Example: context-diffusion compact build/demo --to build/demo-compact --partition-by status
    """
    from context_diffusion.compact import compact as merge
    from context_diffusion.output import Output
    from context_diffusion.storage import normal

    opened = _open(output)
    told = merge(opened, Output(normal(to), opened.storage), rows, partition_by)
    errors.print(f"{told['rows']} rows in {told['files']} files: {told['output']}")
    _print({**told, "exit": EXIT_OK})


def _open(root: str) -> Any:
    from context_diffusion.output import Output
    from context_diffusion.storage import Storage, normal

    output = Output(normal(root), Storage())
    if not output.storage.exists(output.plan):
        raise JobError(f"{root}: no plan.json there; is it the `output:` of a job that was run?")
    return output


if __name__ == "__main__":
    main()
