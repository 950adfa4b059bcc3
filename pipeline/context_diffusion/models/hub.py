"""Files of a part of a model: in a folder, or on the Hugging Face Hub at a commit. No torch.

The hub's own cache and locks ensure that a file is downloaded once per node; HF_HUB_OFFLINE is respected.
"""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
)

from context_diffusion.core.errors import ModelError, one_line


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


def fetch(part: str, name: str, revision: dict[str, str]) -> Path:
    """Return the path of a part's file, or of the whole part if name is empty; download it if needed. Raises
    ModelError."""
    local = Path(part)
    if local.exists():
        return local / name if name else local
    repo, folder = split(part)
    inside = "/".join(piece for piece in (folder, name) if piece)
    try:
        if name:
            return Path(hf_hub_download(repo, inside, revision=revision.get(repo)))
        wanted = f"{folder}/*" if folder else None
        return Path(snapshot_download(repo, revision=revision.get(repo), allow_patterns=wanted)) / folder
    except HFValidationError as error:
        raise ModelError(f"model: {part!r} not found: expected a folder or a hub id ({error})") from error
    except GatedRepoError as error:
        raise ModelError(
            f"model: {repo} is gated: accept its licence at {constants.ENDPOINT}/{repo}, then set HF_TOKEN "
            "to a token of that account"
        ) from error
    except Exception as error:  # no such file, no room, no network
        raise ModelError(
            f"model: {part}: cannot download {name or 'its files'} from the hub: {_hint(error)}"
        ) from error


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
