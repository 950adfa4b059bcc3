"""The command line. Nothing here imports torch or Ray before a command needs it.

Logs and progress go to stderr; the last line of stdout is one JSON object; exit codes describe OUTPUT (errors.py).
"""

from __future__ import annotations

import os
import sys
import traceback
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated, Any

import typer

from context_diffusion import cli_pictures, cli_setup
from context_diffusion.config import GenerateJob
from context_diffusion.errors import (
    EXIT_INTERRUPTED,
    EXIT_OK,
    EXIT_ROWS_FAILED,
    EXIT_UNEXPECTED,
    REMEDIES,
    ContextDiffusionError,
    ErrorCode,
    JobError,
    classify,
)
from context_diffusion.log import LOG, LogFormat
from context_diffusion.ray_jobs import RayJobs, RayJobsError, known_address
from context_diffusion.strict import StrictModel
from context_diffusion.terminal import JobFile, Sets, errors, load_all, load_generating, print_summary, tell_error

if TYPE_CHECKING:
    from context_diffusion.training.config import TrainingJob

ABOUT = """Makes images that keep the layout of a query, wear the style of context images and follow a prompt; in batches.

Logs and progress go to stderr; the last line of stdout is one JSON object. Exit codes: 0 every row has its image, 3 some
rows failed, 2 the job is wrong, 4 too many rows failed, 75, 143, 130 and 1: stopped or broken off, run it again.
"""

FINISHED = (EXIT_OK, EXIT_ROWS_FAILED)

app = typer.Typer(add_completion=True, no_args_is_help=True, pretty_exceptions_enable=False, help=ABOUT)

Folder = Annotated[str, typer.Argument(metavar="OUTPUT", help="the output folder of a job")]
Address = Annotated[str | None, typer.Option(help="of the cluster's dashboard; default: RAY_API_SERVER_ADDRESS")]
RetryFailed = Annotated[bool, typer.Option(help="make the rows that failed anew")]
Extend = Annotated[bool, typer.Option(help="the manifest has grown at its end: make what is new")]
AcceptChange = Annotated[bool, typer.Option(help="go on with other versions of torch or diffusers")]
Grace = Annotated[float, typer.Option(min=0, help="seconds after SIGTERM in which the shards that were begun may end")]
LogFormats = Annotated[LogFormat, typer.Option(help="of stderr: lines for people, or a JSON object a line")]


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
        tell_error(str(error))
        print_summary({"exit": error.exit_code, "error": str(error)})
        return error.exit_code
    except (typer.Abort, KeyboardInterrupt):
        return EXIT_INTERRUPTED
    except Exception as error:
        if type(error).__module__.startswith(("click", "typer")):  # a wrong option or argument
            tell_error(error.format_message() if hasattr(error, "format_message") else str(error))
            return JobError.exit_code
        if LOG.format == LogFormat.JSON:
            tell_error("".join(traceback.format_exception(error)))
        else:
            errors.print_exception()
        return EXIT_UNEXPECTED


@app.command()
def run(
    job: JobFile,
    sets: Sets = None,
    address: Annotated[str | None, typer.Option(help="a Ray cluster; default: RAY_ADDRESS, else one started here")] = None,
    retry_failed: RetryFailed = False,
    extend: Extend = False,
    accept_change: AcceptChange = False,
    grace: Grace = 20.0,
    log_format: LogFormats = LogFormat.TEXT,
) -> None:
    """Runs a job, or what is missing of it; of a file with several one after another, as long as they finish.

    Example: context-diffusion run jobs/demo.yaml --set settings.num_inference_steps=30
    """
    LOG.format = log_format
    jobs, summaries = load_all(job, sets), list[dict[str, Any]]()
    options = {"address": address, "accept_change": accept_change, "retry_failed": retry_failed, "extend": extend}
    for number, one in enumerate(jobs, 1):
        LOG.job = _output_of(one)
        if len(jobs) > 1:
            LOG.tell("job", f"job {number} of {len(jobs)}: {_named(one)}", number=number, of=len(jobs))
        summaries.append(_run_job(one, options, grace, log_format))
        if "error" in summaries[-1]:
            tell_error(summaries[-1]["error"])
        else:
            LOG.tell("finished", **summaries[-1])
        if summaries[-1]["exit"] not in FINISHED:
            break
    code = summaries[-1]["exit"]
    if code in FINISHED:
        code = max(summary["exit"] for summary in summaries)
    print_summary({**summaries[-1], **({"jobs": summaries} if len(jobs) > 1 else {}), "exit": code})
    raise typer.Exit(code)


def _named(job: StrictModel) -> str:
    told = job.model_dump(include={"kind", "output"})
    return f"{told['kind']}, {told['output']}"


def _run_job(job: StrictModel, options: dict[str, Any], grace: float, log_format: LogFormat) -> dict[str, Any]:
    """-> the summary, `exit` in it."""
    if isinstance(job, GenerateJob):
        from context_diffusion.supervise import supervise

        return supervise(job, options, grace, log_format)
    try:
        return _run_other(job, options["address"])
    except Exception as error:
        return {**job.model_dump(include={"output"}), **classify(error)}


