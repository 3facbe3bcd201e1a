"""Errors of the file system, with the path they name; JSON and TOML as typed values."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Meta

from chatdata.disk import (
    cache_folder,
    check_file,
    check_replaceable,
    convert,
    decode,
    describe_os_error,
    home_path,
    naming,
    writes_to,
)
from chatdata.errors import BuildError, FormatError, UsageError


def test_an_error_without_a_file_or_a_number() -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert describe_os_error(full) == "no space left on device; free some space, then call again"
    assert describe_os_error(OSError("the connection broke off")) == "the connection broke off"
    assert describe_os_error(OSError(errno.EBUSY, "Device or resource busy", 3)) == "device or resource busy"


def test_home_in_front_of_a_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/of/me")
    assert home_path("~/x") == Path("/of/me/x") and home_path(Path("~")) == Path("/of/me")
    for other in ("a/~/x", "x~", "/~"):
        assert home_path(other) == Path(other)
    with pytest.raises(
        UsageError, match=r"^~nobody-of-this-name/x: no home folder for ~ is known; write the whole path$"
    ):
        home_path("~nobody-of-this-name/x")
    monkeypatch.setenv("CHATDATA_CACHE", "~/cache")
    assert cache_folder("units") == Path("/of/me/cache/units")


def test_a_folder_that_no_other_can_replace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside = tmp_path / "a" / "b"
    inside.mkdir(parents=True)
    monkeypatch.chdir(inside)
    for out in (".", "..", str(inside), str(tmp_path / "a"), "/"):
        with pytest.raises(UsageError, match="mount point" if out == "/" else "would replace the one you are in"):
            check_replaceable(Path(out))
    for out in ("c", "../c", str(tmp_path / "ab")):
        check_replaceable(Path(out))


def test_a_mount_point_cannot_be_replaced(tmp_path: Path) -> None:
    """Also one of the same file system, with a name that the list of mounts writes in octal."""
    (tmp_path / "from").mkdir()
    (tmp_path / r"to \040 here").mkdir()
    code = (
        "import sys; from pathlib import Path; from chatdata.disk import check_replaceable\n"
        "print(Path(sys.argv[1]).is_mount())\ncheck_replaceable(Path(sys.argv[1]))"
    )
    mount = ["unshare", "--mount", "sh", "-c", 'mount --bind "$0" "$1" && exec "$2" -c "$3" "$1"']
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode != 0:
        pytest.skip("cannot mount here")
    command = [*mount, tmp_path / "from", tmp_path / r"to \040 here", sys.executable, code]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.stdout == "False\n" and "is a mount point, which no folder can replace" in result.stderr


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder, reason in (
        (tmp_path / "file" / "units", "not a directory"),
        (tmp_path / "file", "file exists"),
        (Path("/proc/none/units"), "no such file or directory"),
    ):
        with pytest.raises(BuildError) as error, writes_to(folder, "; full", "; choose another"):
            raise AssertionError("nothing may be written")
        assert str(error.value) == f"{folder}: cannot be written ({reason}); choose another"
    with writes_to(tmp_path / "new" / "units", "; full", "; choose another"):
        assert list((tmp_path / "new" / "units").iterdir()) == []


def test_only_what_the_disk_says_gets_a_name() -> None:
    """A refused connection has nothing to do with the file being written; a name that is there is the right one."""
    for error, name in [
        (ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"), None),
        (OSError(errno.EIO, "Input/output error"), "here"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "there"), "there"),
    ]:
        with pytest.raises(type(error)) as raised, naming(Path("here")):
            raise error
        assert raised.value is error and error.filename == name


# typed values

Count = Annotated[int, Meta(ge=0, le=2**53 - 1)]


class Part(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    rows: Count = 0
    digest: Annotated[str, Meta(pattern="^[0-9a-f]{4}$", description="4 hexadecimal digits")] = "0000"

    def __post_init__(self) -> None:
        if self.name != self.name.strip():
            raise ValueError(f'"{self.name}" has a space at its start or end')


class Whole(msgspec.Struct):
    stage: Literal["mid", "sft", "base"]
    rate: float = 0.5
    limit: Annotated[int, Meta(ge=1)] | None = None
    shuffle: bool = True
    parts: list[Part | str] = []
    named: dict[str, Part] = {}
    texts: str | tuple[str, ...] = ()
    other: Any = None


def problem(value: object) -> str:
    with pytest.raises(FormatError) as caught:
        convert(value, Whole, "f.json", FormatError)
    return str(caught.value)


def test_values_of_the_type() -> None:
    text = b'{"stage": "mid", "rate": 1, "parts": [{"name": "a"}, "b"], "texts": ["c"], "extra": [1]}'
    whole = decode(text, Whole, "f.json", FormatError)
    assert whole == Whole("mid", 1.0, parts=[Part("a"), "b"], texts=("c",))
    toml = b'\xef\xbb\xbfstage = "mid"\r\nlimit = 3\n[[parts]]\nname = "a"\n'
    assert decode(toml, Whole, "f.toml", FormatError, "toml") == Whole("mid", limit=3, parts=[Part("a")])
    assert decode(b"[1, 2]", list[int], "", FormatError) == [1, 2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stage": "midd"}, 'f.json, key "stage": "midd"; did you mean "mid"?'),
        ({"stage": "x"}, 'f.json, key "stage": "x"; valid: mid, sft, base'),
        ({"stage": 5}, 'f.json, key "stage": must be mid, sft or base, not 5'),
        ({"rate": "1"}, 'f.json, key "rate": must be a number, not "1"'),
        ({"limit": 0}, 'f.json, key "limit": must be an integer of at least 1, not 0'),
        ({"limit": True}, 'f.json, key "limit": must be an integer of at least 1, not true'),
        ({"shuffle": 1}, 'f.json, key "shuffle": must be true or false, not 1'),
        ({"parts": {}}, 'f.json, key "parts": must be a list, not {}'),
        ({"parts": [{"name": "a"}, 5]}, 'f.json, key "parts[1]": must be a table or a string, not 5'),
        ({"parts": [{}]}, 'f.json, key "parts[0]": no key "name"; it must be a string'),
        ({"parts": [{"name": "a", "row": 1}]}, 'f.json, key "parts[0]": unknown key "row"; did you mean "rows"?'),
        ({"parts": [{"name": " a"}]}, 'f.json, key "parts[0]": " a" has a space at its start or end'),
        (
            {"named": {"x-1": {"name": "a"}, "y": {"name": "b", "rows": 2**53}}},
            'f.json, key "named.y.rows": must be an integer of at least 0 and at most 9,007,199,254,740,991, '
            "not 9007199254740992",
        ),
        ({"named": {"a b\n": {"name": None}}}, r'f.json, key "named[\"a b\\n\"].name": must be a string, not null'),
        (
            {"named": {"x": {"name": "a", "digest": "12G4"}}},
            'f.json, key "named.x.digest": must be 4 hexadecimal digits, not "12G4"',
        ),
        ({"texts": ["a", 5]}, 'f.json, key "texts[1]": must be a string, not 5'),
        ({"texts": 1.5}, 'f.json, key "texts": must be a string or a list, not 1.5'),
        ({"shuffle": 10**5000}, "must be true or false, not a very large value"),
        ({"rate": ["x" * 100]}, 'must be a number, not ["' + "x" * 55 + "..."),
    ],
)
def test_what_is_wrong_and_what_would_be_right(changes: dict, message: str) -> None:
    found = problem({"stage": "mid", **changes})
    assert found == message or (not message.startswith("f.json") and found.endswith(message))


def test_the_whole_is_wrong() -> None:
    assert problem([]) == "f.json: must be a table, not []"
    assert problem({}) == 'f.json: no key "stage"; it must be mid, sft or base'


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"{", "json"),
        (b"", "json"),
        (b'{"stage": NaN}', "json"),
        (b'{"stage": "\xff"}', "json"),
        (b'{"stage": "\\ud800"}', "json"),
        (b"[" * 100_000, "json"),
        (b"9" * 5_000, "json"),
        (b"1e999", "json"),
        (b"stage = mid", "toml"),
        (b"stage = '\xff'", "toml"),
        (b"a = " + b"[" * 5_000, "toml"),
        (b"a = " + b"9" * 5_000, "toml"),
        (b".".join([b"a"] * 50_000) + b" = 1", "toml"),  # tomllib takes a minute
        (b"[ " + b' . "a"' * 101 + b" ]", "toml"),
        (b"# " + b"x" * 4_000_000, "toml"),
    ],
)
def test_bytes_that_are_not_read(content: bytes, kind: Any) -> None:
    with pytest.raises(FormatError, match=rf"^f: not valid {kind.upper()}: .+$"):
        decode(content, Any, "f", FormatError, kind)


def test_dots_in_texts_are_no_key() -> None:
    dots = "." * 200
    text = f"""a = "{dots}" # {dots}\nb = '{dots}'\nc = '''\n{dots}\n'''\nd = ["\\"{dots}"]\n"""
    read = decode(text.encode(), dict, "f", FormatError, "toml")
    assert read == {"a": dots, "b": dots, "c": f"{dots}\n", "d": [f'"{dots}']}
    parts = "a" + ".a" * 99
    assert decode(f"{parts} = 1".encode(), dict, "f", FormatError, "toml").keys() == {"a"}
    with pytest.raises(FormatError, match=r"^f: not valid TOML: a key of more than 100 parts \(at line 3\)$"):
        decode(f"x = '''\n'''\n{parts}.a = 1".encode(), dict, "f", FormatError, "toml")


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=3)),
    lambda inner: st.one_of(st.lists(inner, max_size=2), st.dictionaries(st.text(max_size=3), inner, max_size=2)),
    max_leaves=4,
)


