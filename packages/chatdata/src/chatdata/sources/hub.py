"""What comes over the network: dataset files from the Hub, files by URL; and chat datasets read through `datasets`.

Everything is cached: Hub files in the Hub's own cache, URLs in chatdata's. A branch or tag (`main` if the recipe names
none) stays at the commit it was first resolved to. Cached files are used without any request. Retries are the Hub
library's own; its log messages are kept off the terminal, because the outcome is one line.
"""

import hashlib
import logging
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import urlsplit

from chatdata.disk import CACHE_UNUSABLE, cache_folder, write_whole, writes_to
from chatdata.errors import ChatdataError, MissingSource, SourceError, first_line

URL_TIMEOUT = 10  # seconds without an answer; the Hub's is HF_HUB_ETAG_TIMEOUT, 10 by default
NOT_AGAIN = 30  # seconds before a host that did not answer is tried again: five missing sources wait once
_may_fetch = [True]
_unreachable: dict[str, tuple[float, str]] = {}  # host → when it may be tried again, and what went wrong


def snapshot(repo: str, pattern: str, revision: str | None) -> tuple[Path, str]:
    """Folder with the files of dataset `repo` that match `pattern`, and its commit; from the cache if complete there.

    Raises MissingSource if the files are not in the cache and cannot be downloaded, SourceError if the Hub has no such
    repository or revision.
    """
    # without it the first use in a day asks the Hub for a list of coding agents, to report which of them runs this
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from huggingface_hub import constants, get_cached_repo_tree
    from huggingface_hub.errors import CachedRepoTreeNotFoundError, HFValidationError, LocalEntryNotFoundError
    from huggingface_hub.file_download import repo_folder_name

    wanted = revision or "main"
    folder = None
    try:
        # all files come from the commit that was cached first, or two splits could be of two versions of a dataset
        ref = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=repo, repo_type="dataset"), "refs", wanted)
        wanted = ref.read_text().strip() if ref.is_file() else wanted
        folder = download(repo, [pattern], wanted, cached=True)
        get_cached_repo_tree(repo, repo_type="dataset", revision=folder.name)
    except HFValidationError as error:
        raise SourceError(first_line(error)) from None
    except (LocalEntryNotFoundError, CachedRepoTreeNotFoundError):
        try:
            with requests_to(f"{repo} is not in the Hub's cache and ", repo, wanted):
                commit_of(repo, wanted)  # asks the Hub once whether it has this
                folder = download(repo, [pattern], wanted)
        except MissingSource:
            # cached file by file, so only the Hub knows whether these are all
            if folder is None or not any(folder.glob(pattern)):
                raise
    return folder, folder.name


def commit_of(repo: str, revision: str) -> str:
    """The commit that a revision of dataset `repo` is at: one request."""
    from huggingface_hub import HfApi, constants

    # `snapshot_download` has no timeout for this
    return str(HfApi().dataset_info(repo, revision=revision, timeout=constants.HF_HUB_ETAG_TIMEOUT).sha)


@contextmanager
def requests_to(failed: str, repo: str, revision: str, doing: str = "cannot be downloaded from") -> Iterator[None]:
    """What is inside asks the Hub for dataset `repo`, or another host ("").

    failed: start of the message if the host cannot be reached or refuses. Raises MissingSource for that, SourceError if
    the Hub has no such repository or revision.
    """
    from huggingface_hub import constants
    from huggingface_hub import errors as hf

    host = constants.ENDPOINT
    if not _may_fetch[-1]:
        raise MissingSource(failed.removesuffix(" and "))
    try:
        if repo:
            _check_reachable(host)
        with _quiet():
            yield
    except ChatdataError:
        raise
    except hf.RevisionNotFoundError:
        raise SourceError(f'{repo} has no revision "{revision}" on the Hub') from None
    except hf.GatedRepoError:
        raise SourceError(f"{repo} is gated on the Hub: ask for access on its page, then `hf auth login`") from None
    except hf.RepositoryNotFoundError:
        raise SourceError(f"{repo} is not a dataset on the Hub (or is private: `hf auth login`)") from None
    except hf.HfHubHTTPError as error:
        raise MissingSource(f"{failed}the Hub refused it: {_hub_reason(error)}") from error
    except hf.OfflineModeIsEnabled:
        raise MissingSource(f"{failed}HF_HUB_OFFLINE is set") from None
    except Exception as error:  # the HTTP client's, the disk's, or that of the library's transfer engine
        if not repo:
            raise MissingSource(f"{failed}{first_line(error)}") from error
        _note_unreachable(host, error)
        raise MissingSource(f"{failed}{doing} {host}: {first_line(error.__cause__ or error)}") from error


