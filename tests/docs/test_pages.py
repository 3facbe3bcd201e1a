"""The pages: links, the README's tree and route, keys and columns. Their commands are in test_commands.py."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

import chatdata as library

ROOT = Path(__file__).parents[2]
PAGES = [
    *(ROOT / f"{name}.md" for name in ("README", "README.zh", "CONTRIBUTING")),
    *sorted((ROOT / "docs").glob("*.md")),
]
IDS = [page.stem for page in PAGES]


def text_of(name: str) -> str:
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


def blocks(name: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}.*?\n(.*?)^```", text_of(name), re.S | re.M)


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_what_a_page_links_to_is_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" not in target:
            file, _, heading = target.partition("#")
            linked = page.parent / file if file else page
            assert linked.exists(), (page.name, target)
            if heading:
                headings = re.findall(r"^#+ (.*)$", linked.read_text(), re.M)
                assert heading in [re.sub(r"[^\w -]", "", line.lower()).replace(" ", "-") for line in headings]
    text = text.partition("\n## Sources\n")[0]  # name files of other projects
    for named in re.findall(r"(?<![\w/.-])((?:packages|docs|tests|examples|benchmarks|notebooks)/[\w./-]*\w)", text):
        assert (ROOT / named).exists(), (page.name, named)


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_the_modules_that_a_page_names_exist(page: Path) -> None:
    """`render/format.py`: below the repository or one of the packages."""
    text = page.read_text(encoding="utf-8").partition("\n## Sources\n")[0]
    homes = [ROOT, *(path for path in ROOT.glob("packages/*/src/*") if path.is_dir())]
    for named in re.findall(r"`(\w+/[\w./]+\.(?:py|toml|jinja|jsonl))`", text):
        assert any((home / named).exists() for home in homes), (page.name, named)


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_the_tests_that_a_page_names_exist(page: Path) -> None:
    """`tests/chattrain/test_optim.py::test_rates`, `::test_another` of the same file."""
    file = None
    for path, name in re.findall(r"`(tests/[\w/]+\.py)?(?:::(\w+))?`", page.read_text(encoding="utf-8")):
        file = ROOT / path if path else file
        if path or name:
            assert file and file.exists() and f"def {name}" in file.read_text(encoding="utf-8"), (page.name, path, name)


def test_our_size_in_the_comparison() -> None:
    """Lines of Python in the packages, to the nearest thousand or so."""
    shown = int(re.findall(r"about ([\d,]+) lines of Python", text_of("comparison.md"))[0].replace(",", ""))
    lines = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in ROOT.glob("packages/**/*.py"))
    assert abs(lines - shown) < 1_000, lines


def test_every_page_is_reached_from_the_readme() -> None:
    reached, new = set(), {ROOT / "README.md"}
    while new:
        reached |= new
        links = {page.parent / link for page in new for link in re.findall(r"\]\(([\w./-]+\.md)\)", page.read_text())}
        new = {link.resolve() for link in links} - reached
    assert [page.name for page in PAGES if page not in reached] == []


def test_the_tree_of_the_readme() -> None:
    """All folders of the repository, and of each package every room and module, by names that exist."""
    tree = (ROOT / "README.md").read_text().split("## The tree\n")[1].split("\n## ")[0]
    tracked = subprocess.run(["git", "ls-tree", "-d", "--name-only", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    folders = {name for name in tracked.stdout.split() if not name.startswith(".")}
    assert folders <= set(re.findall(r"([\w.]+)/", tree)), "a folder that the README's tree does not name"
    for name, lines in re.findall(r"^    packages/(\w+)/src/\w+/ .*\n((?: {8}.*\n)+)", tree, re.M):
        package = ROOT / "packages" / name / "src" / name
        named: set[str] = set()
        for line in lines.splitlines():
            entries = re.findall(r"[\w.]+", line[8:].split("  ")[0])
            assert all((package / entry).exists() for entry in entries), line
            for file in re.findall(r"\w+\.py", line[8:].partition("  ")[2]):
                assert any((package / entry / file).exists() for entry in entries), (line, file)
            named |= set(entries)
        modules = {path.name for path in package.iterdir() if path.suffix == ".py" and "__" not in path.name}
        rooms = {path.name for path in package.iterdir() if (path / "__init__.py").exists()}
        assert modules | rooms <= named, (name, modules | rooms - named)


def test_the_route_of_the_readme() -> None:
    route = (ROOT / "README.md").read_text().split("## The route of a conversation\n")[1].split("\n## ")[0]
    modules = re.findall(r"(?<![\w/])([\w/]+\.py)", route.replace("tests/test_route.py", ""))
    packages = [path for path in ROOT.glob("packages/*/src/*") if path.is_dir()]
    sources = {file.relative_to(package).as_posix() for package in packages for file in package.rglob("*.py")}
    assert len(modules) > 8 and set(modules) <= sources, set(modules) - sources


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_bytes()) <= 8_192


def test_the_two_commands() -> None:
    """CI runs the README's test command as it is."""
    text = (ROOT / "README.md").read_text()
    command = "pip install uv && uv run pytest -n 2 --dist worksteal"
    assert f"\n    {command}\n" in text and f"\n{command}\n" in (ROOT / ".ci" / "run").read_text()


