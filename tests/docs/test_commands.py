"""Every command line on the pages is parsed by the real commands and, if it needs no data, run.

This file also writes docs/commands.md, which lists every option of `--help` (or: just commands):

    uv run python tests/docs/test_commands.py
"""

from __future__ import annotations

import inspect
import json
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path

import click
import pytest

import chatdata as library

ROOT = Path(__file__).parents[2]
PAGES = [
    *(ROOT / f"{name}.md" for name in ("README", "README.zh", "CONTRIBUTING")),
    *sorted((ROOT / "docs").glob("*.md")),
]
IDS = [page.stem for page in PAGES]
PROGRAMS = ("chatdata", "chattrain", "chateval")
# options of other programs on the pages
FOREIGN = {
    "--nproc-per-node",
    "--package",
    "--logdir",
    "--project",
    "--extra",
    "--local-dir",
    "--repo-type",
    "--revision",
    "--include",
    "--dist",
    "--standalone",
}


def commands(program: str) -> dict[str, click.Command]:
    """ "chatdata build" → its command, …, groups taken apart."""

    def walk(name: str, command: click.Command) -> Iterator[tuple[str, click.Command]]:
        if isinstance(command, click.Group):
            for part, inner in sorted(command.commands.items()):
                yield from walk(f"{name} {part}", inner)
        else:
            yield name, command

    return dict(walk(program, import_module(f"{program}.cli").cli))


# --- lines of the pages ----------------------------------------------------------------------------------------------


def own_text(page: Path) -> str:
    """A page without its section "Sources", which names other projects' files and options."""
    return page.read_text(encoding="utf-8").partition("\n## Sources\n")[0]


def command_lines(page: Path) -> list[str]:
    """The lines of a page's indented and shell blocks that call our programs: "chatdata build …", and so on."""
    return command_lines_of(page.read_text(encoding="utf-8"))


def command_lines_of(text: str) -> list[str]:
    shown, language = [], None  # of the fenced block we are in
    for line in text.splitlines():
        if line.startswith("```"):
            language = line[3:] if language is None else None
        elif language in ("", "sh", "bash", "console"):
            shown.append(line)
        elif language is None and line.startswith("    "):
            shown.append(line[4:])
    calls = [call.strip() for line in shown for call in line.removeprefix("$ ").split("&&")]
    return [found for call in calls if (found := ours(call))]


def ours(call: str) -> str | None:
    """The part of a line that is ours: after `uv run`, torchrun, python -m, and environment variables."""
    call = re.sub(r"^(\w+=\S* +)+", "", call)
    call = re.sub(r"^uv run (--(?:package|extra) \w+ )*", "", call)
    call = re.sub(r"^(torchrun .*?|python )-m (?=chat)", "", call)
    return call if call.split(" ")[0] in PROGRAMS else None


def parse(line: str) -> tuple[str, click.Context]:
    """("chatdata build", its parsed options). Raises click.UsageError for an invalid line."""
    program, *arguments = shlex.split(line, comments=True)
    name, command = program, import_module(f"{program}.cli").cli
    while isinstance(command, click.Group):
        part = arguments.pop(0) if arguments else ""
        if part not in command.commands:
            raise click.UsageError(f"no command {part!r}")
        name, command = f"{name} {part}", command.commands[part]
    return name, command.make_context(name, arguments)


@pytest.mark.parametrize("page", [page for page in PAGES if page.stem != "commands"], ids=lambda page: page.stem)
def test_every_command_line_is_one(page: Path) -> None:
    for line in command_lines(page):
        try:
            parse(line)
        except click.ClickException as error:
            pytest.fail(f"{page.name}: {line}: {error.format_message()}")


def test_lines_are_found_and_held_to_the_commands(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "    $ uv run --package chatdata chatdata stats out   # a comment\n\n"
        "```sh\nA=1 torchrun --nproc-per-node 8 -m chattrain run --data d --init random:d4\n```\n"
        "chatdata in a sentence\n    chatdatas run\n    pip install uv && uv run chatdata cache\n"
        "```python\nchatdata x\n```\nchatdata y\n"
    )
    training = "chattrain run --data d --init random:d4"
    assert command_lines(page) == ["chatdata stats out   # a comment", training, "chatdata cache"]
    assert parse(training)[0] == "chattrain run"
    for wrong in (
        "chatdata build --stag mid",
        "chatdata build --stage",
        "chatdata build --stage middle",
        "chatdata builds",
        "chatdata build --limit 0",
        "chatdata verify",
        "chattrain run --data d",
    ):
        with pytest.raises(click.UsageError):
            parse(wrong)


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_options_named_in_sentences_exist(page: Path) -> None:
    """`chatdata plan BUILD --seq-len T`: the command has it. `--long drop|truncate`: some command has it."""
    all_commands = {name: command for program in PROGRAMS for name, command in commands(program).items()}
    known = {option for command in all_commands.values() for option in options_of(command)}
    for code in re.findall(r"(?<!`)`([^`\n]+)`(?!`)", own_text(page)):
        named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", code))
        assert named <= known | FOREIGN, (page.name, code)
        line = ours(code)
        if line and len(line.split()) > 1:
            groups = {name.rsplit(" ", 1)[0] for name in all_commands}
            name = max((n for n in [*all_commands, *groups] if f"{line} ".startswith(f"{n} ")), key=len)
            assert name not in PROGRAMS, f"{page.name}: {code}: no such command"
            assert name in groups or named - FOREIGN <= options_of(all_commands[name]), (page.name, code)


