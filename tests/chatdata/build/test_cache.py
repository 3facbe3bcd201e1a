from __future__ import annotations

from pathlib import Path

import pytest

from chatdata.build.cache import take_unit


def test_a_unit_that_may_not_be_read_is_rendered_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> str:
        raise PermissionError(13, "Permission denied", str(path))

    (tmp_path / "key-hash.arrow").touch()
    monkeypatch.setattr("chatdata.build.cache.file_sha256", refuse)
    assert not take_unit(tmp_path / "key-hash.arrow")
