"""docs/api.md: every public name is on the page, and every example gives the output shown."""

from __future__ import annotations

import doctest
import inspect
import re
from collections.abc import Callable
from pathlib import Path

import pytest

import chatdata as library
import chatdata.tasks
from chatdata.build.run import build

PAGE = (Path(__file__).parents[2] / "docs" / "api.md").read_text()


def test_every_public_name_is_on_the_page() -> None:
    headings = re.findall(r"^##+ .*$", PAGE, re.M)
    for name in library.__all__:
        assert any(re.search(rf"`chatdata\.{name}\b", heading) for heading in headings), name
    for name in ("Task", "Scoring", "ScoredSet", "Option", "load_tasks"):
        assert name in chatdata.tasks.__all__ and re.search(rf"\b{name}\(|`chatdata\.tasks\.{name}`", PAGE), name


@pytest.mark.parametrize("name", library.__all__)
def test_the_attributes_of_a_table_exist(name: str) -> None:
    """In a table below "### `chatdata.Split`", `split.tokens(…)` and `tokens` name attributes of Split."""
    public = getattr(library, name)
    if not inspect.isclass(public):
        return
    section = re.split(r"^##+ ", PAGE.split(f"### `chatdata.{name}`\n")[1], flags=re.M)[0]
    cells = re.findall(r"^\| (`.*?) \|", section, re.M)
    named = {word for cell in cells for word in re.findall(r"`(?:\w+\.)?([a-z]\w*)(?:\(.*?\))?`", cell)}
    named -= {"len"}
    fields = set(getattr(public, "__dataclass_fields__", {}))
    known = {word for word in dir(public) if not word.startswith("_")} | fields
    assert named and named <= known | instance_attributes(public), named - known


def instance_attributes(public: type) -> set[str]:
    """What `__init__` sets."""
    return set(re.findall(r"self\.(\w+) = ", inspect.getsource(public)))


def test_the_signature_of_build() -> None:
    shown = re.search(r"`(build\(plan, out,[^`]*\))`", PAGE)
    names: dict = {}
    exec(f"def {shown[1]}: ..." if shown else "", names)
    described = [(p.name, p.kind, p.default) for p in inspect.signature(names["build"]).parameters.values()]
    actual = [(p.name, p.kind, p.default) for p in inspect.signature(build).parameters.values()]
    assert described == [parameter for parameter in actual if parameter[0] != "progress"]


def test_the_examples(tmp_path: Path, command_line: Callable, offline: None, monkeypatch: pytest.MonkeyPatch) -> None:
    (command,) = re.findall(r"^    (chatdata .*)$", PAGE, re.M)
    assert command_line(command, tmp_path).returncode == 0
    monkeypatch.chdir(tmp_path)
    examples = doctest.DocTestParser().get_doctest(PAGE, {}, "api.md", "docs/api.md", 0)
    report: list[str] = []
    result = doctest.DocTestRunner().run(examples, out=report.append)
    assert result.attempted > 40 and result.failed == 0, "".join(report)
