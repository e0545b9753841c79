"""Where a model is: a local folder, a .gguf file, or an id of the Hugging Face hub.

Hub ids go through `huggingface_hub` and its cache, which honours HF_HOME, HF_HUB_OFFLINE, HF_ENDPOINT and
HF_TOKEN. Requests say only "langmill": no versions, no machine, no counting.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from langmill.common.errors import ModelError, UsageError

_ID = re.compile(
    r"(?P<repo>\w[\w.-]*/\w[\w.-]*?)(?:/(?P<file>(?:\w[\w. -]*/)*\w[\w. -]*\.gguf))?(?:@(?P<revision>\w[\w./-]*))?"
)
FETCHED = ["*.safetensors", "*.json", "*.jinja", "vocab.txt", "merges.txt", "*.spm", "spiece.model"]
NOT_FETCHED = [
    "*/*",
    "consolidated*",
]  # other formats in subfolders, and Mistral's second copy of its weights
# What stands behind the model of a sentence encoder: how its states become one vector, and a layer on that.
BEHIND = ["[1-9]_Pooling/config.json", "[1-9]_Dense/config.json", "[1-9]_Dense/model.safetensors"]


def resolve(where: str | Path) -> Path:
    """The local folder or .gguf file of a model, fetched where it is a hub id and not yet in the cache.

    where: a folder, a .gguf file, "org/name[@revision]" or "org/name/file.gguf[@revision]".
    Raises UsageError for a path that is not there, ModelError saying what was looked for and what to do.
    """
    path = Path(where).expanduser()
    if not str(where).strip():
        raise ModelError("a model is needed: a folder, a .gguf file or a hub id, not an empty name")
    if path.is_dir():
        _refuse_loose_files(path)
        return path
    if path.is_file() and path.suffix == ".gguf":
        return path
    if path.exists():
        raise ModelError(f"{where} is neither a model folder nor a .gguf file; give the folder that holds it")
    match = _ID.fullmatch(str(where))
    if match is None:
        raise UsageError(
            f"{where} does not exist, and it is not a hub id "
            "(org/name, org/name@revision or org/name/file.gguf): check the path"
        )
    return _fetch(match["repo"], match["file"], match["revision"], str(where))


def _fetch(repo: str, file: str | None, revision: str | None, where: str) -> Path:
    import huggingface_hub
    from huggingface_hub import constants, errors

    asked: dict[str, Any] = {"revision": revision, "headers": {"user-agent": "langmill"}}
    try:
        if file is not None:
            return Path(huggingface_hub.hf_hub_download(repo, file, **asked))
        folder = Path(
            huggingface_hub.snapshot_download(
                repo, allow_patterns=FETCHED, ignore_patterns=NOT_FETCHED, **asked
            )
        )
        if (folder / "modules.json").is_file():
            same = asked | {"revision": folder.name}  # the folder is named by its commit
            huggingface_hub.snapshot_download(repo, allow_patterns=BEHIND, **same)
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        offline = constants.is_offline_mode()
        why = "offline mode is on (HF_HUB_OFFLINE)" if offline else f"the hub cannot be reached: {error}"
        raise ModelError(
            f"{where} is neither a local folder nor in the hub's cache ({constants.HF_HUB_CACHE}), and {why}. "
            "Go online once to fetch it, copy its folder here and give the path, or correct the name"
        ) from error
    except errors.GatedRepoError as error:
        raise ModelError(
            f"{where} is on the hub, but its owner grants access by request: ask on its page, then set HF_TOKEN"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ModelError(f"{where}: the hub has {repo}, but no revision {revision}") from error
    except errors.RepositoryNotFoundError as error:
        raise ModelError(
            f"{where} is neither a local folder nor a model on the hub "
            "(a private one needs HF_TOKEN): check the name"
        ) from error
    except errors.EntryNotFoundError as error:
        raise ModelError(f"{where}: the hub has {repo}, but no file {file} in it") from error
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError) as error:
        raise ModelError(f"{where} could not be fetched from the hub: {error}") from error
    return _complete(folder, repo, where)


def _refuse_loose_files(folder: Path) -> None:
    """Refuse a folder that is no model itself, but holds GGUF files: one of them must be named."""
    known = ("config.json", "adapter_config.json", "tokenizer.json")
    files = sorted(folder.glob("*.gguf"))
    if files and not any((folder / name).is_file() for name in known):
        raise ModelError(f"{folder} holds GGUF files and no config.json; name one, such as {files[0]}")


def _complete(folder: Path, repo: str, where: str) -> Path:
    """The folder, if what a model needs is in it; the cache may hold only what another tool fetched."""
    weights = any(folder.glob("*.safetensors"))
    if (folder / "config.json").is_file() and weights:
        return folder
    if files := sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.gguf")):
        raise ModelError(f"{where} holds GGUF files; name one, such as {repo}/{files[0]}")
    missing = "config.json" if weights else "safetensors weights"
    raise ModelError(
        f"{where}: its files in {folder} hold no {missing}. Pickled weights are never read; a repository of GGUF "
        f"files needs the file's name ({repo}/FILE.gguf); offline, an incomplete cache must be fetched again online"
    )
