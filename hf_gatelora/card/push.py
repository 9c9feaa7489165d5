"""Pushing an adapter folder to the Hub: what is uploaded, and what a failure says."""

import json
import logging
import os
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from transformers.trainer import TRAINER_STATE_NAME

from .. import __version__
from ..adapters.files import PROCESSOR_FILES
from ..records import CARD, EVAL_RESULTS, FRONTIER, GATE_MAP, RESULTS_FILE, STATE_FILE, SUMMARY_FILE, without_paths
from .write import is_generated, write_card

logger = logging.getLogger(__name__)

# Of an earlier push, these are removed if the folder does not hold them any more: they would not be of this adapter.
REPLACED = (RESULTS_FILE, EVAL_RESULTS, GATE_MAP, FRONTIER, STATE_FILE, SUMMARY_FILE)
# All that a push uploads: what PEFT, this package, and a processor or tokenizer write.
NAMES: tuple[str, ...] = (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME, CARD, *REPLACED)
NAMES += (*PROCESSOR_FILES, "sentencepiece.bpe.model")
WITH_PATHS = (CONFIG_NAME, SUMMARY_FILE, RESULTS_FILE, TRAINER_STATE_NAME)  # may name folders of this machine
REASONS = {
    401: "it wants a valid token. Log in with `hf auth login`, or pass a token.",
    403: "the token may not write there. Use one with write access to that user or organization.",
    404: "there is no such repository or branch, or the token may not see it.",
    409: "somebody else is changing the repository. Try again in a moment.",
    429: "too many requests. Try again later.",
    500: "it has a problem of its own. Try again later.",
}


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
    base: str | None = None,
    license: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
) -> str:
    """Put an adapter folder on the Hub in one commit, with its card as `write_card` makes it.

    Only the files in `NAMES` are uploaded, without the folders of this machine that some of them name. Pushing again is
    safe: unchanged files are not uploaded twice, and a card that was edited on the Hub stays there.

    Args:
        directory: folder of a LoRA adapter.
        repo_id: `user/name`, or `name` for the user of the token; the repository is created if it does not exist.
        base, license: for the card, as in `write_card`.
        private: whether a new repository is private; default: the account's setting.
        revision: branch to push to, created if it does not exist; default: `main`.
        token: default: the one of `hf auth login` or of the environment.
        create_pr: open a pull request instead of committing to the branch.

    Returns:
        The URL of the repository, or of the pull request.

    Raises:
        ValueError: if the folder holds no adapter, or a file to upload is a link.
        PushError: if the Hub cannot be reached or refuses.
    """
    directory = Path(directory)
    regular_files(directory, NAMES)  # links are refused before the card is written
    write_card(directory, base, license=license, repo_id=repo_id if "/" in repo_id else None, revision=revision)
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
    checkpoint: tuple[str, Path] | None = None,
    again: Path | None = None,
) -> CommitInfo:
    """Upload an adapter folder as it is, in one commit; arguments and errors as for `push_adapter`.

    Args:
        checkpoint: name on the Hub and folder of a Trainer checkpoint that is uploaded whole, replacing the one there.
        again: folder that a failure says to push later; default: `directory`.
    """
    files = regular_files(directory, NAMES)
    if checkpoint is not None:
        files |= {f"{checkpoint[0]}/{name}": file for name, file in regular_files(checkpoint[1]).items()}
    api = HfApi(token=token, library_name="hf_gatelora", library_version=__version__)
    try:
        repo = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not create_pr and not revision.startswith("refs/"):
            api.create_branch(repo, branch=revision, exist_ok=True)
        if repo != repo_id:  # now with the user's name
            write_card(directory, repo_id=repo, revision=revision)
        there = api.list_repo_files(repo, revision=revision)
        if CARD in there and is_generated(files[CARD].read_text(encoding="utf-8")):
            card = api.hf_hub_download(repo, CARD, revision=revision, force_download=True)
            if not is_generated(Path(card).read_text(encoding="utf-8")):
                logger.warning(f"The model card of {repo} was edited on the Hub and stays there as it is.")
                del files[CARD]
        stale = [path for path in there if path in REPLACED or (checkpoint and path.startswith(f"{checkpoint[0]}/"))]
        changes: list[CommitOperationAdd | CommitOperationDelete] = [
            CommitOperationAdd(path, public(file, directory)) for path, file in files.items()
        ]
        changes += [CommitOperationDelete(path, is_folder=False) for path in stale if path not in files]
        return api.create_commit(repo, changes, commit_message=commit_message, revision=revision, create_pr=create_pr)
    except (OSError, HTTPError, ValueError, RuntimeError) as error:
        branch, directory = f" --revision {revision}" if revision else "", again or directory
        raise PushError(
            f"Could not push to {repo_id}: {reason(error)}",
            f"Everything is in {directory}. To push it later: gatelora push {directory} {repo_id}{branch}",
        ) from error


def regular_files(directory: Path, names: tuple[str, ...] | None = None) -> dict[str, Path]:
    """The files in and below a folder, or those of some names, by their path in it.

    Raises:
        ValueError: if one of them is a link, which may lead to a file that nobody means to publish.
    """
    paths = directory.rglob("*") if names is None else [directory / name for name in names]
    files = {file.relative_to(directory).as_posix(): file for file in paths if file.is_file()}
    for name, file in files.items():
        if file.resolve() != directory.resolve() / name:
            raise ValueError(f"{file} is a link and is not uploaded: replace it with the file itself.")
    return files


def public(file: Path, directory: Path) -> Path | bytes:
    """A file as it is uploaded: without the folders of this machine.

    Args:
        directory: the adapter's folder. Its card may name the Hub id of a base model that was loaded from a folder.
    """
    if file.name not in WITH_PATHS:
        return file
    text = file.read_text(encoding="utf-8")
    if file.name == RESULTS_FILE:
        return "".join(json.dumps(without_paths(json.loads(line))) + "\n" for line in text.split("\n") if line).encode()
    found = json.loads(text)
    shown = without_paths(found)
    if file.name == CONFIG_NAME and shown != found:
        card = ModelCard((directory / CARD).read_text(encoding="utf-8"), ignore_metadata_errors=True)
        shown["base_model_name_or_path"] = card.data.get("base_model") or shown["base_model_name_or_path"]
    return json.dumps(shown, indent=2).encode()


def reason(error: BaseException) -> str:
    """Why a push failed, in a sentence."""
    while isinstance(error, (RuntimeError, ValueError)) and error.__cause__ is not None:  # the client wraps errors
        error = error.__cause__
    if isinstance(error, OfflineModeIsEnabled):
        return "offline mode is on (HF_HUB_OFFLINE)."
    response = getattr(error, "response", None)
    if isinstance(error, HfHubHTTPError) and response is not None:
        status, wait = response.status_code, response.headers.get("Retry-After")
        said = REASONS.get(min(status, 500)) or f"{error.server_message or type(error).__name__}."
        return f"the Hub answered {status}: {said.replace('later', f'in {wait} s') if wait else said}"
    if isinstance(error, (HTTPError, OSError)):
        return f"the connection failed ({type(error).__name__}: {error})."
    return f"{error}"
