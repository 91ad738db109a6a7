"""A finished folder to the Hugging Face hub (`--push-to-hub`)."""

from __future__ import annotations

import re
from pathlib import Path

from ardtrain.config import ConfigError
from ardtrain.reasons import first_line

_REPO = re.compile(r"(?:[\w.-]{1,96}/)?[\w.-]{1,96}")


def check_hub(repo: str) -> None:
    """Is the name one that a repository may have, and is somebody logged in? Before any work is done.

    Raises:
        ConfigError: no.
    """
    import huggingface_hub

    if not _REPO.fullmatch(repo):
        raise ConfigError(
            [f"--push-to-hub {repo}: a repository is called OWNER/NAME, of letters, digits, '-', '_', '.'"]
        )
    try:
        huggingface_hub.HfApi().whoami()
    except Exception as error:  # of the network, the token, the hub: all the user's to solve
        raise ConfigError(
            [
                f"--push-to-hub {repo}: the hub does not know you ({first_line(error)}); log in with `hf auth login`, "
                "or set HF_TOKEN, on a machine that reaches the hub"
            ]
        ) from error


def push(folder: Path, repo: str, *, private: bool, message: str) -> str:
    """Uploads the folder to a model repository, made if it is not there; returns its address.

    private: of a repository that is made now; an existing one stays as it is.

    Raises:
        ConfigError: the hub refuses. The folder stands all the same.
    """
    import huggingface_hub

    api = huggingface_hub.HfApi()
    try:
        address = api.create_repo(repo, private=private, repo_type="model", exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, repo_type="model", commit_message=message)
    except Exception as error:
        raise ConfigError(
            [f"--push-to-hub {repo}: {first_line(error)}; {folder} is complete, upload it with `hf upload {repo}`"]
        ) from error
    return str(address)
