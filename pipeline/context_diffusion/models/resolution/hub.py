"""Files of a part of a model: in a folder, or on the Hugging Face Hub at a commit. Knows no torch.

The hub's own cache and locks ensure that a file is downloaded once per node; HF_HUB_OFFLINE is respected.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import (
    HfApi,
    constants,
    hf_hub_download,
    snapshot_download,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    SafetensorsParsingError,
)

from context_diffusion.core.errors import ModelError, one_line

Shapes = dict[str, tuple[int, ...]]  # of a file's tensors, by key


def split(part: str) -> tuple[str, str]:
    """Split OWNER/NAME/some/folder into the hub id and the folder in it."""
    owner, _, rest = part.partition("/")
    name, _, folder = rest.partition("/")
    return f"{owner}/{name}", folder


def commit_of(repo: str, revision: str | None) -> str:
    """Return the commit of a branch, a tag or None for the newest; from the cache if the hub is out of
    reach."""
    if revision and re.fullmatch(r"[0-9a-f]{40}", revision):
        return revision
    try:
        return _newest_commit(repo, revision)
    except ConnectionError as error:
        folder = Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}"
        cached = folder / "refs" / (revision or "main")
        if not cached.is_file():
            raise ModelError(f"model: {repo} is not in the cache, and {error}") from error
        return cached.read_text().strip()


def _newest_commit(repo: str, revision: str | None = None, timeout_s: float | None = None) -> str:
    """Ask the hub. Raises ModelError if it refuses, ConnectionError if it cannot be reached."""
    try:
        return str(HfApi().model_info(repo, revision=revision, timeout=timeout_s).sha)
    except HFValidationError as error:
        raise ModelError(f"model: {repo!r} not found: expected a folder or a hub id ({error})") from error
    except HfHubHTTPError as error:
        refusal = f"the hub has no {repo} at {revision or 'main'} ({one_line(str(error))})"
        hint = "check the name and the revision; a private or gated one needs HF_TOKEN"
        raise ModelError(f"model: {refusal}; {hint}") from error
    except Exception as error:  # what a network's absence leads the client to
        raise ConnectionError(f"the hub at {constants.ENDPOINT} cannot be reached: {_hint(error)}") from error


def fetch(part: str, name: str, revision: dict[str, str], patterns: Sequence[str] = ("*",)) -> Path:
    """Return the path of a part's file, or of the whole part if name is empty; download it if needed.

    patterns: of the files that are needed of a whole part. Raises ModelError."""
    local = Path(part)
    if local.exists():
        return local / name if name else local
    repo, folder = split(part)
    with _explained(part, name or "its files"):
        if name:
            inside = f"{folder}/{name}" if folder else name
            return Path(hf_hub_download(repo, inside, revision=revision.get(repo)))
        wanted = [f"{folder}/{pattern}" if folder else pattern for pattern in patterns]
        return Path(snapshot_download(repo, revision=revision.get(repo), allow_patterns=wanted)) / folder


def read_json(part: str, name: str, revision: dict[str, str]) -> dict[str, Any]:
    """Read a part's JSON file; download it if needed. Raises ModelError."""
    return parsed_json(fetch(part, name, revision), f"{part}/{name}")


def parsed_json(path: Path, name: str) -> dict[str, Any]:
    """Return the mapping in a JSON file. name: the part with the file's name, for messages. Raises
    ModelError."""
    try:
        parsed = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ModelError(f"model: {name} cannot be read ({error})") from error
    if not isinstance(parsed, dict):
        raise ModelError(f"model: {name} is a JSON {type(parsed).__name__}, expected a mapping")
    return parsed


def fetch_file(part: str, revision: dict[str, str]) -> Path:
    """Return the path of a part that is one file; download it if needed. Raises ModelError."""
    if Path(part).is_file():
        return Path(part)
    folder, _, name = part.rpartition("/")
    return fetch(folder, name, revision)


def cached_file(part: str, revision: dict[str, str]) -> Path | None:
    """Return the path of a part that is one file, if the cache has it at its commit."""
    repo, name = split(part)
    with _explained(part, "it"):
        cached = try_to_load_from_cache(repo, name, revision=revision.get(repo))
    return Path(cached) if isinstance(cached, str) else None


def remote_shapes(part: str, revision: dict[str, str]) -> Shapes:
    """Fetch the header of a part that is one safetensors file, and return the shapes of its tensors. Raises
    ModelError."""
    repo, name = split(part)
    with _explained(part, "its header"):
        try:
            header = HfApi().parse_safetensors_file_metadata(repo, name, revision=revision.get(repo))
        except SafetensorsParsingError as error:
            raise ModelError(f"model: {part} is damaged or not a safetensors file: {error}") from error
    return {key: tuple(tensor.shape) for key, tensor in header.tensors.items()}


@contextmanager
def _explained(part: str, what: str) -> Iterator[None]:
    """Turn any error of a download into a ModelError. what: the files that are asked for."""
    repo, _ = split(part)
    try:
        yield
    except ModelError:
        raise
    except HFValidationError as error:
        raise ModelError(f"model: {part!r} not found: expected a folder or a hub id ({error})") from error
    except GatedRepoError as error:
        raise ModelError(
            f"model: {repo} is gated: accept its licence at {constants.ENDPOINT}/{repo}, then set HF_TOKEN "
            "to a token of that account"
        ) from error
    except Exception as error:  # no such file, no room, no network
        raise ModelError(f"model: {part}: cannot download {what} from the hub: {_hint(error)}") from error


def fetch_optional(part: str, name: str, revision: dict[str, str]) -> Path | None:
    """Fetch a file that a part may lack; None: it does. Raises ModelError if that cannot be determined."""
    try:
        path = fetch(part, name, revision)
    except ModelError as error:
        # Offline, a file that the cache lacks counts as absent; with a network, an answer is needed.
        absent = isinstance(error.__cause__, EntryNotFoundError)
        if absent and (
            constants.is_offline_mode() or not isinstance(error.__cause__, LocalEntryNotFoundError)
        ):
            return None
        raise
    return path if path.is_file() else None


def obstacle_to(repo: str, timeout_s: float) -> str | None:
    """Return why a repository cannot be downloaded now; None: it can. Downloads nothing."""
    try:
        _newest_commit(repo, timeout_s=timeout_s)
    except (ModelError, ConnectionError) as error:
        return str(error)
    return None


def _hint(error: Exception) -> str:
    if constants.is_offline_mode():
        return "HF_HUB_OFFLINE is set; unset it once to download, or name a folder"
    reason = str(error).splitlines()[0][:200]
    return f"{type(error).__name__}: {reason}; check name and network, or name a folder"
