"""What can go wrong with the Hub is said in one sentence, and never costs a trained model.

The stock Trainer does the pushing (`push_to_hub`, and `_push_from_checkpoint` for every `hub_strategy` but `end`);
it uploads the output folder without `checkpoint-*`, and with `checkpoint` and `all_checkpoints` each checkpoint
folder whole, so that figures, TensorBoard logs and the engine's state travel without help. What it leaves open, as
of transformers 5.23:

- A repository with other content is written over without a word, and one that lacks `hub_revision` is noticed only
  by the upload after training.
- A push during training that fails is dropped silently: its exception stays in a future that nobody asks.
- `push_to_hub` without `push_to_hub=True` in the arguments creates the repository first and saves the model second.
- `training_args.bin` is pushed with the arguments as they are, `hub_token` in clear.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.utils import is_peft_model
from huggingface_hub import constants, get_token, hf_hub_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import httpx
from transformers import PreTrainedModel
from transformers.trainer_utils import HubStrategy
from transformers.utils import logging
from transformers.utils.hub import hf_api

from .redaction import pickled_without_secrets

if TYPE_CHECKING:
    from transformers import Trainer

    class Host(Trainer):
        """The Trainer that the mixins here go before; its arguments are those of the sharpness-aware one."""

        args: Any
        hub_model_id: Any
        push_in_progress: Any
else:
    Host = object

logger = logging.get_logger(__name__)

NOT_CONTENT = {".gitattributes", "README.md", "LICENSE", ".gitignore"}
"""Files that a repository may hold before its first model."""


class HubError(RuntimeError):
    """A push that did not happen: one sentence with the way out. Nothing that was trained is lost."""


class HubMixin(Host):
    """Goes before any Trainer: checks the repository when it is made, and turns failures into `HubError`.

    Attributes:
        is_to_be_pushed: whether what is saved goes to the Hub, now or by hand after a push that failed.
    """

    is_to_be_pushed = False

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Create the repository, or take the existing one if what it holds is of the same kind.

        Raises:
            HubError: where there is no token, the name is not allowed, the repository holds something else, the branch
                `hub_revision` does not exist, or the Hub cannot be reached.
        """
        self.is_to_be_pushed = True
        try:
            super().init_hf_repo(token=token, private=private)
            if self.is_world_process_zero():
                self._check_repository(token)
        except (httpx.HTTPError, HFValidationError, OfflineModeIsEnabled) as error:
            raise HubError(f"{explain(error, self._hub_name(), self.args.hub_revision)}.") from error

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """The parent's, with the model and its card saved whatever happens to the network.

        Raises:
            HubError: where the push failed; it ends with the command that pushes later.
        """
        pushed: dict[str, Any] = {"token": token, "revision": revision, "private": private}
        try:
            job: Any = super().push_to_hub(commit_message, blocking=False, **pushed, **kwargs)
        except HubError as error:
            self.save_model(_internal_call=True)
            self.create_model_card(**{"model_name": self._card_title(), **kwargs})
            raise HubError(f"{error} {self._later(revision, private)}") from error
        if job is None:
            return None
        if not blocking:
            job.add_done_callback(self._report_push)
            return job
        try:
            return job.result()
        except Exception as error:
            reason = explain(error, self._hub_name(), revision or self.args.hub_revision)
            raise HubError(f"{reason}. {self._later(revision, private)}") from error

    def _save(self, *args: Any, **kwargs: Any) -> None:
        with pickled_without_secrets(self.args):
            super()._save(*args, **kwargs)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        before = set(self.push_in_progress.jobs) if self.push_in_progress is not None else set()
        self.create_model_card(model_name=self._card_title())
        with pickled_without_secrets(self.args):
            super()._push_from_checkpoint(checkpoint_folder)
        for job in set(self.push_in_progress.jobs) - before:
            job.add_done_callback(self._report_push)

    def _report_push(self, job: Future) -> None:
        """Called when an upload in the background has ended: a failure is said, and training goes on."""
        error = None if job.cancelled() else job.exception()
        if error is not None:
            logger.warning(f"{explain(error, self._hub_name(), self.args.hub_revision)}. {self._later()}")

    def _hub_name(self) -> str:
        """The repository's name as far as it is known: the user's part is the Hub's to add."""
        return self.hub_model_id or self.args.hub_model_id or Path(self.args.output_dir).absolute().name

    def _card_title(self) -> str:
        return self._hub_name().split("/")[-1]

    def _later(self, revision: str | None = None, private: bool | None = None) -> str:
        command = later_command(
            self._hub_name(),
            self.args.output_dir,
            revision or self.args.hub_revision,
            self.args.hub_private_repo if private is None else private,
        )
        return f"Nothing is lost: the model is in {self.args.output_dir}; push it later with: {command}"

    def _check_repository(self, token: str | None) -> None:
        repo, revision = self.hub_model_id, self.args.hub_revision
        where: dict[str, Any] = {"revision": revision, "token": token if token is not None else self.args.hub_token}
        files = hf_api().list_repo_files(repo, **where)
        configs = [name for name in files if name == "config.json"]
        config = [json.loads(Path(hf_hub_download(repo, name, **where)).read_text("utf-8")) for name in configs]
        other = other_content(files, config[0] if config else {}, self.accelerator.unwrap_model(self.model))
        if other is not None:
            raise HubError(
                f"hub_model_id: the repository {repo} exists and holds other content ({other}), which this push would "
                f"mix with; choose another --hub_model_id, or delete that repository on the Hub first."
            )


