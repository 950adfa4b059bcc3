"""Reads a job file: YAML or JSON text to one or several checked jobs. All errors are reported at once.

Scalars follow YAML 1.2 where PyYAML's YAML 1.1 surprises: 1e-5 is a number, `no` is a string, 012 is 12.
"""

from __future__ import annotations

import json
import re
import typing
from collections import Counter
from collections.abc import Hashable, Iterable
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from context_diffusion.core.errors import ConfigError
from context_diffusion.core.evaluate_job import EvaluateJob
from context_diffusion.core.generate_job import GenerateJob
from context_diffusion.core.job_base import StrictModel, problem_of
from context_diffusion.core.model_parts import PRESETS
from context_diffusion.core.settings import did_you_mean
from context_diffusion.core.training_job import FinetuneJob, TrainJob
from context_diffusion.core.uris import normal

KINDS: dict[str, type[StrictModel]] = {
    "generate": GenerateJob,
    "train": TrainJob,
    "finetune": FinetuneJob,
    "evaluate": EvaluateJob,
}

# Keys that hold paths or URIs, and keys that hold a path or a name.
URIS = ("manifest", "images", "compare", "reference", "output", "data", "allow")
NAMES = ("model", "judge", "encoder")
# Keys of `model:` whose values may look like the name of a folder.
NO_PATHS = ("few_steps", "variant", "dtype", "normalization", "prompt_template", "revision")
BUILT_IN = ("bundled", *PRESETS)


class _Loader(yaml.SafeLoader):
    """A SafeLoader with the scalars of YAML 1.2. Refuses duplicate keys."""

    yaml_implicit_resolvers = {}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(
                    None, None, "a list or mapping is no key", key.start_mark
                )
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"duplicate key {key.value!r}", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _scalar(tag: str, pattern: str, first: str) -> None:
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(f"^(?:{pattern})$"), list(first))


_scalar("bool", "true|True|TRUE|false|False|FALSE", "tTfF")
_scalar("null", "~|null|Null|NULL", "~nN")
_Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile("^$"), [""])
_scalar("int", r"[-+]?[0-9]+", "-+0123456789")
_scalar(
    "float",
    r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf)|\.(?:nan|NaN)",
    "-+.0123456789",
)
_Loader.add_constructor("tag:yaml.org,2002:int", lambda _, node: int(node.value))
_Loader.add_constructor(
    "tag:yaml.org,2002:float",
    lambda _, node: float(node.value.lower().replace(".inf", "inf").replace(".nan", "nan")),
)


def parse(text: str) -> Any:
    """Parse YAML text, or JSON, which is YAML. Raises yaml.YAMLError."""
    return yaml.load(text, Loader=_Loader)


def load_jobs(path: str, overrides: list[str] | None = None) -> list[StrictModel]:
    """Read and check a file of one or several jobs: YAML documents, or a list. An override applies to each
    job whose kind has the key.

    Raises ConfigError with all errors of all jobs.
    """
    documents = _documents(path)
    for override in overrides or []:
        key = re.split("[.=]", override)[0]
        with_key = [values for values in documents if key in _keys(values)]
        if key == "output" and len(with_key) > 1:
            raise ConfigError(
                f"--set {override}: {path} has {len(with_key)} jobs, and each needs its own output"
            )
        for values in with_key or documents:  # a key that no kind has is an error of each job
            _override(values, override)
    jobs = []
    errors = []
    for number, values in enumerate(documents, 1):
        try:
            jobs.append(check_job(values, path if len(documents) == 1 else f"{path}: job {number}"))
        except ConfigError as error:
            errors.append(str(error))
    errors = errors or _shared_outputs(path, documents)
    if errors:
        raise ConfigError("\n".join(errors))
    return jobs


def _keys(values: dict[str, Any]) -> Iterable[str]:
    """Return the keys that a job of this kind may have; none for an unknown kind."""
    model = KINDS.get(str(values.get("kind")))
    return model.model_fields if model else ()