@given(JSON, st.sampled_from(["stage", "rate", "limit", "shuffle", "parts", "named", "texts"]))
def test_any_value_is_accepted_or_one_line(value: object, key: str) -> None:
    try:
        convert({"stage": "mid", key: value}, Whole, "f.json", FormatError)
    except FormatError as error:
        assert str(error).startswith(f'f.json, key "{key}') and len(str(error).splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "key"),
    [('{"stage": "mid", "stage": "sft"}', "stage"), ('{"other": [{"a": 1, "b": {}, "a": 1}], "stage": "mid"}', "a")],
)
def test_a_key_twice_in_one_object(text: str, key: str) -> None:
    """msgspec and Python keep the last, other readers the first."""
    with pytest.raises(FormatError, match=rf'^f.json: not valid JSON: key "{key}" twice in one object$'):
        decode(text.encode(), Whole, "f.json", FormatError)


def test_many_keys_are_compared_at_once() -> None:
    many = "".join(f'"{number}": 0, ' for number in range(100_000))
    with pytest.raises(FormatError, match=r'key "99999" twice in one object$'):
        decode(f'{{{many}"99999": 0}}'.encode(), dict, "f.json", FormatError)


def test_a_file_that_may_be_written(tmp_path: Path) -> None:
    (tmp_path / "other.txt").write_text("mine")
    (tmp_path / "page.html").write_text("<!doctype html>")
    (tmp_path / "link.html").symlink_to(tmp_path / "page.html")
    (tmp_path / "dangling.html").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "fifo")
    for name in ("page.html", "new.html"):
        check_file(tmp_path / name, b"<!doc", "a page")
    for name, message in (
        ("", "is a folder"),
        ("nowhere/new.html", "there is no folder"),
        ("fifo", "is a link or a device"),
        ("link.html", "is a link or a device"),
        ("dangling.html", "is a link or a device"),
        ("other.txt", "is a file that is not a page"),
    ):
        with pytest.raises(UsageError, match=message):
            check_file(tmp_path / name, b"<!doc", "a page")