def download(repo: str, patterns: list[str], revision: str, into: Path | None = None, cached: bool = False) -> Path:
    """The folder `into`, by default one of the Hub's cache, with the files that match, fetched unless `cached`."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import tqdm  # type: ignore[attr-defined]  # documented

    class Bar(tqdm):
        """The library's progress bar, on a terminal only."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{"disable": None, **kwargs})  # type: ignore[no-untyped-call]  # has no types

    options: dict[str, Any] = {"repo_type": "dataset", "allow_patterns": patterns, "local_dir": into, "tqdm_class": Bar}
    with _quiet():
        return Path(snapshot_download(repo, revision=revision, local_files_only=cached, **options))


@contextmanager
def nothing_fetched() -> Iterator[None]:
    """Inside, what is not in a cache raises MissingSource: no request is made."""
    _may_fetch.append(False)
    try:
        yield
    finally:
        _may_fetch.pop()


def _check_reachable(host: str) -> None:
    """Raise the error of the last attempt if `host` failed to answer a moment ago."""
    until, reason = _unreachable.get(host, (0.0, ""))
    if time.monotonic() < until:
        raise ConnectionError(reason)


def _note_unreachable(host: str, error: Any) -> None:
    _unreachable[host] = time.monotonic() + NOT_AGAIN, first_line(error)


def load_split(folder: Path, subset: str, split: str) -> tuple[list[Path], Any]:
    """The files of one split of the dataset repository in `folder`; if not all of them are Parquet or JSONL: no files,
    and the split as a `datasets.Dataset` (Arrow on disk, cached).

    The only place that imports `datasets`, which imports torch if it is installed. It finds the files of any layout. It
    gets local files, because for a repository's name it would fall back to the version it read last when the Hub does
    not answer. We read Parquet and JSONL ourselves: errors name lines, and there is no second copy on disk.
    """
    import datasets

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    folder = place = folder.resolve()
    try:
        with _quiet(), TemporaryDirectory() as plain:
            _check_card(folder)
            if re.search(r"[][*?]", str(folder)):  # `datasets` takes these for patterns: links elsewhere
                place = shutil.copytree(folder, Path(plain, "dataset"), copy_function=os.symlink).resolve()
            found = datasets.load_dataset_builder(str(place), subset or None).config.data_files or {}
            names = {key: [f if "://" in f else os.path.relpath(f, place) for f in found[key]] for key in found}
            paths = {key: [_path_inside(folder, name) for name in names[key]] for key in names}
            files = paths.get(split, [])
            if files and all(file.suffix in (".parquet", ".jsonl") for file in files):
                return files, None
            dataset = datasets.load_dataset(str(place), subset or None, split=split)
    except SourceError:
        raise
    except Exception as error:  # whatever its builders raise, or an error around it that says nothing
        if subsets := re.search(r"(?:Available|configs): \[(.*)\]", str(error)):
            raise SourceError(f'key "subset": must be one of {subsets[1]}') from None
        reason = error.__cause__ if isinstance(error, datasets.exceptions.DatasetGenerationError) else None
        raise SourceError(f"`datasets` cannot load it: {first_line(reason or error)}") from error
    # where rows differ in keys or types, datasets 4 and later has JSON: it takes strings like "0" or "null" for numbers
    if re.search(r"\bJson\(", repr(dataset.features)):
        raise SourceError("rows differ in keys or types, which `datasets` does not keep exactly; convert it to JSONL")
    return [], dataset


