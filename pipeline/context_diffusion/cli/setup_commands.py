"""The commands before a run: `doctor`, `init`, `manifest`, `validate`."""

from __future__ import annotations

import shlex
from typing import Annotated, Any, Literal

import typer

from context_diffusion.cli.options import (
    JobFile,
    Sets,
    load_generating,
    print_summary,
    stderr,
    summary_of_all,
    title_of,
    unknown_words_line,
)
from context_diffusion.core.errors import EXIT_JOB, EXIT_OK, REMEDIES, ErrorCode, JobError

PairMode = Literal["all", "zip", "random"]
PAIR_HELP = "all: each query with each context; zip: in order; random: contexts drawn for each query"
QUERIES_HELP = "the folder of query images, a path or URL"
CONTEXTS_HELP = "the folder of context images, or of sub-folders with one row's contexts each"
Prompts = Annotated[
    str | None,
    typer.Option(metavar="FILE", help="a text file with one prompt per line, paired as the images are"),
]
ContextsPerRow = Annotated[
    int | None, typer.Option(min=1, help="number of contexts; default: 1, or all of a sub-folder")
]
PairSeed = Annotated[int, typer.Option(help="seed of random choices")]


def doctor(
    urls: Annotated[
        list[str] | None,
        typer.Argument(metavar="[URL...]", help="manifests or folders that must be readable"),
    ] = None,
    output: Annotated[str | None, typer.Option(metavar="URL", help="a folder that must be writable")] = None,
    model: Annotated[
        str, typer.Option(help="the model whose weights are checked, as `model:` of a job")
    ] = "bundled",
    address: Annotated[
        str | None,
        typer.Option(
            help="address of a cluster or of its dashboard; default: RAY_API_SERVER_ADDRESS, else RAY_ADDRESS"
        ),
    ] = None,
) -> None:
    """Check the environment of a job.

    Starts no Ray and downloads nothing. Exit code 2 if something is broken.

    Example: context-diffusion doctor s3://bucket/rows --output s3://bucket/out --model sd15
    """
    from context_diffusion.cli.doctor import run_checks

    checks = []
    for check in run_checks(urls or [], output, model, address):
        stderr.print(f"{'ok    ' if check.ok else 'BROKEN'} {check.name}: {check.message}")
        checks.append({"name": check.name, "ok": check.ok, "told": check.message, **check.values})
    code = EXIT_OK if all(check["ok"] for check in checks) else EXIT_JOB
    print_summary({"checks": checks, "exit": code})
    raise typer.Exit(code)


def init(
    queries: Annotated[str, typer.Argument(metavar="QUERIES", help=QUERIES_HELP)],
    contexts: Annotated[str, typer.Argument(metavar="CONTEXTS", help=CONTEXTS_HELP)],
    pair: Annotated[PairMode, typer.Option(help=PAIR_HELP)] = "all",
    model: Annotated[
        str, typer.Option(help="bundled, flux2-klein, sdxl, sd15, a folder or a hub id")
    ] = "bundled",
    output: Annotated[str, typer.Option(metavar="DIR", help="the folder of the job's results")] = "out",
    job: Annotated[str, typer.Option(metavar="FILE", help="the job file to write, .yaml")] = "job.yaml",
    rows: Annotated[
        str, typer.Option(metavar="FILE", help="the manifest to write: .parquet, .jsonl or .csv")
    ] = "rows.parquet",
    prompts: Prompts = None,
    contexts_per_row: ContextsPerRow = None,
    seed: PairSeed = 0,
) -> None:
    """Write a manifest and a commented job file from two folders of images.

    The job file can be run as it is; its comments show the keys that are changed most.

    Example: context-diffusion init photos paintings --pair zip --output out
    """
    from context_diffusion.cli.job_template import write_job
    from context_diffusion.inputs.from_folders import Pairing

    pairing = Pairing(queries, contexts, pair, contexts_per_row, prompts, seed)
    summary = write_job(pairing, rows, job, model, output)
    stderr.print(f"{summary['rows']} rows: {summary['manifest']}")
    stderr.print(f"job file: {job}")
    command_job = shlex.quote(job)
    stderr.print(f"check it: context-diffusion validate {command_job} --sample 2 --pictures sample.png")
    stderr.print(f"run it:   context-diffusion run {command_job}")
    print_summary({**summary, "exit": EXIT_OK})


