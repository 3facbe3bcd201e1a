"""Errors of the file system: the path they name, and their one line."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from chatdata.disk import describe_os_error, naming


def test_an_error_without_a_file_or_a_number() -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert describe_os_error(full) == "no space left on device; free some space, then call again"
    assert describe_os_error(OSError("the connection broke off")) == "the connection broke off"
    assert describe_os_error(OSError(errno.EBUSY, "Device or resource busy", 3)) == "device or resource busy"


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
