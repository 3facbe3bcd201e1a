"""`chateval run` from end to end on random weights: continued after kill -9, refused for other weights, graded."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import chateval.ask.answers
from chatdata.errors import MissingSource
from chatdata.tasks import load_tasks
from chateval.ask.answers import Draw, answer_programs
from chateval.ask.generate import Completion, Sampling
from chateval.ask.questions import load_questions
from chateval.errors import UsageError

TASKS = "demo_choice,demo_math,simple_spelling,spelling_bee"


@pytest.fixture(scope="module")
def checkpoint(save_random, tmp_path_factory):
    return save_random(tmp_path_factory.mktemp("run") / "checkpoints").parent.parent


@pytest.fixture
def arguments(checkpoint, words):
    common = ["--checkpoint", checkpoint, "--tasks", TASKS, "--words", words]
    return ["run", *common, "--limit", 40, "--batch-size", 8, "--max-new-tokens", 40]


def lines_of(out):
    return [json.loads(line) for line in (out / "items.jsonl").read_text().splitlines()]


def test_a_run_and_what_it_leaves(chateval, arguments, tmp_path) -> None:
    out = tmp_path / "scores"
    result = chateval(*arguments, "--out", out, "--json")
    assert result.returncode == 0, result.stderr
    assert "demo_math: 40 of 40 answers" in result.stderr
    figures = json.loads(result.stdout)
    assert figures == json.loads((out / "results.json").read_text())
    lines = lines_of(out)
    assert [line["task"] for line in lines] == [name for name in TASKS.split(",") for _ in range(40)]
    for name in TASKS.split(","):
        mine = [line for line in lines if line["task"] == name]
        assert figures["tasks"][name]["correct"] == sum(line["correct"] for line in mine)
        assert figures["tasks"][name]["bits_per_byte"] > 1, "random weights know nothing"
    assert figures["chat_core"] is None and "mmlu" in figures["chat_core_missing"]
    assert {"report.md", "scores.png", "run.json"} <= {path.name for path in out.iterdir()}
    settings = json.loads((out / "run.json").read_text())["settings"]
    assert list(settings) == ["temperature", "top_k", "max_new_tokens", "seed", "dtype"]
    again = chateval(*arguments, "--out", out)
    assert again.returncode == 0 and "demo_math" in again.stdout
    assert lines_of(out) == lines


@pytest.fixture(scope="session")
def written_paths():
    """The paths this process opens for writing, makes, renames, cuts or removes, as the interpreter reports them."""
    paths, writes = [], os.O_WRONLY | os.O_RDWR | os.O_CREAT

    def watch(event, arguments):
        if event == "open" and arguments[2] & writes:
            paths.append(str(arguments[0]))
        elif event in ("os.mkdir", "os.rename", "os.truncate", "os.remove"):
            paths.extend(str(path) for path in arguments[:2])

    sys.addaudithook(watch)  # for good: there is no way to remove one
    return paths


def test_a_finished_folder_is_only_read(arguments, chateval, written_paths, tmp_path) -> None:
    """It may be on a disk that cannot be written to. What is missing of it is still made."""
    out = tmp_path / "scores"

    def run_again():
        written_paths.clear()
        result = chateval(*arguments, "--out", out)
        assert result.returncode == 0, result.stderr
        return result.stdout, {Path(path).name for path in written_paths if path.startswith(str(out))}

    first, written = run_again()
    assert {"items.jsonl", "report.md", "scores.png"} <= written
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert run_again() == (first, set())
    for name in ("report.md", "scores.png", "results.json"):
        (out / name).unlink()
        assert name in run_again()[1]
    lines = before["items.jsonl"].splitlines(keepends=True)
    (out / "items.jsonl").write_bytes(b"".join(lines[::-1]))  # all there, but killed before they were put in order
    assert "items.jsonl" in run_again()[1]
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_kill_9_in_the_middle(arguments, chateval, tmp_path) -> None:
    """Killed twice, then left alone: only what is missing is answered, and the files are those of a run left alone."""
    alone, killed = tmp_path / "alone", tmp_path / "killed"
    assert chateval(*arguments, "--out", alone).returncode == 0
    kept = 0
    for wanted in (25, 70):
        process = subprocess.Popen(
            [sys.executable, "-m", "chateval", *map(str, arguments), "--out", str(killed)],
            stderr=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            if (killed / "items.jsonl").is_file() and (killed / "items.jsonl").read_bytes().count(b"\n") >= wanted:
                break
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "it was done before it was killed"
        before = (killed / "items.jsonl").read_bytes()
        assert kept < before.count(b"\n") < 160
        kept = before.count(b"\n")
    assert chateval(*arguments, "--out", killed).returncode == 0
    assert (killed / "items.jsonl").read_bytes() == (alone / "items.jsonl").read_bytes()
    assert (killed / "results.json").read_bytes() == (alone / "results.json").read_bytes()


def test_only_what_is_missing_is_answered(arguments, chateval, tmp_path) -> None:
    """Lines that are there are kept as they are, even where the model would now say something else."""
    out = tmp_path / "scores"
    assert chateval(*arguments, "--out", out).returncode == 0
    lines = (out / "items.jsonl").read_text().splitlines()
    changed = json.loads(lines[50]) | {"output": "kept"}
    (out / "items.jsonl").write_text("\n".join([*lines[:50], json.dumps(changed), *lines[60:]]) + "\n" + lines[55][:30])
    assert chateval(*arguments, "--out", out).returncode == 0
    after = (out / "items.jsonl").read_text().splitlines()
    assert json.loads(after[50])["output"] == "kept"
    assert after[:50] + after[51:] == lines[:50] + lines[51:]


def test_lines_of_a_killed_rank_are_continued_by_one(arguments, chateval, tmp_path) -> None:
    """Two ranks were killed, the second in the middle of a line: one process finishes, to the same file."""
    out, torn = tmp_path / "scores", tmp_path / "torn"
    assert chateval(*arguments, "--out", out).returncode == 0
    lines = (out / "items.jsonl").read_text().splitlines(keepends=True)
    torn.mkdir()
    (torn / "run.json").write_bytes((out / "run.json").read_bytes())
    (torn / "items.jsonl").write_text("".join(lines[0:60:2]))
    (torn / "items-00001.jsonl").write_text("".join(lines[1:50:2]) + lines[51][:70])
    result = chateval(*arguments, "--out", torn)
    assert result.returncode == 0, result.stderr
    assert sorted(path.name for path in torn.glob("items*")) == ["items.jsonl"]
    assert (torn / "items.jsonl").read_bytes() == (out / "items.jsonl").read_bytes()


def test_items_of_unknown_weights_are_refused(arguments, chateval, tmp_path) -> None:
    out = tmp_path / "scores"
    assert chateval(*arguments, "--out", out).returncode == 0
    (out / "run.json").unlink()
    result = chateval(*arguments, "--out", out)
    assert (result.returncode, result.stderr.count("\n")) == (1, 1) and "unknown weights" in result.stderr
    assert not (out / "run.json").exists()


def test_other_weights_are_not_scored_from_old_lines(arguments, chateval, save_random, tmp_path) -> None:
    out = tmp_path / "scores"
    assert chateval(*arguments, "--out", out).returncode == 0
    other = save_random(tmp_path / "checkpoints", seed=1)
    before = (out / "items.jsonl").read_bytes()
    result = chateval(*arguments, "--out", out, "--checkpoint", other)
    assert result.returncode == 1 and result.stderr.count("\n") == 1
    assert "weights" in result.stderr and "--out" in result.stderr
    assert (out / "items.jsonl").read_bytes() == before
    result = chateval(*arguments, "--out", out, "--max-new-tokens", 41)
    assert result.returncode == 1 and "max_new_tokens" in result.stderr


def test_draws(chateval, checkpoint, words, tmp_path) -> None:
    common = ["run", "--checkpoint", checkpoint, "--tasks", "simple_spelling", "--words", words, "--limit", 10]
    result = chateval(*common, "--draws", 3, "--temperature", 1, "--max-new-tokens", 8, "--out", tmp_path / "s")
    assert result.returncode == 0, result.stderr
    lines = lines_of(tmp_path / "s")
    assert [line["draw"] for line in lines] == [0, 1, 2] * 10
    assert len({line["output"] for line in lines}) > 20
    result = chateval(*common, "--draws", 3, "--out", tmp_path / "t")
    assert result.returncode == 2 and "--temperature" in result.stderr


def test_compare_two_runs(arguments, chateval, save_random, tmp_path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    assert chateval(*arguments, "--out", a).returncode == 0
    other = save_random(tmp_path / "checkpoints", seed=1)
    assert chateval(*arguments, "--out", b, "--checkpoint", other).returncode == 0
    result = chateval("compare", a, b, "--json", "--markdown", tmp_path / "compare.md")
    assert result.returncode == 0, result.stderr
    tasks = json.loads(result.stdout)["tasks"]
    assert set(tasks) == set(TASKS.split(",")) and all(task["items"] == 40 for task in tasks.values())
    right_a, right_b = (sum(x["correct"] for x in lines_of(out) if x["task"] == "demo_choice") for out in (a, b))
    choice = tasks["demo_choice"]
    assert choice["turned_right"] - choice["turned_wrong"] == right_b - right_a
    assert (tmp_path / "compare.md").read_text().startswith("# Comparison")
    assert "demo_choice" in chateval("compare", a, b).stdout


@pytest.mark.parametrize(
    ("extra", "code", "said"),
    [
        (["--tasks", "mmul"], 2, 'no scored task "mmul"; did you mean "mmlu"?'),
        (["--tasks", "humaneval"], 2, "--allow-code"),
        (["--tasks", "mmlu,gsm8k", "--data-dir", "nowhere"], 1, "sources missing: "),
        (["--tasks", "spelling_bee", "--words", "none.txt"], 1, "none.txt: no such file; pass --words FILE"),
        (["--checkpoint", "nowhere"], 1, "nowhere: no such checkpoint or run folder"),
    ],
)
def test_errors_are_one_line(arguments, chateval, monkeypatch, tmp_path, extra, code, said) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    result = chateval(*arguments, "--out", tmp_path / "s", *extra)
    assert (result.returncode, result.stderr.count("\n")) == (code, 1), result.stderr
    assert said in result.stderr
    assert not (tmp_path / "s").exists()


def test_what_cannot_be_written_is_named(arguments, chateval, tmp_path) -> None:
    taken, out = tmp_path / "taken", tmp_path / "scores"
    taken.touch()
    result = chateval(*arguments, "--out", taken)
    assert (result.returncode, result.stderr) == (1, f"Error: {taken}: file exists; choose another path\n")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # a disk that is full in the middle of a line
    try:
        result = chateval(*arguments, "--out", out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    limit = "raise the limit on the size of files (ulimit -f)"
    last = result.stderr.splitlines()[-1]
    assert (result.returncode, last) == (1, f"Error: {out}/items.jsonl: file too large; {limit}")
    assert (out / "items.jsonl").stat().st_size == 20_000
    assert chateval(*arguments, "--out", out).returncode == 0
    for path, said in [
        ("nowhere/x.md", "no such file or directory; check the path: its folder must be there"),
        ("/dev/full", "no space left on device; free some space, then call again"),
    ]:
        result = chateval("compare", out, out, "--markdown", path)
        assert (result.returncode, result.stderr) == (1, f"Error: {path}: {said}\n")


def test_questions_are_those_of_the_task(shared, tokenizer, words) -> None:
    data_dir = shared / "data" / "hub"
    arc, bee = load_questions(["arc_challenge", "spelling_bee"], load_tasks(), tokenizer, data_dir, str(words), 30)
    assert len(arc.questions) == len(bee.questions) == 30
    assert (arc.kind, arc.chance, bee.kind) == ("categorical", 0.25, "generative")
    labels = {tuple(arc.task.scoring.letters(question.row)) for question in arc.questions}
    assert ("A", "B", "C", "D") in labels
    assert all(question.gold in arc.task.scoring.letters(question.row) for question in arc.questions)
    assert arc.questions[0].item == "arc ARC-Challenge test row " + arc.questions[0].item.split()[-1]
    assert [question.item for question in arc.questions] != sorted(question.item for question in arc.questions)
    from chatdata.tasks.words import is_test_word

    assert all(is_test_word(question.row["word"]) for question in bee.questions)
    with pytest.raises(UsageError, match="no scored task"):
        load_questions(["identity"], load_tasks(), tokenizer)
    with pytest.raises(MissingSource, match=r"arc ARC-Easy test: .*gsm8k main test: "):
        load_questions(["arc_easy", "gsm8k"], load_tasks(), tokenizer, shared / "nowhere")


def test_a_task_file_of_your_own(chateval, checkpoint, tmp_path) -> None:
    """The one of docs/add_a_task.md."""
    page = (Path(__file__).parents[3] / "docs" / "add_a_task.md").read_text()
    (tmp_path / "double.py").write_text(re.findall(r"```python double.py\n(.*?)```", page, re.S)[0])
    command = "run --checkpoint runs/double --tasks double --task-file double.py"
    assert f"    chateval {command} --out scores/double\n" in page
    arguments = (
        command.replace("runs/double", str(checkpoint)).replace("double.py", str(tmp_path / "double.py")).split()
    )
    result = chateval(*arguments, "--max-new-tokens", 8, "--out", tmp_path / "s")
    assert result.returncode == 0, result.stderr
    assert [line["gold"] for line in lines_of(tmp_path / "s")][:3] == ["2", "6", "10"]


def test_chat_shows_what_is_said(chateval, checkpoint) -> None:
    common = ["chat", "--checkpoint", checkpoint, "--max-new-tokens", 12, "--temperature", 0]
    result = chateval(*common, "--say", "Hello!", "--say", "/clear", "--say", "Hello!")
    assert result.returncode == 0, result.stderr
    first, second = result.stdout.split("– a new conversation –")
    assert "you Hello!" in first and "[cut at 12 tokens: --max-new-tokens]" in first
    assert first.split("you Hello!\n")[1].split("\n")[0] == second.split("you Hello!\n")[1].split("\n")[0]
    typed = chateval(*common, typed="Hello!\n\n/quit\nnever read\n")
    assert typed.returncode == 0 and first.split("you Hello!\n")[1].split("\n")[0] in typed.stdout


def test_an_interrupted_chat_has_nothing_to_continue(arguments, chateval, checkpoint, monkeypatch) -> None:
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("chateval.chat.converse", interrupt)
    result = chateval("chat", "--checkpoint", checkpoint)
    assert (result.returncode, result.stderr) == (130, "\nError: interrupted\n")
    monkeypatch.setattr("chateval.ask.run.score", interrupt)
    said = "\nError: interrupted; the same command continues where it stopped\n"
    assert (chateval(*arguments).returncode, chateval(*arguments).stderr) == (130, said)


def test_the_tasks_are_listed(chateval) -> None:
    listed = json.loads(chateval("tasks", "--json").stdout)
    assert {"name": "mmlu", "kind": "letters", "chance": 0.25, "rows": 14042} in [
        {key: entry[key] for key in ("name", "kind", "chance", "rows")} for entry in listed
    ]


def test_programs_are_run_and_graded(shared, random_subject, isolation, monkeypatch) -> None:
    """The canonical solutions of 4 HumanEval rows pass, as bare code and fenced; an empty body does not."""
    (task,) = load_questions(["humaneval"], load_tasks(), random_subject.tokenizer, shared / "data" / "hub", limit=4)
    draws = [Draw(question, 0) for question in task.questions]

    def answer_with(text_of_row):
        def generate(subject, prompts):
            for number, draw in enumerate(draws):
                tokens = tuple(subject.tokenizer.encode_ordinary(text_of_row(draw.question.row)))
                yield number, Completion(tokens, (False,) * len(tokens), "assistant_end", 0, 0)

        monkeypatch.setattr(chateval.ask.answers, "generate", generate)
        return list(answer_programs(random_subject, task.task, draws, Sampling(), isolation))

    whole = answer_with(lambda row: row["prompt"] + row["canonical_solution"])
    fenced = answer_with(lambda row: f"Here:\n```python\n{row['prompt']}{row['canonical_solution']}\n```\nDone.")
    empty = answer_with(lambda row: row["prompt"] + "    return None\n")
    assert [line["correct"] for line in whole + fenced] == [True] * 8
    assert [line["ending"] for line in whole + fenced] == ["passed"] * 8
    assert [(line["correct"], line["ending"]) for line in empty] == [(False, "failed")] * 4


def test_humaneval_from_the_command_line(shared, checkpoint, chateval, isolation, tmp_path) -> None:
    common = ["run", "--checkpoint", checkpoint, "--tasks", "humaneval", "--data-dir", shared / "data" / "hub"]
    result = chateval(*common, "--limit", 3, "--max-new-tokens", 8, "--allow-code", "--out", tmp_path / "s", "--json")
    assert result.returncode == 0, result.stderr
    task = json.loads(result.stdout)["tasks"]["humaneval"]
    assert (task["items"], task["correct"], task["scoring"]) == (3, 0, "code")