def manifest(
    queries: Annotated[str, typer.Option(metavar="DIR", help=QUERIES_HELP)],
    contexts: Annotated[str, typer.Option(metavar="DIR", help=CONTEXTS_HELP)],
    pair: Annotated[PairMode, typer.Option(help=PAIR_HELP)],
    out: Annotated[str, typer.Option(metavar="FILE", help="the manifest to write: .parquet, .jsonl or .csv")],
    prompts: Prompts = None,
    contexts_per_row: ContextsPerRow = None,
    seed: PairSeed = 0,
) -> None:
    """Write a manifest from two folders of images.

    The same folders give the same manifest.

    Example: context-diffusion manifest --queries photos --contexts paintings --pair all --out rows.parquet
    """
    from context_diffusion.inputs.from_folders import Pairing, write_manifest

    summary = write_manifest(Pairing(queries, contexts, pair, contexts_per_row, prompts, seed), out)
    stderr.print(f"{summary['rows']} rows: {summary['manifest']}")
    if summary["allow"]:
        allow = ", ".join(summary["allow"])
        stderr.print(f"some images are outside the manifest's folder; the job needs `allow: [{allow}]`")
    print_summary({**summary, "exit": EXIT_OK})


def validate(
    job: JobFile,
    sets: Sets = None,
    sample: Annotated[int, typer.Option(min=0, help="number of rows whose images are loaded")] = 8,
    pictures: Annotated[
        str | None,
        typer.Option(
            metavar="FILE.png",
            help="generate the sampled rows as a contact sheet and estimate the job's time",
        ),
    ] = None,
) -> None:
    """Check the job, model, manifest, storage and OUTPUT, and a sample of the rows.

    Starts no Ray and leaves OUTPUT unchanged.
    Exit code 2 if `run` would not start, 3 if sampled rows fail,
    4 if more rows than max_failed allows would fail.
    In a file of several jobs, checks each generate job.

    Example: context-diffusion validate jobs/demo.yaml --sample 4 --pictures sample.png
    """
    from context_diffusion.generation.local_model import png_uri
    from context_diffusion.generation.validate import validate_job

    sheet = png_uri("--pictures", pictures) if pictures else None
    jobs = load_generating(job, sets)
    if sheet and len(jobs) > 1:
        raise JobError(f"{job} has {len(jobs)} generate jobs: --pictures needs a file with one job")
    summaries = []
    for generate_job in jobs:
        if len(jobs) > 1:
            stderr.print(title_of(generate_job))
        summary = validate_job(generate_job, sample, sheet)
        _print_validation(summary, with_estimate=sheet is not None)
        summaries.append(summary)
    code = max(summary["exit"] for summary in summaries)
    print_summary(summary_of_all(summaries, code, len(jobs)))
    raise typer.Exit(code)


def _print_validation(summary: dict[str, Any], with_estimate: bool) -> None:
    """Print the warnings, the problems with their remedies, the counts and the estimate."""
    from context_diffusion.generation.estimate import estimate_lines

    problems = summary["problems"]
    for line in summary["warnings"]:
        stderr.print(f"warning: {line}")
    if rows := summary["unknown_words"]:
        stderr.print(f"warning: {unknown_words_line(rows, summary['rows_by_unknown_word'])}")
    for problem in problems:
        stderr.print(f"row {problem['id']}: {problem['error_code']}: {problem['error_message']}")
    for code in dict.fromkeys(problem["error_code"] for problem in problems):
        stderr.print(f"{code}: {REMEDIES[ErrorCode(code)]}")
    failed = f"{len(problems)} of {summary['sampled']} sampled rows failed validation"
    stderr.print(f"{summary['rows']} rows in {summary['shards']} shards; {failed}")
    for line in estimate_lines(summary) if with_estimate else []:
        stderr.print(line)