def _check_card(folder: Path) -> None:
    """Raise SourceError if the card of a dataset names files outside of its folder: `datasets` would look for them."""
    from huggingface_hub import DatasetCard

    readme, standalone = folder / "README.md", folder / ".huggingface.yaml"
    texts = [readme.read_text(encoding="utf-8-sig")] if readme.is_file() else []
    texts += [f"---\n{standalone.read_text(encoding='utf-8-sig')}\n---\n"] if standalone.is_file() else []
    cards: list[Any] = [DatasetCard(text).data for text in texts]
    configs = [config for card in cards for config in card.get("configs") or []]
    named = ("data_files", "data_dir")
    waiting: list[Any] = [config.get(key) for config in configs if isinstance(config, dict) for key in named]
    seen = set[int]()  # in YAML a list may be in itself
    for value in waiting:  # it grows
        if isinstance(value, str):
            _path_inside(folder, value)
        elif isinstance(value, dict | list) and id(value) not in seen:
            seen.add(id(value))
            waiting += value.values() if isinstance(value, dict) else value


def _path_inside(folder: Path, name: str) -> Path:
    """The file `name` of a dataset. Raises SourceError if it is not below `folder`, followed through links: only those
    of the Hub's cache may lead out, to its blobs."""
    path = Path(os.path.normpath(folder / name))
    blobs = [above / "blobs" for above in folder.parents[1:3]] if folder.parent.name == "snapshots" else []
    inside = path.is_relative_to(folder) and any(path.resolve().is_relative_to(root) for root in (folder, *blobs))
    if "://" in name or not inside:
        raise SourceError(f"{name} is outside of the dataset's folder; nothing there is read")
    return path


def fetch_url(url: str, instead: str) -> Path:
    """The cached file of `url`, downloaded to a temporary name and renamed on first use.

    Raises MissingSource, and SourceError for an address that is not https (http only to this machine).
    """
    try:
        address = urlsplit(url)
    except ValueError:  # brackets that hold no IPv6 address
        address = urlsplit("")
    is_here = address.scheme == "http" and address.hostname in ("127.0.0.1", "localhost", "::1")
    if not ((address.scheme == "https" and address.hostname) or is_here):
        raise SourceError(f"{url}: neither a file nor an https address; {instead}")
    folder = cache_folder("urls") / hashlib.sha256(url.encode("utf-8", "replace")).hexdigest()[:16]
    path = folder / (re.sub(r"[^\w.-]|^\.+", "_", Path(address.path).name)[-100:] or "file")
    if path.is_file():
        return path
    if not _may_fetch[-1]:
        raise MissingSource(f"{url} is not in the cache; {instead}")
    from huggingface_hub import get_session

    host, response = address.netloc, None
    with writes_to(folder, CACHE_UNUSABLE, CACHE_UNUSABLE):
        pass
    try:
        _check_reachable(host)
        with get_session().stream("GET", url, timeout=URL_TIMEOUT) as response:
            response.raise_for_status()
            write_whole(path, response.read())
    except Exception as error:  # the HTTP client's, whose package differs between huggingface_hub 1 and 2; the disk's
        if response is None:
            _note_unreachable(host, error)
        raise MissingSource(f"cannot download {url}: {first_line(error)}; {instead}") from None
    return path


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the libraries log (retries, hints, errors they also raise), unless their log level was set."""
    loggers = map(logging.getLogger, ("huggingface_hub", "datasets"))
    changed = [logger for logger in loggers if logger.level == logging.WARNING]
    for logger in changed:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger in changed:
            logger.setLevel(logging.WARNING)


def _hub_reason(error: Any) -> str:
    """What happened and at which URL: the first two lines of a Hub error, less its request number."""
    text = re.sub(r"\(Request ID: [^)]*\)|For more information check.*", "", str(error))
    return " ".join([line.strip() for line in text.splitlines() if line.strip()][:2])
