"""Reads a job file: YAML or JSON text -> checked jobs, one or several, with every error of them in one go.

YAML is read by YAML 1.2's rules where PyYAML's 1.1 surprises: 1e-5 is a number, `no` is a word, 012 is 12.
"""

from __future__ import annotations

import json
import re
import typing
from collections.abc import Hashable, Iterable
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from context_diffusion.core.errors import ConfigError
from context_diffusion.core.evaluate_job import EvaluateJob
from context_diffusion.core.generate_job import GenerateJob
from context_diffusion.core.job_base import StrictModel
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


# Keys that hold paths and URIs, and those that hold one or a name.
URIS = ("manifest", "images", "compare", "reference", "output", "data", "allow")
NAMES = ("model", "judge", "encoder")
BUILT_IN = ("bundled", *PRESETS)


class _Loader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2's scalars, refusing a key that stands twice."""

    yaml_implicit_resolvers = {}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key.value!r} stands twice", key.start_mark)
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
    """YAML (or JSON, which is YAML) text -> Python values. Raises yaml.YAMLError."""
    return yaml.load(text, Loader=_Loader)


def load_job(path: str, overrides: list[str] | None = None) -> StrictModel:
    """Reads, overrides (`key.key=value`) and checks a file of one job.

    Raises ConfigError with all that is wrong, one line each.
    """
    jobs = load_jobs(path, overrides)
    if len(jobs) > 1:
        raise ConfigError(f"{path}: holds {len(jobs)} jobs, one is wanted here")
    return jobs[0]


def load_jobs(path: str, overrides: list[str] | None = None) -> list[StrictModel]:
    """The same of a file with several jobs: YAML documents, or a list. An override holds in each job whose
    kind has the key.

    Raises ConfigError with all that is wrong in any of them.
    """
    documents = _documents(path)
    for override in overrides or []:
        key = re.split("[.=]", override)[0]
        having = [values for values in documents if key in _keys(values)]
        for values in having or documents:  # a key that none has is an error of each
            _override(values, override)
    jobs, wrong = [], []
    for number, values in enumerate(documents, 1):
        try:
            jobs.append(check_job(values, path if len(documents) == 1 else f"{path}: job {number}"))
        except ConfigError as error:
            wrong.append(str(error))
    if wrong := wrong or _same_outputs(path, documents):
        raise ConfigError("\n".join(wrong))
    return jobs


def _keys(values: dict[str, Any]) -> Iterable[str]:
    """The keys that a job of this kind has; none where the kind is unknown."""
    model = KINDS.get(str(values.get("kind")))
    return model.model_fields if model else ()


def _documents(path: str) -> list[dict[str, Any]]:
    """The jobs of a file, unchecked."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the job file: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: the job file is not UTF-8 text: {error}") from error
    try:
        documents = list(yaml.load_all(text, Loader=_Loader))
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML or JSON: {error}") from error
    if len(documents) == 1 and isinstance(documents[0], list):
        documents = documents[0]
    if not documents:
        raise ConfigError(f"{path}: holds no job")
    for number, values in enumerate(documents, 1):
        if not isinstance(values, dict):
            where = path if len(documents) == 1 else f"{path}: job {number}"
            raise ConfigError(f"{where}: a job is a mapping of keys to values, got {type(values).__name__}")
    return documents


def _same_outputs(path: str, documents: list[dict[str, Any]]) -> list[str]:
    """The jobs that would write to the `output:` of one before them."""
    first: dict[str, int] = {}
    wrong = []
    for number, values in enumerate(documents, 1):
        if (before := first.setdefault(normal(values["output"]), number)) < number:
            wrong.append(f"{path}: job {number}: output: {values['output']} is job {before}'s too; choose another")
    return wrong


def check_job(values: dict[str, Any], where: str = "job") -> StrictModel:
    """A mapping -> the checked job of its `kind`."""
    kind = values.get("kind")
    if kind not in KINDS:
        raise ConfigError(f"{where}: kind: {kind!r} is unknown; {did_you_mean(str(kind), KINDS)}")
    try:
        return KINDS[kind].model_validate(values)
    except ValidationError as error:
        lines = [_explain(KINDS[kind], item) for item in error.errors()]
        unique = list(dict.fromkeys(lines))
        raise ConfigError("\n".join([f"{where}: {len(unique)} thing(s) wrong:", *(f"  {line}" for line in unique)])) from None


def absolute(job: StrictModel) -> dict[str, Any]:
    """The job's own values, for a process with another working directory."""
    values = job.model_dump(mode="json", exclude_unset=True)

    def moved(value: Any, known: bool) -> Any:
        """known: it is a path or URI; else only where such a path exists, for it may be a hub id."""
        if not known and value in BUILT_IN:
            return value
        if isinstance(value, list):
            return [moved(one, known) for one in value]
        if isinstance(value, dict):
            return {key: moved(one, known) for key, one in value.items()}
        return normal(value) if isinstance(value, str) and (known or Path(value).exists()) else value

    return {key: moved(value, key in URIS) if key in URIS + NAMES else value for key, value in values.items()}


def _override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set {override}: write key=value, with dots for nested keys (settings.seed=7)")
    try:
        value = parse(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override}: the value is not YAML: {error}") from error
    *parents, last = key.split(".")
    for parent in parents:
        child = values.setdefault(parent, {})
        if not isinstance(child, dict):
            raise ConfigError(f"--set {override}: {parent} is not a mapping but {child!r}")
        values = child
    values[last] = value


def _explain(model: type[BaseModel], item: Any) -> str:
    """One pydantic error -> one line: where, what is wrong, with which value, what is allowed."""
    path = [part for part in item["loc"] if isinstance(part, int) or not re.search(r"\[|^(str|int|list|dict)$|Parts$", str(part))]
    where = ".".join(str(part) for part in path)
    if item["type"] == "extra_forbidden":
        return f"{where}: unknown key; {did_you_mean(str(path[-1]), _model_at(model, path[:-1]).model_fields)}"
    if item["type"] == "missing":
        return f"{where}: is missing and has no default"
    message = item["msg"].removeprefix("Value error, ").replace("Input should", "should")
    value = json.dumps(item.get("input"), default=str)
    shown = value if len(value) <= 60 else value[:57] + "..."
    return f"{where}: {message}, got {shown}" if path else message


def _model_at(model: type[BaseModel], path: list[Any]) -> type[BaseModel]:
    """The model that stands under a path of field names."""
    for name in path:
        if isinstance(name, int) or name not in model.model_fields:
            continue
        annotation = model.model_fields[name].annotation
        for candidate in (annotation, *typing.get_args(annotation)):
            if isinstance(candidate, type) and issubclass(candidate, BaseModel):
                model = candidate
    return model
