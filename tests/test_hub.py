"""Names to folders: what a wrong path is told, and what each of the hub's refusals becomes."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants, errors

from chronicals import hub
from chronicals.errors import UserError

REPO = "acme/tiny"
PAGE = "https://huggingface.co/acme/tiny"
LOG_IN = "run `hf auth login` or set HF_TOKEN"
# whatever HTTP library the hub client speaks through: httpx, or httpx2 since huggingface_hub 2
HTTP = importlib.import_module(errors.HTTPError.__module__.split(".")[0])


def http_error(kind: type[Exception], status: int) -> Exception:
    """One of the client's errors as it raises them, with a response."""
    response = HTTP.Response(status, request=HTTP.Request("GET", "https://huggingface.co/api/models/acme/tiny"))
    return kind(f"{status} Client Error", response=response)


def refusal(monkeypatch: pytest.MonkeyPatch, error: Exception, cause: Exception | None = None) -> str:
    def refuse(*args: Any, **kwargs: Any) -> str:
        raise error from cause

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(UserError) as caught:
        hub.resolve(REPO)
    return str(caught.value)


def test_a_local_folder_is_taken_as_it_is(tmp_path: Path) -> None:
    assert hub.resolve(str(tmp_path)) == tmp_path
    assert hub.resolve(tmp_path) == tmp_path


def test_a_relative_folder_wins_over_a_hub_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "acme" / "tiny").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert hub.resolve(REPO) == Path(REPO)


def test_a_repository_is_downloaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: dict[str, Any] = {}

    def download(repo: str, **kwargs: Any) -> str:
        asked.update(kwargs, repo=repo)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert hub.resolve(REPO, revision="v1", allow_patterns=("*.json",)) == tmp_path
    assert asked == {"repo": REPO, "revision": "v1", "allow_patterns": ["*.json"]}


def test_a_wrong_path_gets_the_nearest_sibling(tmp_path: Path) -> None:
    (tmp_path / "qwen-base").mkdir()
    with pytest.raises(UserError) as caught:
        hub.resolve(f"{tmp_path}/qwen-bsae")
    assert str(caught.value) == f"{tmp_path}/qwen-bsae does not exist; did you mean {tmp_path}/qwen-base?"


def test_another_name_is_no_slip(tmp_path: Path) -> None:
    (tmp_path / "qwen-base").mkdir()
    with pytest.raises(UserError, match="gemma-base does not exist; give a folder that exists;"):
        hub.resolve(f"{tmp_path}/gemma-base")


def test_the_nearest_sibling_is_sought_where_the_path_breaks(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    with pytest.raises(UserError) as caught:
        hub.resolve(f"{tmp_path}/model/qwen/base")
    assert str(caught.value) == f"{tmp_path}/model/qwen/base does not exist; did you mean {tmp_path}/models?"


@pytest.mark.parametrize("name", ["./runs/x", "../x", "~/no-such-folder-here", "a/b/c", "x/"])
def test_what_looks_like_a_path_never_reaches_the_hub(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    with pytest.raises(UserError, match="does not exist; "):
        hub.resolve(name)


def test_a_name_below_an_existing_folder_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runs" / "first").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        hub.resolve("runs/frist")
    assert str(caught.value) == "runs/frist does not exist; did you mean runs/first?"


def test_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(UserError) as caught:
        hub.resolve(tmp_path / "model.safetensors")
    assert str(caught.value) == f"{tmp_path}/model.safetensors is a file; give the folder that holds the model's files"


@pytest.mark.parametrize(
    ("kind", "status", "message"),
    [
        (
            errors.GatedRepoError,
            403,
            f"{REPO} is gated on the Hugging Face Hub; accept its licence at {PAGE}, then {LOG_IN}",
        ),
        (
            errors.RepositoryNotFoundError,
            401,
            f"the Hugging Face Hub has no model {REPO}, or it is private; "
            f"check the name at {PAGE}; if it is private, {LOG_IN}",
        ),
        (
            errors.RepositoryNotFoundError,
            404,
            f"the Hugging Face Hub has no model {REPO}, or it is private; "
            f"check the name at {PAGE}; if it is private, {LOG_IN}",
        ),
        (
            errors.RevisionNotFoundError,
            404,
            f"{REPO} has no such revision; see {PAGE}/tree/main for its branches and tags",
        ),
        (errors.DisabledRepoError, 403, f"{REPO} was disabled by the Hugging Face Hub; see {PAGE}"),
        (
            errors.HfHubHTTPError,
            401,
            f"the Hugging Face Hub refuses {REPO} (401); {LOG_IN}; accept its licence at {PAGE}",
        ),
        (
            errors.HfHubHTTPError,
            403,
            f"the Hugging Face Hub refuses {REPO} (403); {LOG_IN}; accept its licence at {PAGE}",
        ),
        (errors.HfHubHTTPError, 503, f"the Hugging Face Hub answers 503 for {REPO}; try again later"),
    ],
)
def test_each_refusal_names_the_way_in(
    kind: type[Exception], status: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert refusal(monkeypatch, http_error(kind, status)) == message


def test_a_refusal_behind_a_missing_cache_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client falls back to its cache on any HTTP error and then says only that the cache has nothing."""
    message = refusal(monkeypatch, errors.LocalEntryNotFoundError("cache"), http_error(errors.HfHubHTTPError, 403))
    assert message.startswith(f"the Hugging Face Hub refuses {REPO} (403)")


@pytest.mark.parametrize("offline", [True, False])
def test_offline_is_told_from_unreachable(offline: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    why = "HF_HUB_OFFLINE is set" if offline else "the Hugging Face Hub cannot be reached"
    expected = (
        f"{REPO} is no folder here, is not in the local cache, and {why}; connect to the network, or run "
        f"`hf download {REPO}` where there is one and give that folder"
    )
    for error in (
        errors.LocalEntryNotFoundError("nothing cached"),
        errors.OfflineModeIsEnabled("offline"),
        HTTP.ConnectError("no route"),
    ):
        assert refusal(monkeypatch, error) == expected


def test_the_real_client_offline_answers_at_once() -> None:
    """Tests run with HF_HUB_OFFLINE=1: no stand-in here."""
    with pytest.raises(
        UserError,
        match="no-such-owner/no-such-model is no folder here, is not in the local cache, and HF_HUB_OFFLINE is set",
    ):
        hub.resolve("no-such-owner/no-such-model")


def test_a_name_the_hub_cannot_have() -> None:
    with pytest.raises(UserError) as caught:
        hub.resolve("two words")
    assert str(caught.value) == (
        "'two words' is neither a local folder nor the name of a hub repository; give a folder, or OWNER/NAME"
    )


def test_datasets_are_pointed_to_their_own_page() -> None:
    with pytest.raises(UserError, match=r"no dataset acme/chats.*https://huggingface.co/datasets/acme/chats"):  # noqa: SIM117
        with hub.explain_hub_errors("acme/chats", what="dataset"):
            raise http_error(errors.RepositoryNotFoundError, 404)


def test_other_errors_pass_through() -> None:
    with pytest.raises(KeyError), hub.explain_hub_errors(REPO):
        raise KeyError("a bug")
