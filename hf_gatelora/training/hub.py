"""What a Trainer of gated LoRA does with the Hub: its card, and pushes that hold the complete adapter."""

import logging
import os
import shutil
import tempfile
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

from huggingface_hub import CommitInfo, HfApi
from huggingface_hub.errors import HTTPError
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import HubStrategy
from transformers.utils import PushInProgress

from ..adapters.checkpoint import adapter_folder
from ..card.push import PushError, adapter_files, reason, upload
from ..card.write import is_generated, write_card
from ..records import CARD
from .engines import EngineTrainer

logger = logging.getLogger(__name__)

STAGED = ".tmp-push-"  # folders with what is being pushed


class HubTrainer(EngineTrainer):
    """`Trainer` whose model card and pushes are those of an adapter of ours, complete and without tokens.

    `push_to_hub` raises `PushError` where it fails. A push during the training, or by `save_model`, logs the failure,
    and the run goes on; what was to be pushed lies in the output folder.
    """

    push_in_progress = None
    _pushes: ThreadPoolExecutor | None = None

    @property
    def _repo(self) -> str:
        return self.hub_model_id or self.args.hub_model_id or Path(self.args.output_dir).absolute().name

    def _folder(self, directory: str | os.PathLike) -> Path:
        """Where below a saved folder the adapter's files lie."""
        return adapter_folder(directory, self.model.active_adapter)

    def init_hf_repo(self, token=None, private=None):
        """Trainer's: the repository is made before the training.

        Raises:
            PushError: where the token does not allow it. A Hub that cannot be reached is no reason not to train.
        """
        if not self.is_world_process_zero():
            return
        for left in Path(self.args.output_dir).glob(f"{STAGED}*"):  # by a process that was killed
            shutil.rmtree(left)
        private = self.args.hub_private_repo if private is None else private
        try:
            self.hub_model_id = (
                HfApi(token=token or self.args.hub_token)
                .create_repo(self._repo, private=private, exist_ok=True)
                .repo_id
            )
        except (OSError, HTTPError) as error:
            message = f"Could not make the repository {self._repo}: {reason(error)}"
            if getattr(getattr(error, "response", None), "status_code", None) in (401, 403):
                raise PushError(f"{message} Nothing was trained yet.") from error
            logger.warning(f"{message} The training goes on; each push will try again.")

    def create_model_card(
        self,
        language=None,
        license=None,
        tags=None,
        model_name=None,
        finetuned_from=None,
        tasks=None,
        dataset_tags=None,
        dataset=None,
        dataset_args=None,
        revision=None,
    ):
        """The card of the adapter in the output folder, by `write_card`; what it says of results was measured.

        Args:
            language, license, tags: metadata.
            finetuned_from: Hub id of the base model, where it was loaded from a folder.
            dataset_tags: Hub ids of the training data.
            model_name, tasks, dataset, dataset_args: Trainer's; the card takes these from the run.
            revision: branch that the card will be on; default: that of the training arguments.
        """
        if self.is_world_process_zero():
            write_card(
                self._folder(self.args.output_dir),
                finetuned_from,
                license=license,
                language=language,
                tags=[tags] if isinstance(tags, str) else tags,
                datasets=[dataset_tags] if isinstance(dataset_tags, str) else dataset_tags,
                repo_id=self._repo if "/" in self._repo else None,
                revision=revision or self.args.hub_revision,
            )

    def save_model(self, output_dir=None, _internal_call=False):
        """Trainer's; with `push_to_hub` in the arguments it also pushes."""
        super().save_model(output_dir, _internal_call=True)
        if self.args.push_to_hub and not _internal_call:
            try:
                self.push_to_hub(commit_message="Model save")
            except PushError as error:
                logger.warning(str(error))

    def _save(self, output_dir=None, state_dict=None):
        token, self.args.hub_token = self.args.hub_token, None  # training_args.bin holds the arguments
        try:
            super()._save(output_dir, state_dict)
        finally:
            self.args.hub_token = token

    def push_to_hub(
        self, commit_message="End of training", blocking=True, token=None, revision=None, private=None, **kwargs
    ) -> CommitInfo | Future | None:
        """Save the model, write its card, and push the output folder's adapter, in one commit.

        Args:
            blocking: whether to wait for the end of the push.
            token, revision, private: default: those of the training arguments.
            kwargs: for `create_model_card`.

        Returns:
            The commit, or a future of it; None on other processes than the first.

        Raises:
            PushError: where the Hub cannot be reached or refuses. Everything is in the output folder then.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        kwargs["tags"] = [*_listed(kwargs.get("tags")), *(getattr(self.model, "model_tags", None) or [])] or None
        self.create_model_card(**kwargs, revision=revision)
        self._finish_current_push()
        token = token or self.args.hub_token  # now: in the background it may be out of the arguments for a moment
        push = partial(self._upload, self._folder(self.args.output_dir), commit_message, token, revision, private)
        return push() if blocking else self._in_background(push)

    def _upload(self, folder: Path, message: str, token, revision=None, private=None, **more) -> CommitInfo:
        commit = upload(
            folder,
            self._repo,
            private=self.args.hub_private_repo if private is None else private,
            revision=revision or self.args.hub_revision,
            token=token,
            commit_message=message,
            **more,
        )
        self.hub_model_id = commit.repo_url.repo_id
        return commit

    def _in_background(self, push) -> Future:
        if self._pushes is None:
            self._pushes = ThreadPoolExecutor(max_workers=1)
        job = self._pushes.submit(push)
        jobs = [] if self.push_in_progress is None else self.push_in_progress.jobs
        self.push_in_progress = PushInProgress([*(other for other in jobs if not other.done()), job])
        return job

    def _push_from_checkpoint(self, checkpoint_folder):
        # Trainer's own would leave out gates, results and card, and put the token into a file.
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        busy = self.push_in_progress is not None and not self.push_in_progress.is_done()
        if busy and not self.args.hub_always_push:
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        message, token = f"Training in progress, step {self.state.global_step}", self.args.hub_token
        staged = Path(tempfile.mkdtemp(prefix=STAGED, dir=self.args.output_dir))
        try:
            folders = self._stage(Path(checkpoint_folder), staged)
        except Exception as error:  # no push is worth the training
            logger.warning(f"{checkpoint_folder} is not pushed: {error}")
            shutil.rmtree(staged)
            return

        def push():
            try:
                write_card(staged, repo_id=self._repo if "/" in self._repo else None, revision=self.args.hub_revision)
                self._upload(staged, message, token, folders=folders, again=self._folder(checkpoint_folder))
            except Exception as error:  # nobody reads what a thread raises
                logger.warning(str(error))
            finally:
                shutil.rmtree(staged)

        self._in_background(push)

    def _stage(self, checkpoint: Path, staged: Path) -> tuple[str, ...]:
        """Put what a checkpoint pushes into a folder of its own, which the training does not touch any more.

        Returns:
            Names of the folders in it that are pushed whole.
        """
        if self.processing_class is not None:
            self.processing_class.save_pretrained(staged)
        for name in adapter_files(self._folder(checkpoint)):
            if not (staged / name).exists():
                _link(self._folder(checkpoint) / name, staged / name)
        own = self._folder(self.args.output_dir) / CARD
        if own.is_file() and not is_generated(own.read_text(encoding="utf-8")):
            (staged / CARD).unlink(missing_ok=True)
            _link(own, staged / CARD)
        folders = {HubStrategy.CHECKPOINT: ("last-checkpoint",), HubStrategy.ALL_CHECKPOINTS: (checkpoint.name,)}
        for name in folders.get(self.args.hub_strategy, ()):
            without_arguments = shutil.ignore_patterns(TRAINING_ARGS_NAME)
            shutil.copytree(checkpoint, staged / name, copy_function=_link, ignore=without_arguments)
        return folders.get(self.args.hub_strategy, ())


def _listed(value: str | list[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else list(value or [])


def _link(source: str | os.PathLike, target: str | os.PathLike) -> None:
    """A hard link where the file system has them: saved files are replaced as a whole, never changed."""
    Path(target).parent.mkdir(exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copy(source, target)
