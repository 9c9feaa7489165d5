"""What a Trainer of gated LoRA does with the Hub: its card, and pushes that hold the complete adapter."""

import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from inspect import signature
from pathlib import Path

from huggingface_hub import CommitInfo, run_as_future
from huggingface_hub.errors import HTTPError
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import HubStrategy
from transformers.utils import PushInProgress

from ..adapters.checkpoint import adapter_folder
from ..card.push import PushError, reason, upload
from ..card.write import is_generated, write_card
from ..records import CARD
from .engines import EngineTrainer

logger = logging.getLogger(__name__)

STAGED = ".tmp-push-"  # folders with what is being pushed
# Arguments of Trainer's `create_model_card` by their name in `write_card`.
CARD_ARGUMENTS = {"base": "finetuned_from", "datasets": "dataset_tags", "license": "license", "language": "language"}


class HubTrainer(EngineTrainer):
    """`Trainer` whose model card and pushes are those of our adapters, complete and without tokens.

    `push_to_hub` raises `PushError` if it fails. A failing push by `save_model` or during the training is only logged;
    what it would have pushed is in the output folder.

    Trainer's own uploads cannot be inherited: they take whole folders (the token in `training_args.bin`, other files of
    the user), leave `gates.json`, results and card out, make two commits per checkpoint and hide errors.
    """

    push_in_progress = None

    @property
    def _output(self) -> Path:
        return Path(self.args.output_dir or "")

    @property
    def _repo(self) -> str:
        return self.hub_model_id or self.args.hub_model_id or self._output.absolute().name

    def _folder(self, directory: str | os.PathLike) -> Path:
        """Where below a saved folder the adapter's files are."""
        return adapter_folder(directory, str(self.model.active_adapter))

    def init_hf_repo(self, token=None, private=None):
        """Trainer's: create the repository before the training.

        Raises:
            PushError: if the token does not allow it. A Hub that cannot be reached does not stop the training.
        """
        if self.is_world_process_zero():
            for left in self._output.glob(f"{STAGED}*"):  # by a process that was killed
                shutil.rmtree(left)
        try:
            super().init_hf_repo(token, private)
        except (OSError, HTTPError) as error:
            message = f"Could not make the repository {self._repo}: {reason(error)}"
            if getattr(getattr(error, "response", None), "status_code", None) in (401, 403):
                raise PushError(f"{message} Nothing was trained yet.") from error
            logger.warning(f"{message} The training goes on; each push will try again.")

    def create_model_card(self, *args, revision: str | None = None, **kwargs):
        """Write the card of the adapter in the output folder with `write_card`.

        Args:
            args, kwargs: Trainer's. Used are `language`, `license`, `tags`, `finetuned_from` (Hub id of a base model
                that was loaded from a folder) and `dataset_tags` (Hub ids); the card takes the rest from the run.
            revision: branch that the card will be on; default: that of the training arguments.
        """
        given = signature(super().create_model_card).bind(*args, **kwargs).arguments
        if self.is_world_process_zero():
            known = {name: given.get(theirs) for name, theirs in CARD_ARGUMENTS.items()}
            self._write_card(self._folder(self._output), revision, tags=given.get("tags"), **known)

    def _write_card(self, folder: Path, revision: str | None = None, **given) -> None:
        repo = self._repo if "/" in self._repo else None
        write_card(folder, repo_id=repo, revision=revision or self.args.hub_revision, **given)

    def save_model(self, output_dir=None, _internal_call=False):
        """Trainer's; with `push_to_hub` in the arguments it also pushes."""
        super().save_model(output_dir, _internal_call=True)
        if self.args.push_to_hub and not _internal_call:
            try:
                self.push_to_hub(commit_message="Model save")
            except (PushError, ValueError) as error:
                logger.warning(str(error))

    def _save(self, output_dir=None, state_dict=None):
        token, self.args.hub_token = self.args.hub_token, None  # training_args.bin holds the arguments
        try:
            super()._save(output_dir, state_dict)
        finally:
            self.args.hub_token = token
        saved = Path(output_dir or self._output)
        if self.processing_class is not None and self.args.should_save and self._folder(saved) != saved:
            self.processing_class.save_pretrained(self._folder(saved))

    def push_to_hub(
        self, commit_message="End of training", blocking=True, token=None, revision=None, private=None, **kwargs
    ) -> CommitInfo | Future | None:
        """Save the model, write its card, and push the adapter in the output folder, in one commit.

        Args:
            blocking: whether to wait for the end of the push.
            token, revision, private: default: those of the training arguments.
            kwargs: for `create_model_card`.

        Returns:
            The commit, or a future of it; None on all processes but the first.

        Raises:
            PushError: if the Hub cannot be reached or refuses. Everything is in the output folder then.
            ValueError: if a file to upload is a link.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        tags = kwargs.pop("tags", None) or []
        tags = [*([tags] if isinstance(tags, str) else tags), *(getattr(self.model, "model_tags", None) or [])]
        self.create_model_card(**kwargs, tags=tags or None, revision=revision)
        self._finish_current_push()
        push = self._push(self._folder(self._output), commit_message, token, revision, private)
        return push() if blocking else run_as_future(push)

    def _push(self, folder: Path, message: str, token=None, revision=None, private=None, **more) -> Callable:
        """An upload with the token of now: later, in the background, it may be out of the arguments for a moment."""
        return partial(
            upload,
            folder,
            self._repo,
            private=self.args.hub_private_repo if private is None else private,
            revision=revision or self.args.hub_revision,
            token=token or self.args.hub_token,
            commit_message=message,
            **more,
        )

    def _push_from_checkpoint(self, checkpoint_folder):
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        busy = self.push_in_progress is not None and not self.push_in_progress.is_done()
        if busy and not self.args.hub_always_push:
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        checkpoint = Path(checkpoint_folder)
        name = {HubStrategy.CHECKPOINT: "last-checkpoint", HubStrategy.ALL_CHECKPOINTS: checkpoint.name}.get(
            self.args.hub_strategy
        )
        # A copy, which neither the training nor the rotation of checkpoints touches.
        staged = tempfile.TemporaryDirectory(prefix=STAGED, dir=self._output)
        whole = Path(staged.name) / checkpoint.name
        try:
            without_arguments = shutil.ignore_patterns(TRAINING_ARGS_NAME)
            shutil.copytree(checkpoint, whole, symlinks=True, copy_function=_link, ignore=without_arguments)
            folder, own = self._folder(whole), self._folder(self._output) / CARD
            if own.is_file() and not is_generated(own.read_text(encoding="utf-8")):
                (folder / CARD).unlink(missing_ok=True)
                shutil.copy(own, folder / CARD)
        except Exception as error:  # no push is worth the training
            logger.warning(f"{checkpoint} is not pushed: {error}")
            staged.cleanup()
            return
        message = f"Training in progress, step {self.state.global_step}"
        push = self._push(folder, message, checkpoint=name and (name, whole), again=self._folder(checkpoint))

        def job():
            with staged:
                try:
                    self._write_card(folder)
                    push()
                except Exception as error:  # nobody reads what a thread raises
                    logger.warning(str(error))

        self.push_in_progress = PushInProgress([*(self.push_in_progress.jobs if busy else []), run_as_future(job)])


def _link(source: str, target: str) -> None:
    """A hard link if the file system has them: saved files are replaced as a whole, never changed."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy(source, target)
