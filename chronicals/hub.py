"""Names of models, tokenizers and data sets to files: a local folder as it is, a hub repository through
huggingface_hub's cache.

The hub's refusals (no token, gated, absent, offline) become one line that names the repository and the way in. Left
out: retries of our own; huggingface_hub's cache is used first and offline machines are told at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from chronicals.errors import UserError, nearest


def resolve(
    path_or_id: str | Path, *, revision: str | None = None, allow_patterns: Sequence[str] | None = None
) -> Path:
    """The folder that holds a model's, tokenizer's or data set's files, downloaded where they are not here yet.

    Args:
        path_or_id: a local folder, or the name of a hub repository such as `Qwen/Qwen2.5-0.5B`.
        revision: branch, tag or commit of a hub repository.
        allow_patterns: globs of the files to download; all by default.

    Raises:
        UserError: the folder does not exist; the hub says 401, 403 or 404, or cannot be reached.
    """
    path = Path(path_or_id).expanduser()
    if path.is_dir():
        return path
    name = str(path_or_id)
    if path.exists():
        raise UserError(f"{name} is a file", "give the folder that holds the model's files")
    if _looks_like_a_path(name):
        raise UserError(f"{name} does not exist", _nearest(path))
    import huggingface_hub

    with explain_hub_errors(name):
        found = huggingface_hub.snapshot_download(
            name, revision=revision, allow_patterns=None if allow_patterns is None else list(allow_patterns)
        )
    return Path(found)


@contextmanager
def explain_hub_errors(repo: str, *, what: str = "model") -> Iterator[None]:
    """Turns the hub client's errors about `repo` into a UserError; `what` it is: "model" or "dataset"."""
    from huggingface_hub import errors

    try:
        yield
    except (errors.HTTPError, errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        # a refusal may hide behind "not in the cache", which the client says last
        refusal = error.__cause__ if isinstance(error.__cause__, errors.HfHubHTTPError) else error
        raise _explained(refusal, repo, what) from error
    except errors.HFValidationError as error:
        raise UserError(
            f"{repo!r} is neither a local folder nor the name of a hub repository", "give a folder, or OWNER/NAME"
        ) from error


def _explained(error: BaseException, repo: str, what: str) -> UserError:
    from huggingface_hub import constants, errors

    page = f"https://huggingface.co/{'datasets/' if what == 'dataset' else ''}{repo}"
    log_in = "run `hf auth login` or set HF_TOKEN"
    status = (
        error.response.status_code if isinstance(error, errors.HfHubHTTPError) and error.response is not None else None
    )
    match error:
        case errors.GatedRepoError():
            return UserError(f"{repo} is gated on the Hugging Face Hub", f"accept its licence at {page}, then {log_in}")
        case errors.RevisionNotFoundError():
            return UserError(f"{repo} has no such revision", f"see {page}/tree/main for its branches and tags")
        case errors.DisabledRepoError():
            return UserError(f"{repo} was disabled by the Hugging Face Hub", f"see {page}")
        case errors.RepositoryNotFoundError():
            # the hub answers 401 for private repositories and for names that do not exist, alike
            return UserError(
                f"the Hugging Face Hub has no {what} {repo}, or it is private",
                f"check the name at {page}; if it is private, {log_in}",
            )
        case errors.HfHubHTTPError() if status in (401, 403):
            return UserError(
                f"the Hugging Face Hub refuses {repo} ({status})", f"{log_in}; accept its licence at {page}"
            )
        case errors.HfHubHTTPError() if status is not None:
            return UserError(f"the Hugging Face Hub answers {status} for {repo}", "try again later")
        case _:
            why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the Hugging Face Hub cannot be reached"
            kind = "--repo-type dataset " if what == "dataset" else ""
            return UserError(
                f"{repo} is no folder here, is not in the local cache, and {why}",
                f"connect to the network, or run `hf download {kind}{repo}` where there is one and give that folder",
            )


def _looks_like_a_path(name: str) -> bool:
    """Hub names are NAME or OWNER/NAME; anything rooted, dotted, deeper or below an existing folder is a path."""
    parts = Path(name).parts
    return (
        name.startswith(("/", ".", "~"))
        or name.endswith("/")
        or len(parts) > 2
        or (len(parts) == 2 and Path(parts[0]).is_dir())
    )


def _nearest(path: Path) -> str:
    """What to write instead: the sibling with the nearest name, below the deepest folder that exists."""
    while not path.parent.is_dir() and path.parent != path:
        path = path.parent
    siblings = sorted(entry.name for entry in path.parent.iterdir() if entry.is_dir()) if path.parent.is_dir() else []
    near = nearest(path.name, siblings)
    return (
        f"did you mean {path.parent / near}?"
        if near
        else f"give a folder that exists; {path.parent} has none of that name"
    )