def _output_of(job: StrictModel) -> str:
    from context_diffusion.storage import normal

    return normal(job.model_dump(include={"output"})["output"])


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
    pictures: Annotated[str | None, typer.Option(metavar="FILE.png", help="makes their images, and tells time and cost")] = None,
    price_per_hour: Annotated[float | None, typer.Option(min=0, help="of an engine's machine, in your currency")] = None,
) -> None:
    """Checks job, model, manifest and storage; loads the pictures of some rows. Starts no Ray and leaves OUTPUT as it is. Of a
    file with several jobs each that generates.

    Example: context-diffusion validate jobs/demo.yaml --sample 4 --pictures sample.png --price-per-hour 2.5
    """
    from context_diffusion.making import png_uri
    from context_diffusion.trial import estimate_lines
    from context_diffusion.validate import validate_job

    if price_per_hour is not None and not pictures:
        raise JobError("--price-per-hour needs --pictures FILE.png: the time is measured by making the sample's images")
    sheet = png_uri("--pictures", pictures) if pictures else None
    jobs, told = load_generating(job, sets), []
    if sheet and len(jobs) > 1:
        raise JobError(f"{job} has {len(jobs)} jobs that generate: --pictures takes a file of one")
    for one in jobs:
        if len(jobs) > 1:
            errors.print(_named(one))
        told.append(found := validate_job(one, sample, sheet, price_per_hour))
        for problem in found["problems"]:
            errors.print(f"row {problem['id']}: {problem['error_code']}: {problem['error_message']}")
        for code in dict.fromkeys(problem["error_code"] for problem in found["problems"]):
            errors.print(f"{code}: {REMEDIES[ErrorCode(code)]}")
        errors.print(f"{found['rows']} rows in {found['shards']} shards; {len(found['problems'])} of those looked at would fail")
        for line in estimate_lines(found) if sheet else []:
            errors.print(line)
    print_summary({**told[-1], **({"jobs": told} if len(jobs) > 1 else {}), "exit": EXIT_OK})


@app.command()
def warm(
    job: JobFile,
    sets: Sets = None,
    address: Annotated[str | None, typer.Option(help="a Ray cluster; default: RAY_ADDRESS, else this machine")] = None,
) -> None:
    """Downloads a job's weights on each node that may have an engine, once a node or shared cache, and loads them once.

    Example: context-diffusion warm jobs/generate_sd15.yaml; on a cluster: ray job submit -- context-diffusion warm JOB
    """
    from context_diffusion.warming import warm as fill

    told = fill(list({str(one.model): one for one in load_generating(job, sets)}.values()), address)
    for node in told["nodes"]:
        errors.print(f"{node['address']}: {node['model']} is there ({node['seconds']} s)")
    if "error" in told:
        tell_error(told["error"])
    print_summary(told)
    raise typer.Exit(told["exit"])


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
    log_format: LogFormats = LogFormat.TEXT,
) -> None:
    """Runs a job on a cluster, through Ray's Jobs API. Submitted again while it runs, it is joined; later, resumed.

    Example: context-diffusion submit jobs/demo.yaml --address http://127.0.0.1:8265 --wait
    """
    from context_diffusion import ray_jobs
    from context_diffusion.jobfile import absolute
    from context_diffusion.submitting import local_paths, runtime_env, wheel_of

    LOG.format = log_format
    values, jobs = [absolute(one) for one in load_all(job, sets)], RayJobs.known(address)
    chosen = {"--retry-failed": retry_failed, "--extend": extend, "--accept-change": accept_change}
    variables = dict(pair.split("=", 1) for pair in env or [] if "=" in pair)
    if len(variables) < len(env or []):
        raise JobError(f"--env {' '.join(env or [])}: write KEY=VALUE, each KEY once")
    flags = tuple(flag for flag, on in chosen.items() if on)
    made = ray_jobs.submit(jobs, values, flags, runtime_env(jobs, wheel_of(wheel), variables), grace, log_format)
    LOG.job = made.output
    for path in dict.fromkeys(path for one in values for path in local_paths(one, jobs.address)):
        message = f"{path} is a path of this machine: every node of {jobs.address} must have it"
        LOG.tell("warning", f"warning: {message}", "warning", message=message)
    text = f"{made.id} {'runs already' if made.attached else 'is submitted'}; context-diffusion status {made.id}"
    LOG.tell("submitted", text, id=made.id, attached=made.attached)
    code = jobs.follow(made.id, LOG.relay) if wait else EXIT_OK
    print_summary({"submission_id": made.id, "attached": made.attached, "output": made.output, "exit": code})
    raise typer.Exit(code)


@app.command()
def stop(submission: Annotated[str, typer.Argument(metavar="SUBMISSION")], address: Address = None) -> None:
    """Stops a submitted job so that it can be resumed. Example: context-diffusion stop demo-0a1b2c3d-4e5f60-1"""
    stopped = RayJobs.known(address).stop(submission)
    errors.print(f"{submission} {'is told to stop' if stopped else 'does not run'}")
    print_summary({"submission_id": submission, "stopped": stopped, "exit": EXIT_OK})


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
    print_summary({**({"submission": job} if job else {}), **told.values, "exit": EXIT_OK})


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
    print_summary({**summary, "exit": EXIT_OK})


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
    print_summary({"output": opened.root, "url": url, "exit": EXIT_OK})


@app.command()
def verify(output: Folder) -> None:
    """Checks every part, picture, count and checksum of a finished OUTPUT. Example: context-diffusion verify build/demo"""
    from context_diffusion.closing import verify as find_wrong

    opened = _open(output)
    wrong = find_wrong(opened)
    for line in wrong:
        errors.print(line)
    code = EXIT_UNEXPECTED if wrong else EXIT_OK
    print_summary({"output": opened.root, "wrong": len(wrong), "exit": code})
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
    print_summary({**told, "exit": EXIT_OK})


def _open(root: str) -> Any:
    from context_diffusion.output import Output
    from context_diffusion.storage import Storage, normal

    output = Output(normal(root), Storage())
    if not output.storage.exists(output.plan):
        raise JobError(f"{root}: no plan.json there; is it the `output:` of a job that was run?")
    return output


for command in (cli_setup.manifest, cli_setup.doctor, cli_pictures.preview, cli_pictures.reproduce):
    app.command()(command)


if __name__ == "__main__":
    main()