def _documents(path: str) -> list[dict[str, Any]]:
    """Read the jobs of a file without checking their keys. Raises ConfigError."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the job file: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not a YAML or JSON file: it is not UTF-8 text: {error}") from error
    try:
        documents = list(yaml.load_all(text, Loader=_Loader))
        json.dumps(documents, default=str)  # a value that contains itself is an error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not YAML or JSON: {error}") from error
    if len(documents) == 1 and isinstance(documents[0], list):
        documents = documents[0]
    if not documents:
        raise ConfigError(f"{path}: the file has no job")
    for number, values in enumerate(documents, 1):
        if not isinstance(values, dict):
            where = path if len(documents) == 1 else f"{path}: job {number}"
            raise ConfigError(f"{where}: a job is a mapping of keys to values, got {type(values).__name__}")
    return documents


def _shared_outputs(path: str, documents: list[dict[str, Any]]) -> list[str]:
    """List the jobs that would write to the `output:` of an earlier job."""
    first_job: dict[str, int] = {}
    errors = []
    for number, values in enumerate(documents, 1):
        earlier = first_job.setdefault(normal(values["output"]), number)
        if earlier < number:
            errors.append(
                f"{path}: job {number}: output: {values['output']} is also job {earlier}'s; choose another"
            )
    return errors


def check_job(values: dict[str, Any], where: str = "job") -> StrictModel:
    """Return the checked job of a mapping, by its `kind`. Raises ConfigError with all errors.

    where: how messages name the job."""
    kind = values.get("kind")
    if not isinstance(kind, str) or kind not in KINDS:
        raise ConfigError(f"{where}: kind: {kind!r} is unknown; {did_you_mean(str(kind), KINDS)}")
    try:
        return KINDS[kind].model_validate(values)
    except ValidationError as error:
        lines = list(dict.fromkeys(_explain(KINDS[kind], item) for item in _one_form_each(error.errors())))
        count = f"{len(lines)} error{'s' if len(lines) > 1 else ''}"
        raise ConfigError("\n".join([f"{where}: {count}:", *(f"  {line}" for line in lines)])) from None


def absolute(job: StrictModel) -> dict[str, Any]:
    """Return the values that a job sets, with absolute paths, for a process with another working
    directory."""
    values = job.model_dump(mode="json", exclude_unset=True)
    return {
        key: _absolute(value, key in URIS) if key in URIS + NAMES else value for key, value in values.items()
    }


def _absolute(value: Any, is_uri: bool) -> Any:
    """Make the paths of a value absolute.

    is_uri: strings are paths or URIs; otherwise only strings that exist as a path are changed, since the
    others may be hub ids."""
    if not is_uri and value in BUILT_IN:
        return value
    if isinstance(value, list):
        return [_absolute(item, is_uri) for item in value]
    if isinstance(value, dict):
        return {key: item if key in NO_PATHS else _absolute(item, is_uri) for key, item in value.items()}
    return normal(value) if isinstance(value, str) and (is_uri or Path(value).exists()) else value


def _override(values: dict[str, Any], override: str) -> None:
    """Set a key of a job. Raises ConfigError."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(
            f"--set {override}: expected key=value, with dots for nested keys (settings.seed=7)"
        )
    try:
        value = parse(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override}: the value is not YAML: {error}") from error
    *parents, last = key.split(".")
    for parent in parents:
        child = values.setdefault(parent, {})
        if parent == "model" and isinstance(child, str):  # `model: NAME` is short for its base
            child = values[parent] = {"base": child}
        if not isinstance(child, dict):
            raise ConfigError(f"--set {override}: {parent} is not a mapping, got {child!r}")
        values = child
    values[last] = value


def _one_form_each(items: list[Any]) -> list[Any]:
    """Drop the pydantic errors that a value is not a list, where it may also be a single one and is a wrong
    one."""
    places = Counter(tuple(_path(item)) for item in items)
    return [item for item in items if item["type"] != "list_type" or places[tuple(_path(item))] == 1]


def _path(item: Any) -> list[Any]:
    """Return the keys and indices that lead to a pydantic error's value."""
    return [part for part in item["loc"] if isinstance(part, int) or not _is_type(str(part))]


def _explain(model: type[BaseModel], item: Any) -> str:
    """Return one line for a pydantic error: where, what is wrong, with which value, what is allowed."""
    path = _path(item)
    where = ".".join(str(part) for part in path)
    if item["type"] == "extra_forbidden":
        return (
            f"{where}: unknown key; {did_you_mean(str(path[-1]), _model_at(model, path[:-1]).model_fields)}"
        )
    if item["type"] == "missing":
        return f"{where}: is missing and has no default"
    message = problem_of(item)
    value = json.dumps(item.get("input"), default=str)
    short_value = value if len(value) <= 60 else value[:57] + "..."
    return f"{where}: {message}, got {short_value}" if path else message


def _is_type(part: str) -> bool:
    """Return whether a part of a pydantic location is a type, of a union, rather than a key."""
    return bool(re.search(r"\[|^(str|int|list|dict)$|Parts$", part))


def _model_at(model: type[BaseModel], path: list[Any]) -> type[BaseModel]:
    """Return the model at a path of field names."""
    for name in path:
        if isinstance(name, int) or name not in model.model_fields:
            continue
        annotation = model.model_fields[name].annotation
        for candidate in (annotation, *typing.get_args(annotation)):
            if isinstance(candidate, type) and issubclass(candidate, BaseModel):
                model = candidate
    return model