def options_of(command: click.Command) -> set[str]:
    return {name for param in command.params for name in (*param.opts, *param.secondary_opts)} | {"--help", "--debug"}


def test_every_example_of_help_is_a_command_line() -> None:
    checked = 0
    for program in PROGRAMS:
        for name, command in commands(program).items():
            lines = (line.strip() for line in (command.epilog or "").splitlines())
            for line in filter(None, map(ours, lines)):
                assert parse(line.split(" > ")[0])[0] in commands(program), name
                checked += 1
    assert checked > 20


# --- running them ----------------------------------------------------------------------------------------------------

# appended to a line to make it quick; the last of repeated options counts
QUICK = {
    "chatdata build": "--limit 20 --force",
    "chattrain run": "--steps 1 --device-batch-size 1 --device cpu",
    "chateval run": "--limit 2 --batch-size 2 --device cpu --max-new-tokens 4",
    "chateval chat": "--device cpu",
}
ENDLESS = ("chateval serve",)  # until Ctrl-C: tests/chateval/serve runs it
# commands that each page must at least have run; test_faq.py runs docs/faq.md
RUN_ON = {
    "README": ["build", "inspect", "verify", "run"],
    "building": ["build", "verify", "cache", "diff"],
    "demo": ["build", "inspect", "stats", "verify", "diff", "report", "plan", "run", "compare", "chat"],
    "scoring": ["compare", "chat"],
    "sharing": ["build", "reproduce", "reproduce"],
    "training": ["run"],
}


@pytest.fixture
def work(demo_work: Path, tmp_path: Path, command_line: Callable, offline: None) -> Path:
    """Small demo builds, a run and scores of each, under the names that the pages use."""
    folder = shutil.copytree(demo_work, tmp_path / "work")
    (folder / "exam.jsonl").write_text(
        re.findall(r'^ +({"question": .*})$', (ROOT / "docs" / "building.md").read_text(), re.M)[0]
    )
    scored = "chateval run --checkpoint runs/mid --tasks demo_choice --limit 2 --device cpu --out scores/mid"
    assert command_line(scored, folder).returncode == 0
    for name in ("runs", "scores"):
        shutil.copytree(folder / name / "mid", folder / name / "sft")
    return folder


def can_run(context: click.Context, folder: Path) -> bool:
    """Whether all files that a line reads exist, and it needs no cluster."""
    given = context.params
    reads = [value for key, value in given.items() if isinstance(value, Path) and key not in ("out", "markdown")]
    reads += [value for key, value in given.items() if key in ("path", "data", "a", "b", "address") and value]  # builds
    reads += [*given.get("task_files", ()), *given.get("files", ()), *([given["words"]] if given.get("words") else [])]
    reads += [init for init in [given.get("init")] if init and not init.startswith("random:")]
    reads += [file.partition(":")[0] for file in given.get("against") or ()]
    reads += [recipe for recipe in [given.get("recipe")] if recipe and recipe.endswith(".toml")]
    return given.get("engine") != "ray" and all((folder / path).exists() for path in reads)


def run_page(page: Path, folder: Path, command_line: Callable) -> list[str]:
    """Run the page's commands that can run, in order, in `folder`; return their names."""
    ran = []
    for line in command_lines(page):
        name, context = parse(line)
        if name in ENDLESS or not can_run(context, folder):
            continue
        out = context.params.get("out")
        if out and name in ("chattrain run", "chateval run"):
            shutil.rmtree(folder / out, ignore_errors=True)
        result = command_line(f"{' '.join(shlex.split(line, comments=True))} {QUICK.get(name, '')}", folder)
        assert result.returncode in ((0, 1) if name == "chatdata diff" else (0,)), (line, result.stderr)
        ran.append(name)
    return ran


@pytest.mark.parametrize("stem", RUN_ON)
def test_the_commands_of_a_page_run(stem: str, work: Path, command_line: Callable) -> None:
    page = next(page for page in PAGES if page.stem == stem)
    write_files_of(page, work)
    ran = run_page(page, work, command_line)
    assert {name.split()[-1] for name in ran} >= set(RUN_ON[stem])
    if stem == "README":
        assert len(library.open_build(work / "out" / "mine")["train"]) == 1
        for code in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.S | re.M):
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(work)
                exec(code, {})