def other_content(files: Iterable[str], config: dict[str, Any], model: Any) -> str | None:
    """What a repository holds that is not an earlier version of this model, in words; None where all is well.

    A repository that another run of the same kind pushed is an earlier version: the Hub keeps the history, and
    pushing again is how runs are repeated and resumed.

    Args:
        files: Paths in the repository.
        config: Its `config.json`, empty where there is none.
        model: The model that would be pushed.
    """
    content = sorted(set(files) - NOT_CONTENT)
    if not content:
        return None
    if is_peft_model(model) != ("adapter_config.json" in content):
        return "a whole model, not an adapter" if is_peft_model(model) else "an adapter, not a whole model"
    if isinstance(model, PreTrainedModel) and config:
        found = config.get("architectures") or ["a model without a class name"]
        return None if type(model).__name__ in found else f"{', '.join(found)}, not {type(model).__name__}"
    if is_peft_model(model) or "training_args.bin" in content:
        return None
    return f"{len(content)} files that no Trainer wrote, such as {content[0]}"


def later_command(repo: str, folder: str, revision: str | None = None, private: bool | None = None) -> str:
    """The shell command that uploads what the Trainer would have: the folder without checkpoints."""
    words = ["hf", "upload", repo, folder, ".", "--exclude", "checkpoint-*", "--exclude", "_*"]
    words += ["--revision", revision] if revision else []
    words += ["--private"] if private else []
    return shlex.join(words)


def explain(error: BaseException, repo: str, revision: str | None = None) -> str:
    """Why a request about `repo` failed and what to do, without a full stop.

    The client wraps a failed upload in errors of its own, so the first cause that says something is taken.
    """
    causes = _causes(error)
    told = next((text for cause in causes if (text := _explain_one(cause, repo, revision))), None)
    if told:
        return told
    if any(isinstance(cause, httpx.HTTPError | OSError) for cause in causes):
        where = f"{constants.ENDPOINT} cannot be reached or broke off ({type(causes[-1]).__name__})"
        return f"The push to {repo} failed, {where}; check the network"
    return f"The push to {repo} failed ({' '.join(str(error).split())})"


def _explain_one(error: BaseException, repo: str, revision: str | None) -> str | None:
    if isinstance(error, OfflineModeIsEnabled):
        return "push_to_hub: the Hub is switched off by HF_HUB_OFFLINE; unset it, or train without --push_to_hub"
    if isinstance(error, HFValidationError):
        return (
            f"hub_model_id: '{repo}' is not a name that the Hub allows; use letters, digits, '-', '_' and '.', as in "
            "my-name/my-model"
        )
    if isinstance(error, RevisionNotFoundError):
        return (
            f"hub_revision: the repository {repo} has no branch '{revision}'; create it with "
            f"`hf repos branch create {repo} {revision}`, or leave --hub_revision out"
        )
    return _explain_status(error, repo) if isinstance(error, HfHubHTTPError) else None


def _explain_status(error: HfHubHTTPError, repo: str) -> str:
    status = error.response.status_code
    if status == 401 and get_token() is None:
        return "hub_token: the Hub wants a token and there is none; run `hf auth login`, or set HF_TOKEN"
    if status == 401 or isinstance(error, RepositoryNotFoundError):
        return (
            f"hub_token: the Hub does not accept this token for {repo}; make one with write access and log in with it"
        )
    if status == 403:
        return (
            f"hub_model_id: this token may not write to {repo}; choose a --hub_model_id under your own name, or a "
            "token with write access to that one"
        )
    return f"The push to {repo} failed, the Hub answered {status} ({error.server_message or 'no reason given'})"


def _causes(error: BaseException | None) -> list[BaseException]:
    """The error, what it was raised from, and so on down: the client wraps one failed upload in several errors."""
    return [] if error is None else [error, *_causes(error.__cause__)]
