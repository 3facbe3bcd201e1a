"""Files: written whole or not at all, with one clear line when the disk is full; JSON and TOML read as typed values.

A mistake is one line that says where it is, what must be there and what is there instead:

    run.json, key "tasks.gsm8k.draws": must be an integer of at least 1, not "four"
    r.toml: unknown key "sed"; did you mean "seed"?
    r.toml, key "stage": "midd"; did you mean "mid"?
    r.toml: no key "stage"; it must be base, mid or sft

A struct's own rules go into its `__post_init__`; a ValueError there becomes a line of the same form. No type may be "a
string with a pattern, or a list": msgspec 0.22 crashes when it frees one (LOG.md).
"""

import errno
import hashlib
import json
import os
import re
import secrets
import tomllib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import msgspec
from msgspec.inspect import is_struct_type

from chatdata.errors import BuildError, UsageError, nearest

T = TypeVar("T")
Failure = Callable[[str], Exception]  # what is raised, from its message
MAX_SHOWN = 60  # characters of a wrong value in a message
MAX_TOML, MAX_KEY_PARTS = 4_000_000, 100  # characters; parts of a dotted key
_TOML_TEXTS = re.compile(  # strings of several lines, strings, comments
    r"""\"{3}(?:\\.|[^\\])*?\"{3}|'{3}.*?'{3}|"(?:\\.|[^"\\\n])*"|'[^'\n]*'|\#[^\n]*""", re.DOTALL
)
MAX_COUNT = 2**53 - 1  # exact as a float as well; a build of this size is 16 petabytes
Count = Annotated[int, msgspec.Meta(ge=0, le=MAX_COUNT)]
Positive = Annotated[int, msgspec.Meta(ge=1, le=MAX_COUNT)]
_NOUNS: dict[Any, str] = {str: "a string", int: "an integer", float: "a number", bool: "true or false"}
_NOUNS |= {NoneType: "null", list: "a list", tuple: "a list"}


def check_file(out: Path, start: bytes = b"", kind: str = "") -> None:
    """Raise UsageError if `out` is a folder, a link, a device or in no folder, or a file that is not of the `kind`
    whose bytes begin with `start`."""
    if out.is_dir():
        raise UsageError(f"--out {out} is a folder; name a file")
    if out.is_symlink() or (out.exists() and not out.is_file()):
        raise UsageError(f"--out {out} is a link or a device, which would be replaced; choose another name")
    if out.exists() and not start.startswith(out.read_bytes()[: len(start)]):
        raise UsageError(f"--out {out} is a file that is not {kind}; choose another name")
    if not out.parent.is_dir():
        raise UsageError(f"--out {out}: there is no folder {out.parent}")


def check_free(out: Path) -> None:
    """Raise BuildError if `out` exists and is not an empty folder."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise BuildError(f"{out}: already exists; choose another --out")


def check_replaceable(out: Path) -> None:
    """Raise UsageError if no finished folder can be renamed to `out`: it is a mount point, or the process is in it."""
    place, mounts, listed = out.resolve(), Path("/proc/self/mountinfo"), set[str]()
    if mounts.is_file():  # `is_mount` does not see a mount of the same file system; white space is in octal
        listed = {line.split()[4] for line in mounts.read_text("utf-8", "surrogateescape").splitlines()}
    if place.is_mount() or re.sub(r"[\s\\]", lambda found: f"\\{ord(found[0]):03o}", str(place)) in listed:
        raise UsageError(f"--out {out} is a mount point, which no folder can replace; name a folder in it")
    if Path.cwd().is_relative_to(place):
        raise UsageError(f"--out {out}: a finished folder would replace the one you are in; name a folder in it")


def write_whole(path: Path, data: bytes) -> None:
    """Write to a hidden name next to `path`, sync, rename. Raises OSError, always with a name."""
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")
    try:
        with naming(path):
            partial.write_bytes(data)
            sync(partial)
            partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Flush a file, or a folder's list of names, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file with sorted keys, whole or not at all."""
    write_whole(path, (json.dumps(value, sort_keys=True, ensure_ascii=False, indent=1) + "\n").encode())


