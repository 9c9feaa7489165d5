"""Pushing an adapter folder to the Hub: what is uploaded, and what a failure says."""

import logging
import os
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import CommitInfo, HfApi
from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled, RemoteEntryNotFoundError

from .. import __version__
from ..records import CARD, EVAL_RESULTS, FRONTIER, GATE_MAP, RESULTS_FILE, STATE_FILE, SUMMARY_FILE
from .write import is_generated, write_card

logger = logging.getLogger(__name__)

# What belongs to an adapter: its own files, the preprocessing beside it, and what describes it.
KINDS = {".safetensors", ".json", ".jsonl", ".md", ".png", ".txt", ".model", ".jinja"}
LEFT_OUT = {"trainer_state.json"}
# Of an earlier push, these are removed where the folder does not hold them any more: they would not be of this adapter.
REPLACED = (RESULTS_FILE, EVAL_RESULTS, GATE_MAP, FRONTIER, STATE_FILE, SUMMARY_FILE)


class PushError(RuntimeError):
    """A push failed; the local files are complete.

    Args:
        reason: what failed, and why.
        advice: how to push again.
    """

    def __init__(self, reason: str, advice: str = ""):
        super().__init__(f"{reason} {advice}".strip())
        self.reason = reason


def push_adapter(
    directory: str | os.PathLike,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
) -> str:
    """Put an adapter folder on the Hub, with its card as `write_card` makes it, in one commit.

    Uploaded are the adapter, the preprocessing beside it, and what describes it; checkpoints, optimizer states and
    training arguments are not. Pushing again does no harm: what is there already is not uploaded twice. A card that was
    edited on the Hub is kept there.

    Args:
        directory: a LoRA adapter's folder.
        repo_id: `user/name`, or `name` for the user of the token; the repository is created where there is none.
        private: whether a new repository is private; default: the account's setting.
        revision: branch to push to, created where there is none; default: `main`.
        token: default: the one of `hf auth login` or of the environment.
        create_pr: open a pull request in place of committing to the branch.

    Returns:
        The URL of the repository, or of the pull request.

    Raises:
        ValueError: where the folder holds no adapter.
        PushError: where the Hub cannot be reached or refuses.
    """
    directory = Path(directory)
    write_card(directory, repo_id=repo_id if "/" in repo_id else None, revision=revision)
    commit = upload(
        directory,
        repo_id,
        private=private,
        revision=revision,
        token=token,
        commit_message=commit_message or "Upload adapter",
        create_pr=create_pr,
    )
    return commit.pr_url or str(commit.repo_url)


def upload(
    directory: Path,
    repo_id: str,
    *,
    private: bool | None,
    revision: str | None,
    token: str | None,
    commit_message: str,
    create_pr: bool = False,
    folders: tuple[str, ...] = (),
    again: Path | None = None,
) -> CommitInfo:
    """Upload a folder as it is, in one commit; arguments as for `push_adapter`.

    Args:
        folders: names of folders in it that are uploaded whole, and replace those on the Hub.
        again: what a failure says to push later; default: the folder itself.

    Raises:
        PushError: where the Hub cannot be reached or refuses.
    """
    api = HfApi(token=token, library_name="hf_gatelora", library_version=__version__)
    with explained(again or directory, repo_id, revision):
        repo = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not create_pr and not revision.startswith("refs/"):
            api.create_branch(repo, branch=revision, exist_ok=True)
        if repo != repo_id:  # now with the user's name
            write_card(directory, repo_id=repo, revision=revision)
        files = adapter_files(directory)
        if edited_on_hub(api, directory, repo, revision):
            logger.warning(f"The model card of {repo} was edited on the Hub and stays there as it is.")
            files.remove(CARD)
        return api.upload_folder(
            repo_id=repo,
            folder_path=directory,
            allow_patterns=[*files, *(f"{folder}/*" for folder in folders)],
            delete_patterns=[*REPLACED, *(f"{folder}/*" for folder in folders)],
            commit_message=commit_message,
            revision=revision,
            create_pr=create_pr,
        )


def adapter_files(directory: Path) -> list[str]:
    """What of a folder belongs to the adapter, by its path in it."""
    files = [file for file in directory.iterdir() if file.is_file() and not file.name.startswith((".", "_"))]
    names = [file.name for file in files if file.suffix in KINDS]
    more = [directory / EVAL_RESULTS, *directory.glob("runs/**/*tfevents*")]  # the Hub shows TensorBoard's logs
    names += [file.relative_to(directory).as_posix() for file in more if file.is_file()]
    return sorted(set(names) - LEFT_OUT)


def edited_on_hub(api: HfApi, directory: Path, repo_id: str, revision: str | None) -> bool:
    """Whether a generated card here would take the place of one that somebody wrote or edited on the Hub."""
    if not is_generated((directory / CARD).read_text(encoding="utf-8")):
        return False  # the one here was written by hand as well, and is the newer one
    try:
        there = Path(api.hf_hub_download(repo_id, CARD, revision=revision, force_download=True))
    except RemoteEntryNotFoundError:
        return False
    return not is_generated(there.read_text(encoding="utf-8"))


@contextmanager
def explained(directory: Path, repo_id: str, revision: str | None = None):
    """Turn what the Hub's client raises into one message that says what failed and how to push again.

    Raises:
        PushError
    """
    try:
        yield
    except (OSError, HTTPError, ValueError, RuntimeError) as error:
        branch = f" --revision {revision}" if revision else ""
        raise PushError(
            f"Could not push to {repo_id}: {reason(error)}",
            f"Everything is in {directory}. To push it later: gatelora push {directory} {repo_id}{branch}",
        ) from error


def reason(error: BaseException) -> str:
    """Why a push failed, in a sentence."""
    while isinstance(error, (RuntimeError, ValueError)) and error.__cause__ is not None:  # the client wraps errors
        error = error.__cause__
    if isinstance(error, OfflineModeIsEnabled):
        return "offline mode is on (HF_HUB_OFFLINE)."
    response = getattr(error, "response", None)
    if isinstance(error, HfHubHTTPError) and response is not None:
        status = response.status_code
        if status == 401:
            return "the Hub wants a valid token (401). Log in with `hf auth login`, or pass a token."
        if status == 403:
            return "the token may not write there (403). Use one with write access to that user or organization."
        if status == 404:
            return "there is no such repository or branch, or the token may not see it (404)."
        if status == 409:
            return "somebody else is changing the repository (409). Try again in a moment."
        if status == 429:
            wait = response.headers.get("Retry-After")
            return f"too many requests (429). Try again {f'in {wait} s' if wait else 'later'}."
        if status >= 500:
            return f"the Hub has a problem of its own ({status}). Try again later."
        return f"the Hub refused it ({status}): {error.server_message or type(error).__name__}."
    if isinstance(error, (HTTPError, OSError)):
        return f"the connection failed ({type(error).__name__}: {error})."
    return f"{error}"