@pytest.mark.parametrize("name", ["README.md", "README.zh.md"])
def test_the_output_of_the_demo(name: str, command_line: Callable, tmp_path: Path, offline: None) -> None:
    """Each line that the README shows is a line that the build prints."""
    section = (ROOT / name).read_text().split("uv run --package chatdata chatdata ")[1].split("\n\n")
    command, shown = section[0], [line.strip() for line in section[1].splitlines()]
    result = command_line(f"chatdata {command}", tmp_path)
    printed = {line.strip() for line in result.stdout.splitlines()}
    assert len(shown) > 3 and set(shown) <= printed, set(shown) - printed


def test_the_script_of_building(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(blocks("building.md", "python")[0])
    result = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, timeout=100)
    manifest = json.loads((tmp_path / "out" / "demo-sft" / "manifest.json").read_text())
    assert result.stdout == f"{manifest['splits']['train']['tokens']}\n", result.stderr


def test_reading_without_chatdata(demo_mid: Path) -> None:
    code = text_of("format.md").split("## Reading without chatdata\n")[1]
    code = "\n".join(line[4:] for line in code.splitlines()).replace('"OUT', f'"{demo_mid}')
    names: dict = {}
    exec(code, names)
    document = library.open_build(demo_mid)["train"][0]
    assert names["first"].tolist() == document.tokens.tolist()


def test_index_columns_are_documented() -> None:
    from chatdata.shards.index import index_schema

    table = text_of("format.md").split("## Index columns")[1].split("## Manifest")[0]
    named = [name for cell in re.findall(r"^\| ([a-z_, ]+) \|", table, re.M) for name in cell.split(", ")]
    assert named[1:] == index_schema().names


def test_the_recipe_of_the_page_has_every_key_and_is_one() -> None:
    from chatdata.recipe import (
        OVERFLOW,
        STAGES,
        ZERO_SUPERVISED,
        EntryTable,
        RecipeTable,
        parse_recipe,
        shipped_recipes,
    )
    from chatdata.tasks import load_tasks

    text, tasks = text_of("recipes.md"), load_tasks()
    table = tomllib.loads(blocks("recipes.md", "toml")[0])
    recipe = parse_recipe(table, "docs/recipes.md", Path("recipe.toml"), tasks)
    assert [entry.task for entry in recipe.splits["train"]] == ["gsm8k"] * 3 + ["conversations"] * 2 + [
        "simple_spelling",
        "spelling_bee",
    ]
    shares = tomllib.loads(blocks("recipes.md", "toml")[1])
    parse_recipe(shares, "docs/recipes.md", Path("recipe.toml"), tasks)
    entries = [*table["train"], *table["val"], *shares["train"]]
    assert set(table) == set(RecipeTable.__struct_fields__)
    options = {key for task in tasks.values() for key in task.options}
    assert {key for entry in entries for key in entry} == set(EntryTable.__struct_fields__) | options
    comment = dict(re.findall(r"^(\w+) = .*?# (.*)$", blocks("recipes.md", "toml")[0], re.M))
    for key, words in (("stage", STAGES), ("overflow", OVERFLOW), ("zero_supervised", ZERO_SUPERVISED)):
        assert all(re.search(rf"\b{word}\b", comment[key]) for word in words), key
    assert all(f"`{name}`" in text for name in shipped_recipes())
    bare = parse_recipe({"stage": "mid", "train": [{"task": "gsm8k"}]}, "", Path("r.toml"), tasks)
    assert (bare.seed, bare.overflow, bare.zero_supervised, bare.shuffle["val"]) == (42, "keep", "keep", True)
    assert (bare.splits["train"][0].subset, bare.splits["train"][0].split) == ("main", "train")