def home_path(path: Any) -> Path:
    """The path, with a `~` in front as the home folder: shells leave it in `--out=~/x`, and recipes have no shell."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UsageError(f"{path}: no home folder for ~ is known; write the whole path") from None


CACHE_UNUSABLE = "; CHATDATA_CACHE may name another one"


def cache_folder(name: str) -> Path:
    """The folder `name` of the cache, which is `$CHATDATA_CACHE` or else `chatdata` in the XDG cache folder.

    Raises RuntimeError, as `Path.home` does, if that has to be in the home folder and there is none.
    """
    if os.environ.get("CHATDATA_CACHE"):
        return Path(os.environ["CHATDATA_CACHE"], name).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "chatdata", name)


# what to do about an error, which the system's own words do not say
REMEDIES = {
    errno.EACCES: "choose another path, or change its permissions",
    errno.EEXIST: "choose another path",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f)",
    errno.EISDIR: "name a file",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ENOENT: "check the path: its folder must be there",
    **dict.fromkeys((errno.EDQUOT, errno.ENOSPC), "free some space, then call again"),
    errno.ENOTDIR: "a part of this path is a file",
    errno.EROFS: "choose a path that can be written to",
}


DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}


def describe_os_error(error: OSError) -> str:
    """The file, the system's own words, and what to do: "a/b: file exists; choose another path"."""
    if error.errno is None or not error.strerror:
        return str(error)
    path = error.filename if error.filename2 is None else error.filename2  # of two names: what was to be written
    where = f"{os.fsdecode(path)}: " if isinstance(path, (str, bytes, os.PathLike)) else ""
    remedy = f"; {REMEDIES[error.errno]}" if error.errno in REMEDIES else ""
    return f"{where}{error.strerror[:1].lower()}{error.strerror[1:]}{remedy}"


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Add the name of the file or folder being written to an error of the disk: `write` does not know it."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno in DISK_ERRORS:
            error.filename = str(path)
        raise


@contextmanager
def writes_to(folder: Path, full: str, unusable: str = "") -> Iterator[None]:
    """What is inside writes to `folder`: a full disk is a BuildError that names it and ends with `full`.

    unusable: first make the folder and try to write there; if that fails, the BuildError ends with this.
    """
    from tempfile import TemporaryFile

    is_usable = not unusable
    try:
        if unusable:
            folder.mkdir(parents=True, exist_ok=True)
            TemporaryFile(dir=folder).close()
            is_usable = True
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise BuildError(f"{folder}: no space left on the disk{full}") from None
        if is_usable:
            raise
        raise BuildError(f"{folder}: cannot be written ({(error.strerror or str(error)).lower()}){unusable}") from None


def decode(data: bytes, type: type[T], where: str, error: Failure, kind: Literal["json", "toml"] = "json") -> T:
    """Bytes of JSON or TOML as a `type`. Raises `error`, with `where` (a file, or a file and line) in front."""
    try:
        value = _read_toml(data.decode("utf-8-sig")) if kind == "toml" else msgspec.json.decode(data)
        if kind == "json":  # msgspec keeps the last of two equal keys, other readers may keep the first
            json.loads(data, object_pairs_hook=each_key_once)
    except (msgspec.MsgspecError, ValueError, RecursionError) as problem:  # 5,000 digits, 1,000 brackets, equal keys
        raise error(f"{where}: not valid {kind.upper()}: {str(problem).splitlines()[0]}") from None
    return convert(value, type, where, error)


def _read_toml(text: str) -> dict[str, Any]:
    """TOML of at most 4 MB whose keys have at most 100 parts: one of 50,000, in 100 kB, takes tomllib a minute."""
    if len(text) > MAX_TOML:
        raise ValueError(f"{len(text):,} characters, but at most {MAX_TOML:,} are read")
    lines = _TOML_TEXTS.sub(lambda found: "\n" * found[0].count("\n"), text).split("\n")
    if long := next((number for number, line in enumerate(lines, 1) if line.count(".") >= MAX_KEY_PARTS), None):
        raise ValueError(f"a key of more than {MAX_KEY_PARTS} parts (at line {long})")
    return tomllib.loads(text)


