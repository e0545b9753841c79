"""Data sets of the Hugging Face hub as sources: hf://datasets/OWNER/NAME[@REVISION][/PATH], as that itself names them.

They go through `huggingface_hub` and its cache, which honours HF_HOME, HF_HUB_OFFLINE, HF_ENDPOINT and HF_TOKEN.
Requests say only "langmill". No code of a data set is fetched or run.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from langmill.common.errors import DataError, UsageError

PREFIX = "hf://"
_SET = re.compile(
    r"hf://datasets/(?P<repo>\w[\w.-]*/\w[\w.-]*)(?:@(?P<revision>\w[\w.-]*))?(?:/(?P<path>[^\s]+?))?/?"
)
_CARD = ("README.md", "LICENSE.txt", "LICENSE.md")  # about the data, and none of them


@dataclass(frozen=True)
class Fetched:
    """A data set in the cache: OWNER/NAME, the commit, the folder of its files, and those that were asked for.

    `inside`: the folder that links among them lead to.
    """

    name: str
    commit: str
    folder: Path
    files: tuple[Path, ...]
    inside: Path


@lru_cache(maxsize=64)  # asked of the hub once a run
def fetched(source: str, suffixes: tuple[str, ...]) -> Fetched:
    """The files of a source that end in one of the suffixes, fetched where they are not in the cache yet.

    UsageError for what is no name of a data set, or a PATH (a file, a folder or a pattern) that it does not have;
    DataError where it cannot be fetched, saying what to do.
    """
    match = _SET.fullmatch(source)
    if match is None or ".." in (match["path"] or "").split("/"):
        raise UsageError(
            f"{source} is no data set of the hub: write hf://datasets/OWNER/NAME[@REVISION][/PATH]"
        )
    path = match["path"] or ""
    wanted = [path, f"{path}/*"] if path else [f"*{suffix}" for suffix in suffixes]
    folder = _snapshot(match["repo"], match["revision"], wanted, source)
    named = [folder / path] if path and (folder / path).exists() else list(folder.glob(path or "*"))
    below = [file for one in named for file in ([one] if one.is_file() else one.rglob("*"))]
    files = {
        file
        for file in below
        if file.is_file() and file.name.lower().endswith(suffixes) and file.relative_to(folder).as_posix() not in _CARD
    }  # fmt: skip
    if not files:
        raise UsageError(
            f"{source}: there is no such file of a known format in {folder}. Known are {', '.join(suffixes)}; offline, "
            "it may be that the cache holds a part of the data set only"
        )
    return Fetched(match["repo"], folder.name, folder, tuple(sorted(files)), folder.parents[1])


def _snapshot(repo: str, revision: str | None, wanted: list[str], source: str) -> Path:
    import huggingface_hub
    from huggingface_hub import constants, errors

    asked: dict[str, Any] = {"revision": revision, "headers": {"user-agent": "langmill"}}
    try:
        return Path(
            huggingface_hub.snapshot_download(
                repo, repo_type="dataset", allow_patterns=wanted, ignore_patterns=[*_CARD], **asked
            )
        )
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        offline = constants.is_offline_mode()
        why = "offline mode is on (HF_HUB_OFFLINE)" if offline else f"the hub cannot be reached: {error}"
        raise DataError(
            f"{source} is not in the hub's cache ({constants.HF_HUB_CACHE}), and {why}. Go online once to fetch it, or "
            "copy its files here and give their folder"
        ) from error
    except errors.GatedRepoError as error:
        raise DataError(
            f"{source}: its owner grants access by request: ask on its page, then set HF_TOKEN"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise DataError(f"{source}: the hub has {repo}, but no revision {revision}") from error
    except errors.RepositoryNotFoundError as error:
        raise DataError(
            f"{source}: there is no data set {repo} on the hub (a private one needs HF_TOKEN): check the name"
        ) from error
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError) as error:
        raise DataError(f"{source} could not be fetched from the hub: {error}") from error
