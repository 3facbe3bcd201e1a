"""What comes over the network: dataset files from the Hub, chat datasets through `datasets`, files by URL.

Everything is cached: Hub files in the Hub's own cache, where `main` is resolved to a commit on first use and kept
(pin `revision` for another one), URLs in chatdata's cache.
"""

from __future__ import annotations

import hashlib
import os
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from chatdata.errors import MissingSource, SourceError


def snapshot(
    repo: str, pattern: str, revision: str | None, is_complete: Callable[[Path, str], bool]
) -> tuple[Path, str]:
    """Folder with the files of dataset `repo` that match `pattern`, and its commit; from the cache if complete there.

    Raises SourceError if the Hub cannot be reached or has no such repository or revision.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    def download(local_files_only: bool) -> Path:
        return Path(
            snapshot_download(
                repo,
                repo_type="dataset",
                revision=revision or "main",
                allow_patterns=[pattern],
                local_files_only=local_files_only,
            )
        )

    try:
        folder = download(local_files_only=True)
        if is_complete(folder, pattern):
            return folder, folder.name
    except (LocalEntryNotFoundError, OSError):
        pass  # not in the cache: ask the Hub
    try:
        folder = download(local_files_only=False)
    except RevisionNotFoundError:
        raise SourceError(f'{repo} has no revision "{revision}" on the Hub') from None
    except RepositoryNotFoundError:
        raise SourceError(f"{repo} is not a dataset on the Hub (or is private: `hf auth login`)") from None
    except LocalEntryNotFoundError:
        raise SourceError(f"cannot reach the Hub for {repo}") from None
    except HfHubHTTPError as error:
        raise SourceError(f"the Hub refused {repo}: {str(error).splitlines()[0]}") from None
    except (OSError, RuntimeError) as error:
        raise SourceError(f"the download of {repo} broke off: {_first_line(error)}") from None
    except Exception as error:
        # the HTTP client's own exceptions, whose package differs between huggingface_hub 1 (httpx) and 2 (httpx2)
        if not type(error).__module__.startswith("httpx"):
            raise
        raise SourceError(f"the download of {repo} broke off: {_first_line(error)}") from None
    return folder, folder.name


def load_chat_dataset(repo: str, subset: str, split: str, revision: str | None, fetch: str) -> tuple[Any, str]:
    """A Hub dataset in a chat form as a `datasets.Dataset` (Arrow on disk, cached), and its commit.

    The only place that imports `datasets`, which imports torch where it can.
    """
    from huggingface_hub import HfApi

    try:
        commit = HfApi().dataset_info(repo, revision=revision).sha or ""
        from datasets import load_dataset

        return load_dataset(repo, subset or None, split=split, revision=commit), commit
    except Exception as error:  # datasets raises whatever its builders raise
        raise SourceError(f"{repo} {split}: cannot be loaded: {_first_line(error)}; {fetch}") from None


def fetch_url(url: str, instead: str) -> Path:
    """The cached file of `url`, downloaded to a temporary name and renamed on first use. Raises SourceError."""
    folder = cache_folder() / "urls" / hashlib.sha256(url.encode()).hexdigest()[:16]
    path = folder / url.rsplit("/", 1)[-1]
    if path.is_file():
        return path
    partial = path.with_name(f"{path.name}.{os.getpid()}.part")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with urllib.request.urlopen(url, timeout=30) as response, partial.open("wb") as file:
            while chunk := response.read(1 << 20):
                file.write(chunk)
            expected = response.headers.get("Content-Length")
        if expected is not None and partial.stat().st_size != int(expected):
            raise OSError(f"got {partial.stat().st_size:,} of {int(expected):,} bytes")
        partial.replace(path)
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise MissingSource(f"cannot download {url}: {_first_line(reason)}; {instead}") from None
    finally:
        partial.unlink(missing_ok=True)
    return path


def cache_folder() -> Path:
    """`$CHATDATA_CACHE`, else `chatdata` in the XDG cache folder."""
    if os.environ.get("CHATDATA_CACHE"):
        return Path(os.environ["CHATDATA_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "chatdata"


def _first_line(error: Any) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
