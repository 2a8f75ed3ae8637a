"""Students on the Hugging Face hub: where they come from, and where they go."""

from __future__ import annotations

import logging
import os
import re
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from promptkd.errors import CheckpointError, ModelError
from promptkd.files import BACKBONE_FILE, write_bytes
from promptkd.model_card import model_card

if TYPE_CHECKING:
    from promptkd.evaluate import Evaluation
    from promptkd.student import Student

T = TypeVar("T")

CARD = "README.md"
_FILES = ("student.json", "student.safetensors")
_ID = re.compile(r"[\w.-]+/[\w.-]+")


class HubMixin:
    """What a `Student` has for the hub, named as huggingface_hub's own mixin names it."""

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike[str],
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        endpoint: str | None = None,
        **options: Any,
    ) -> Student:
        """Open a student folder, or one of the Hugging Face hub.

        Args:
            name: a folder, "org/name" or "hf://org/name", either with "@revision".
            revision: branch, tag or commit.
            token: for private repositories; default: the one that is logged in.
            cache_dir: instead of the hub's own cache.
            local_files_only: take what is in the cache, ask nobody.
            endpoint: another hub.
            options: see `load`.

        Raises:
            CheckpointError: neither a folder nor a repository's name, or no student in it.
            ModelError: no network, no such repository, or no right to read it.
        """
        folder = fetch(
            name,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            endpoint=endpoint,
        )
        return cast("type[Student]", cls).load(folder, **options)

    def save_pretrained(
        self,
        folder: str | os.PathLike[str],
        *,
        include_backbone: bool = True,
        license: str | None = None,
        results: Mapping[str, Evaluation] | None = None,
    ) -> Path:
        """Write the student's folder with a model card, as `push_to_hub` sends it.

        Args:
            folder: made if absent.
            include_backbone: store the frozen image tower too.
            license: for the card, as the hub spells it.
            results: for the card: accuracies by the name of the split they were measured on.
        """
        student = cast("Student", self)
        place = student.save(folder, include_backbone=include_backbone)
        write_card(student, place, license=license, results=results)
        return place

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        commit_message: str = "Add a promptkd student",
        include_backbone: bool = True,
        license: str | None = None,
        results: Mapping[str, Evaluation] | None = None,
        endpoint: str | None = None,
    ) -> str:
        """Send the student and its model card to the Hugging Face hub, in one commit.

        Args:
            repo_id: "org/name"; made if it isn't there.
            private: whether a new repository is private.
            token: with write access; default: the one that is logged in.
            revision: branch to write to.
            commit_message: of the commit.
            include_backbone: send the frozen image tower too.
            license: see `save_pretrained`.
            results: see `save_pretrained`.
            endpoint: another hub.

        Returns:
            The commit's address.

        Raises:
            ModelError: no network, or no right to write.
        """
        return push(
            cast("Student", self),
            repo_id,
            include_backbone=include_backbone,
            license=license,
            results=results,
            private=private,
            token=token,
            revision=revision,
            message=commit_message,
            endpoint=endpoint,
        )


def fetch(
    name: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    endpoint: str | None = None,
) -> Path:
    """The folder of a student: a local one as it is, one of the hub in the hub's cache.

    Args:
        name: a folder, "org/repository", "hf://org/repository", either with "@revision".
        revision: branch, tag or commit.
        token: for private repositories; default: the one that is logged in.
        cache_dir: instead of the hub's own cache.
        local_files_only: take what is in the cache, ask nobody.
        endpoint: another hub.

    Raises:
        CheckpointError: neither a folder nor a repository's name, or no student in it.
        ModelError: no network, no such repository, or no right to read it.
    """
    text = os.fspath(name)
    if not text.startswith("hf://") and Path(text).expanduser().is_dir():
        return Path(text).expanduser()
    repository, _, after = text.removeprefix("hf://").partition("@")
    if not _ID.fullmatch(repository):
        raise CheckpointError(
            f"'{text}' is neither a student's folder nor a repository of the hub ('org/name')"
        )
    from huggingface_hub import hf_hub_download

    def get(file: str) -> Path:
        return Path(
            hf_hub_download(
                repository,
                file,
                revision=revision or after or None,
                token=token,
                cache_dir=None if cache_dir is None else Path(cache_dir),
                local_files_only=local_files_only,
                endpoint=endpoint,
                library_name="promptkd",
            )
        )

    found = [_asked(lambda file=file: get(file), repository, file) for file in _FILES]  # type: ignore[misc]
    folder: Path = found[0].parent
    if '"embedded": true' in found[0].read_text(encoding="utf-8"):
        _asked(lambda: get(BACKBONE_FILE), repository, BACKBONE_FILE)
    return folder