def write_files_of(page: Path, folder: Path) -> None:
    """A block that begins "```toml my.toml" is a file."""
    for name, text in re.findall(r"^```\w+ (\S+)\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S):
        (folder / name).write_text(text, encoding="utf-8")


def test_the_chinese_readme_is_the_same() -> None:
    """Commands, code, files, pictures, links and tables are the same; only the words differ."""
    english, chinese = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README.zh.md"))

    def kept(text: str) -> list[list[str]]:
        blocks = re.findall(r"^```.*?^```", text, re.M | re.S)
        lines = [line.split("#")[0].strip() for line in command_lines_of(text)]
        targets = [target for target in re.findall(r"\]\(([^)]+)\)", text) if "README" not in target]
        return [blocks, lines, targets, re.findall(r"^\|[-|]+\|$", text, re.M), re.findall(r"^#+ ", text, re.M)]

    assert kept(chinese) == kept(english)
    for number in (6, 7):  # the route and the tree
        sections = [text.split("\n## ")[number] for text in (english, chinese)]
        files, chinese_files = (re.findall(r"[\w./]+\.(?:py|md)|\w+/", section) for section in sections)
        assert files == chinese_files and len(files) > 8
    assert "out/demo-mid: build" in english and re.findall(r"build \w{12} ", chinese) == re.findall(
        r"build \w{12} ", english
    )


def test_add_a_task(work: Path, command_line: Callable) -> None:
    page = ROOT / "docs" / "add_a_task.md"
    write_files_of(page, work)
    ran = [name.split()[-1] for name in run_page(page, work, command_line)]
    assert ran == ["build", "inspect", "tasks", "build", "verify", "run", "run"]
    train = library.open_build(work / "out" / "capitals")["train"]
    assert {document.text().split("<|user_start|>")[1] for document in train} == {
        f"What is the capital of {country}?<|user_end|><|assistant_start|>{capital}<|assistant_end|>"
        for country, capital in [("France", "Paris"), ("Peru", "Lima")]
    }
    double = library.open_build(work / "out" / "double")["train"]
    assert double[0].text().count("<|python_start|>") == 1 and len(double) == 20
    items = [json.loads(line) for line in (work / "scores" / "double" / "items.jsonl").read_text().splitlines()]
    assert [item["gold"] for item in items] == ["2", "6"]
    (work / "capitals.jsonl").write_text(json.dumps({"country": "France", "capital": ""}) + "\n")
    result = command_line(f"{command_lines(page)[0]} --force", work)
    assert result.stderr == 'Error: capitals.jsonl line 1: key "capital": must not be empty\n'


# --- docs/commands.md, and the words of --help -----------------------------------------------------------------------

HEAD = """# All commands

`just commands` writes this page from `--help`, which also has examples. `--debug` shows the traceback of an error.
[faq.md](faq.md) has errors and exit codes.

Tab completes commands and options after this line in `~/.bashrc` (`zsh_source` for zsh, `fish_source` for fish;
`_CHATTRAIN_COMPLETE` and `_CHATEVAL_COMPLETE` are the same for the others):

```bash
eval "$(_CHATDATA_COMPLETE=bash_source chatdata)"
```
"""


def commands_page() -> str:
    parts = [HEAD]
    for program in PROGRAMS:
        show_default = import_module(f"{program}.cli").cli.context_settings.get("show_default")
        for name, command in commands(program).items():
            context = click.Context(command, info_name=name, show_default=show_default)
            usage = " ".join([name, *command.collect_usage_pieces(context)])
            text = inspect.cleandoc(command.help or "").split("\n\n")[0].replace("\n", " ")
            parts.append(f"\n## {name}\n\n{text}\n\n    {usage}\n\n| option | what |\n|---|---|\n")
            records = [param.get_help_record(context) for param in command.params if isinstance(param, click.Option)]
            rows = [[cell.replace("|", "\\|") for cell in record] for record in records if record]
            parts += [f"| `{option}` | {what.replace('<', '&lt;')} |\n" for option, what in rows]
    return "".join(parts)


def test_the_page_of_commands_is_up_to_date() -> None:
    page = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    assert page == commands_page(), "docs/commands.md is not what --help says: just commands"


def test_words_we_do_not_use() -> None:
    """docs/glossary.md: a row, a document, an item or a draw; never these."""
    texts = {page.name: own_text(page) for page in PAGES}
    for program in PROGRAMS:
        for name, command in commands(program).items():
            texts[name] = command.get_help(click.Context(command, info_name=name))
    for name, text in texts.items():
        assert not re.search(r"(?<!-)\b(samples?|instances?)\b", text, re.I), name  # --sample is an option


if __name__ == "__main__":
    (ROOT / "docs" / "commands.md").write_text(commands_page(), encoding="utf-8")