def json_lines(path: Path, error: Failure, remedy: str = "") -> Iterator[tuple[str, Any]]:
    """(file and line, plain data, also NaN) of each line of JSON, but not one that a kill cut off. Raises `error`."""
    *lines, _unfinished = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        where = f"{path} line {number}{remedy}"
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as problem:
            raise error(f"{where}: not valid JSON: {problem}") from None
        yield where, value


def convert(value: Any, type: type[T], where: str, error: Failure) -> T:
    """Plain data, as JSON and TOML have it, as a `type`. Raises `error`, with `where` in front."""
    try:
        return msgspec.convert(value, type)
    except msgspec.ValidationError as problem:
        place, text = _explain(value, type, str(problem))
        key = f", key {json.dumps(place.removeprefix('.'))}" if place else ""
        raise error(f"{where}{key}: {text}") from None


def each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Raises ValueError for a key that is in it twice: `json` would keep the last in silence."""
    value = dict(pairs)
    if len(value) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"key {shown(twice)} twice in one object")
    return value


def shown(value: Any) -> str:
    """A value of any kind as one short line of ASCII."""
    try:
        text = json.dumps(value, default=str)
    except (ValueError, RecursionError):  # an integer of more than 4,300 digits
        text = "a very large value"
    return text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN - 3]}..."


def _explain(value: Any, type: Any, problem: str) -> tuple[str, str]:
    """(place, text) of the innermost part of `value` that is wrong. problem: what msgspec says about `value`."""
    if inner := next(_inside(value, type, problem), None):
        return inner
    if get_origin(type) is Literal and isinstance(value, str):
        return "", shown(value) + nearest(value, get_args(type))
    return "", f"must be {_words(type)}, not {shown(value)}"


def _inside(value: Any, type: Any, problem: str) -> Iterator[tuple[str, str]]:
    """(place, text) of everything that is wrong inside a list or table."""
    origin, inner = get_origin(type), get_args(type)
    parts: Iterable[tuple[str, Any, Any]] = ()
    is_struct = isinstance(value, dict) and is_struct_type(type)
    fields = {field.encode_name: field for field in msgspec.structs.fields(type)} if is_struct else {}
    if origin in (Union, UnionType, Annotated):
        for member in inner:
            yield from _inside(value, member, problem)
    elif isinstance(value, list) and origin in (list, tuple):
        parts = ((f"[{i}]", item, inner[0]) for i, item in enumerate(value))
    elif isinstance(value, dict) and origin is dict:
        parts = ((f".{key}" if key.isidentifier() else f"[{shown(key)}]", value[key], inner[1]) for key in value)
    elif is_struct:
        parts = ((f".{key}", value[key], field.type) for key, field in fields.items() if key in value)
    for name, part, kind in parts:
        try:
            msgspec.convert(part, kind)
        except msgspec.ValidationError as error:
            place, text = _explain(part, kind, str(error))
            yield name + place, text
    if is_struct:
        unknown = [key for key in value if key not in fields and type.__struct_config__.forbid_unknown_fields]
        yield from (("", f"unknown key {json.dumps(key)}{nearest(key, list(fields))}") for key in unknown)
        missing = [key for key, field in fields.items() if field.required and key not in value]
        yield from (("", f'no key "{key}"; it must be {_words(fields[key].type)}') for key in missing)
        yield "", problem.splitlines()[0]  # of its __post_init__


def _words(type: Any) -> str:
    """What a value of the type is: "an integer of at least 1", "a string or a list", "base, mid or sft"."""
    origin, parts = get_origin(type), get_args(type)
    if origin is Annotated:
        meta = parts[1]
        least = f" of at least {meta.ge:,}" if meta.ge is not None else ""
        most = f" and at most {meta.le:,}" if meta.le is not None else ""
        return meta.description or f"{_words(parts[0])}{least}{most}"
    if origin in (Union, UnionType, Literal):
        # without null: TOML has none, and JSON with a null is written by us
        words = [str(part) if origin is Literal else _words(part) for part in parts if part is not NoneType]
        return " or ".join(part for part in (", ".join(words[:-1]), words[-1]) if part)
    return _NOUNS.get(origin or type, "a table")