def write_card(
    student: Student,
    folder: Path,
    *,
    license: str | None,
    results: Mapping[str, Evaluation] | None,
    repository: str = "org/name",
) -> None:
    """A student's model card into its folder."""
    card = model_card(student, license=license, results=results, repository=repository)
    write_bytes(folder / CARD, card.encode())


def push(
    student: Student,
    repository: str,
    *,
    include_backbone: bool,
    license: str | None,
    results: Mapping[str, Evaluation] | None,
    private: bool | None,
    token: str | bool | None,
    revision: str | None,
    message: str,
    endpoint: str | None,
) -> str:
    """Make the repository if need be and send the student's files in one commit; its address."""
    if not _ID.fullmatch(repository):
        raise CheckpointError(f"'{repository}' is no repository of the hub; write 'org/name'")
    from huggingface_hub import HfApi

    api = HfApi(endpoint=endpoint, token=token, library_name="promptkd")

    def send(folder: str) -> str:
        api.create_repo(repository, private=private, exist_ok=True)
        return str(
            api.upload_folder(
                repo_id=repository, folder_path=folder, commit_message=message, revision=revision
            ).commit_url
        )

    with tempfile.TemporaryDirectory() as folder:
        place = student.save(folder, include_backbone=include_backbone)
        write_card(student, place, license=license, results=results, repository=repository)
        return _asked(lambda: send(folder), repository, None)


def _asked(ask: Callable[[], T], repository: str, file: str | None) -> T:
    """Ask the hub; its many errors become one sentence each."""
    from huggingface_hub import errors

    level = logging.root.manager.disable
    logging.disable(logging.WARNING)  # each of its attempts would be told twice
    try:
        return ask()
    except errors.GatedRepoError as error:
        raise ModelError(
            f"'{repository}' is gated: ask for access on its page, then log in with 'hf auth login'"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ModelError(
            f"the hub has no repository '{repository}', or it is private: check the name, or log "
            "in with 'hf auth login' (or pass token)"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ModelError(f"'{repository}' has no such revision") from error
    except errors.LocalEntryNotFoundError as error:
        raise ModelError(_no_network(repository, file)) from error
    except errors.EntryNotFoundError as error:
        raise CheckpointError(
            f"'{repository}' on the hub holds no student: it has no {file}"
        ) from error
    except errors.LocalTokenNotFoundError as error:
        raise ModelError(_no_right(repository)) from error
    except errors.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        if status in (401, 403):
            raise ModelError(_no_right(repository)) from error
        raise ModelError(f"the hub refused '{repository}' (status {status}): try later") from error
    except OSError as error:
        if error.errno is not None and not isinstance(error, ConnectionError | TimeoutError):
            raise CheckpointError(f"'{repository}' can't be stored here: {error}") from error
        raise ModelError(_no_network(repository, file)) from error
    except Exception as error:
        if "onnect" in type(error).__name__ or "Timeout" in type(error).__name__:
            raise ModelError(_no_network(repository, file)) from error
        raise
    finally:
        logging.disable(level)


def _no_network(repository: str, file: str | None) -> str:
    if file is None:
        return f"the hub can't be reached to send '{repository}'; connect to the network"
    return (
        f"'{repository}' is not in the local cache and the hub can't be reached; connect to the "
        "network once, or name a student's folder"
    )


def _no_right(repository: str) -> str:
    return (
        f"'{repository}' can't be written without the right to: log in with 'hf auth login', or "
        "pass a token with write access (HF_TOKEN)"
    )
