"""Upload a finished folder to the Hugging Face hub.

>>> push_folder("exports/speeches", "ada/speeches", private=True)  # doctest: +SKIP
'https://huggingface.co/ada/speeches'
"""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from bora_pyro.errors import InputError

# The base class of HfHubHTTPError that the hub's client also raises if the hub does not answer. Which HTTP library defines it
# depends on the version of the client.
_HTTP_ERROR = next(kind for kind in HfHubHTTPError.__mro__ if kind.__name__ == "HTTPError")
_REMEDIES = {401: "log in with `hf auth login`, or set HF_TOKEN", 403: "use a token that may write there"}


def check_repo_id(repo_id: str) -> None:
    """Check that a repository on the hub can have this name.

        >>> check_repo_id("speeches")
        Traceback (most recent call last):
        bora_pyro.errors.InputError: push_to_hub 'speeches' is not a valid repository name on the hub; give USER/NAME

    Raises:
        InputError: the name is not of the form USER/NAME, or has characters that the hub does not allow.
    """
    try:
        validate_repo_id(repo_id)
        valid = re.fullmatch(r"[^/\s]+/[^/\s]+", repo_id) is not None
    except HFValidationError:
        valid = False
    if not valid:
        raise InputError(f"push_to_hub {repo_id!r} is not a valid repository name on the hub; give USER/NAME")


def push_folder(
    folder: str | Path, repo_id: str, *, private: bool = False, endpoint: str | None = None, token: str | None = None
) -> str:
    """Upload the files of a folder to a model repository, which is created if it does not exist.

    The folder is not changed. An existing repository keeps its other files and its visibility.

    Args:
        folder: the folder to upload.
        repo_id: the repository, ``USER/NAME``.
        private: whether a new repository is visible only to its owners.
        endpoint: address of the hub; default: ``HF_ENDPOINT``, or huggingface.co.
        token: access token; default: the token of this machine's login.

    Returns:
        The repository's address.

    Raises:
        InputError: the name is not valid, the hub refuses the upload, or the hub cannot be reached.
    """
    check_repo_id(repo_id)
    api = HfApi(endpoint=endpoint, token=token)
    try:
        address = api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Adapters fitted by bora_pyro")
    except (_HTTP_ERROR, OSError, RuntimeError, ValueError) as error:
        raise InputError(_refusal(Path(folder), repo_id, error)) from error
    return str(address)


def _refusal(folder: Path, repo_id: str, error: BaseException) -> str:
    # the client uploads in threads, which wrap the error of a file in another error
    statuses = [getattr(getattr(one, "response", None), "status_code", None) for one in (error, error.__cause__)]
    status = next((one for one in statuses if one is not None), None)
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    answer = f"the hub cannot be reached ({reason})" if status is None else f"the hub answers {status} ({reason})"
    remedy = _REMEDIES.get(status or 0, "check the network and HF_ENDPOINT" if status is None else "see its answer")
    return f"{repo_id} was not sent: {answer}; {remedy}. {folder} is complete: `hf upload {repo_id} {folder}` sends it later"
