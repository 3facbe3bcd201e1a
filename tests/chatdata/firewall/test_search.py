"""The firewall on planted rows: what it finds, what it cannot see, and that a report changes nothing."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from chatdata import open_build
from chatdata.build.plan import make_build_plan
from chatdata.build.run import build
from chatdata.check.rerender import verify_semantic
from chatdata.check.verify import verify_full
from chatdata.firewall.ngrams import normalise
from chatdata.firewall.search import ngram_share
from chatdata.recipe import load_recipe
from chatdata.sources.find import Locations
from chatdata.tasks import load_tasks
from chatdata.tasks.multiple_choice import multiple_choice
from chatdata.tasks.words import is_test_word
from chatdata.tokenizer.bpe import SPLIT_PATTERN, Tokenizer, append_special_tokens

TOLD = ("report.json", "firewall.json")  # of a build: what changes no byte of the rest
CHOICES = ["a copper wire", "a wool scarf", "the glass bulb", "dry sand"]
MMLU = [
    ("Which part of the lamp on the desk lets the current through most easily?", CHOICES),
    ("Which is true?", ["all cats swim at night", "some cats sleep in the sun by day", "no cat eats", "cats fly"]),
]
GSM8K = (
    "Mira bakes 24 rolls on Monday and twice as many on Tuesday. She sells 30 of them at the market, gives 6 to her "
    "neighbour and freezes the rest. How many rolls does Mira freeze?"
)
LETTERS = ("A", "B", "C", "D")


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    rows = [{"question": q, "choices": c, "answer": 0, "subject": "things"} for q, c in MMLU]
    tables = {"cais/mmlu/all": rows, "openai/gsm8k/main": [{"question": GSM8K, "answer": "24*3=72 #### 36"}]}
    for folder, table in tables.items():
        (tmp_path / "hub" / folder).mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(table), tmp_path / "hub" / folder / "test-00000-of-00001.parquet")
    return tmp_path / "hub"


@pytest.fixture
def run(tmp_path: Path, data_dir: Path, byte_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> Any:
    """run(conversations, name, decontaminate, more): (build's folder, firewall file's content)."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "no-hub"))

    def run(conversations: list[Any], name: str, decontaminate: str = "report", more: str = "") -> tuple[Path, Any]:
        (tmp_path / "chats.jsonl").write_text("".join(json.dumps(c) + "\n" for c in conversations))
        recipe = tmp_path / "planted.toml"
        recipe.write_text(f'stage = "mid"\n[[train]]\ntask = "conversations"\npath = "chats.jsonl"\n{more}')
        tasks = load_tasks()
        plan = make_build_plan(load_recipe(str(recipe), tasks), tasks, byte_tokenizer, Locations(tmp_path, data_dir))
        build(plan, tmp_path / name, decontaminate=decontaminate)
        path = tmp_path / name / "firewall.json"
        return tmp_path / name, json.loads(path.read_text()) if path.exists() else None

    return run


def chat(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate([*texts, "Well."])]


def asked(number: int, choices: list[str] | None = None, question: str | None = None) -> list[dict[str, str]]:
    question = question or MMLU[number][0]
    return multiple_choice(question, choices or MMLU[number][1], LETTERS, "A")["messages"]


PLANTED = {
    "as it is": (asked(0), "exact"),
    "short, as it is": (asked(1), "exact"),
    "choices in another order": (asked(0, CHOICES[::-1]), "exact"),
    "short, another order": (asked(1, MMLU[1][1][::-1]), "exact"),
    "case and white space": (chat(asked(0)[0]["content"].upper().replace(" ", "  \n")), "exact"),
    "punctuation": (chat(f"{MMLU[0][0].replace(' ', ', ')} -- {'; '.join(CHOICES)}!"), "exact"),
    "in a longer chat": (chat("Hi!", "Hello.", f"Help me: {GSM8K} Thanks!", "72 - 36"), "exact"),
    "question without choices": (chat(f"Tell me: {MMLU[0][0]}"), "n-gram"),
    "a word changed": (chat(GSM8K.replace("neighbour", "uncle")), "n-gram"),
    "told anew": (
        chat("Of 24 rolls and then double that, 30 are sold and 6 given away; how many does she freeze?"),
        "",
    ),
    "other choices, short": (asked(1, ["all dogs swim", "some dogs sleep in the sun by day", "no", "yes"]), ""),
    "only its choices": (asked(0, question="Which of these would you put into a box?"), ""),
    "something else": (chat("Which lamp should I buy for my desk?"), ""),
}


def test_what_is_found_and_what_is_not(run) -> None:
    _, listed = run([chat for chat, _ in PLANTED.values()], "planted")
    methods = {row["row"]: row["method"] for item in listed["items"] for row in item["rows"]}
    assert {name: methods.get(i, "") for i, name in enumerate(PLANTED)} == {n: m for n, (_, m) in PLANTED.items()}
    assert [(item["set"], item["item"]) for item in listed["items"]] == [
        ("gsm8k", "gsm8k main test row 0"),
        ("mmlu", "mmlu all test row 0"),
        ("mmlu", "mmlu all test row 1"),
    ]
    first = listed["items"][0]["rows"][0]
    assert first == {
        "task": "conversations",
        "source": "chats.jsonl",
        "file": "chats.jsonl",
        "row": 6,
        "source_row": 6,
        "method": "exact",
        "share": 1.0,
    }
    assert listed["not_checked"]["humaneval"] == "dataset not found locally" and set(listed["checked"]) == {
        "gsm8k",
        "mmlu",
    }


def test_report_changes_no_byte_and_drop_counts_what_it_removes(run) -> None:
    chats = [chat for chat, _ in PLANTED.values()]
    (off, nothing), (report, listed), (drop, _) = (run(chats, mode, mode) for mode in ("off", "report", "drop"))
    assert nothing is None and listed["build_id"] == open_build(report).manifest["build_id"]
    files = [path.relative_to(off) for path in sorted(off.rglob("*")) if path.is_file() and path.name not in TOLD]
    assert all((off / name).read_bytes() == (report / name).read_bytes() for name in files)
    manifest = open_build(drop).manifest
    assert manifest["recipe"]["decontaminate"] == "drop" and "decontaminate" not in open_build(off).manifest["recipe"]
    (entry,) = manifest["splits"]["train"]["entries"]
    assert (entry["rows"], entry["documents"], entry["dropped"]["contaminated"]) == (len(PLANTED), 4, 9)
    clean = {i for i, (_, method) in enumerate(PLANTED.values()) if not method}
    assert set(open_build(drop)["train"].index["row"].to_list()) == clean
    assert verify_full(drop) == []
    again = str(drop.with_name("planted.toml"))
    assert verify_semantic(drop, Locations(drop.parent), load_tasks(), recipe=again) == []


def test_rows_about_scored_words(run, tmp_path) -> None:
    (tmp_path / "words.txt").write_text("".join(f"{a}{b}\n" for a in "bcdfghklmn" for b in ("anana", "ow", "ill")))
    spelling = "".join(
        f'[[train]]\ntask = "{task}"\nrows = 60\nwords = "words.txt"\nholdout = HOLDOUT\n'
        for task in ("simple_spelling", "spelling_bee")
    )
    _, held = run([chat("Hi")], "held", more=spelling.replace("HOLDOUT", "true"))
    assert held["items"] == [] and {"simple_spelling", "spelling_bee"} <= set(held["checked"])
    out, open_ = run([chat("Hi")], "open", more=spelling.replace("HOLDOUT", "false"))
    found = {(row["task"], row["row"]) for item in open_["items"] for row in item["rows"]}
    train = open_build(out)["train"]
    for doc, (task, row) in enumerate(train.index.select("task", "row").rows()):
        if task != "conversations":
            word = train[doc].text().split("<|assistant_start|>")[1].partition(":")[0]
            assert ((task, row) in found) == is_test_word(word), word  # all test words are scored: 256 rows of few
    assert {task for task, _ in found} == {"simple_spelling", "spelling_bee"}


def test_documents_count_as_they_are_cut(run, tmp_path, byte_tokenizer) -> None:
    """What a recipe cuts away is not trained on."""
    long = chat("x " * 200 + GSM8K)
    _, whole = run([long], "whole")
    assert len(whole["items"]) == 1
    recipe = tmp_path / "planted.toml"
    tasks = load_tasks()
    recipe.write_text('max_tokens = 300\noverflow = "truncate"\n' + recipe.read_text())
    ranks = {bytes([byte]): byte for byte in range(256)}
    tokenizer = Tokenizer(ranks, SPLIT_PATTERN, append_special_tokens(ranks), "bytes")
    build(
        make_build_plan(load_recipe(str(recipe), tasks), tasks, tokenizer, Locations(tmp_path, tmp_path / "hub")),
        tmp_path / "cut",
    )
    assert json.loads((tmp_path / "cut" / "firewall.json").read_text())["items"] == []


def test_share_of_a_question() -> None:
    question = " ".join(str(number) for number in range(20))  # 13 n-grams of 8
    assert ngram_share(f" {question} ", question) == 1
    assert ngram_share(f" {question.replace(' 10 ', ' ten ')} ", question) == pytest.approx(5 / 13)
    assert ngram_share(f" {question} ", "1 2 3 4 5 6 7 8 9 10 11 12") == 0, "under 13 words"


CHANGES = {
    "exact": lambda draw, q, c: (q, c),
    "case and white space": lambda draw, q, c: (q.upper().replace(" ", "\n "), c),
    "choices reordered": lambda draw, q, c: (q, draw.sample(c, len(c))),
    "punctuation": lambda draw, q, c: (q.replace(" ", ", ").rstrip("?.") + " …", c),
    "one word in 20 changed": lambda draw, q, c: (edited(draw, q, 20), c),
    "one word in 10 changed": lambda draw, q, c: (edited(draw, q, 10), c),
    "words in another order": lambda draw, q, c: (" ".join(draw.sample(q.split(), len(q.split()))), c),
}


def edited(draw: random.Random, text: str, every: int) -> str:
    return " ".join("zzz" if draw.random() < 1 / every else word for word in text.split())


def test_precision_and_recall_on_planted_questions(shared: Path, run, data_dir: Path) -> None:
    """100 MMLU questions for each change, among 300 MMLU validation questions nobody planted."""
    folder = shared / "data" / "hub" / "cais" / "mmlu" / "all"
    rows = pq.read_table(folder / "test-00000-of-00001.parquet").to_pylist()
    others = pq.read_table(folder / "validation-00000-of-00001.parquet").slice(0, 300).to_pylist()
    draw = random.Random(0)
    chosen = draw.sample(range(len(rows)), 100 * len(CHANGES))
    pq.write_table(pa.Table.from_pylist(rows), data_dir / "cais" / "mmlu" / "all" / "test-00000-of-00001.parquet")
    chats, truth = [], []
    for i, number in enumerate(chosen):
        change = list(CHANGES)[i // 100]
        question, choices = CHANGES[change](draw, rows[number]["question"], rows[number]["choices"])
        chats.append(multiple_choice(question, choices, LETTERS, "A")["messages"])
        truth.append((change, f"mmlu all test row {number}"))
    chats += [multiple_choice(row["question"], row["choices"], LETTERS, "A")["messages"] for row in others]
    _, listed = run(chats, "planted")
    pairs = {(r["row"], i["item"]): r["method"] for i in listed["items"] for r in i["rows"] if i["set"] == "mmlu"}
    recall = Counter(change for i, (change, item) in enumerate(truth) if (i, item) in pairs)
    # 20 of these validation questions are test questions word for word, which nobody planted: not wrong
    same = {key for key, method in pairs.items() if key[0] >= len(chosen) and method == "exact"}
    for row, item in same:
        one, other = others[row - len(chosen)], rows[int(item.split()[-1])]
        assert normalise(one["question"]) == normalise(other["question"])
        assert sorted(map(normalise, one["choices"])) == sorted(map(normalise, other["choices"]))
    alike = {row for row, item in pairs if row >= len(chosen) and (row, item) not in same}
    print(dict(recall), f"others: {len(same)} the same, {len(alike)} alike, of {len(others)}")
    for change in ("exact", "case and white space", "choices reordered", "punctuation"):
        assert recall[change] >= 99, change
    assert recall["one word in 20 changed"] >= 40 and recall["words in another order"] <= 5
    assert len(same) >= 15 and len(alike) <= 6


def test_a_task_of_ones_own_is_checked_too(tmp_path: Path, byte_tokenizer: Tokenizer) -> None:
    """Its rows may be in any accepted form of conversation, here a bare list of messages."""
    path = tmp_path / "my_task.py"
    path.write_text(
        "from chatdata.grading import grade_number\n"
        "from chatdata.tasks import ScoredSet, Scoring, Task\n"
        "def to_conversation(row):\n"
        "    roles = ('user', 'assistant')\n"
        "    texts = (f'Count from {row} to {row + 9} and say how many numbers that is, please, right now.', '10')\n"
        "    return [{'role': role, 'content': text} for role, text in zip(roles, texts)]\n"
        "TASK = Task('mine', 'counts', 'MIT', to_conversation, generate=lambda split, options: lambda i: i % 4,\n"
        "            splits={'': {'train': 0, 'test': 0}},\n"
        "            scoring=Scoring({'mine': ScoredSet(rows=2)}, grade=lambda row, text: grade_number(text, '10')))\n"
    )
    (tmp_path / "own.toml").write_text('stage = "mid"\n[[train]]\ntask = "mine"\nrows = 5\n')
    tasks = load_tasks((path,))
    plan = make_build_plan(load_recipe(str(tmp_path / "own.toml"), tasks), tasks, byte_tokenizer, Locations(tmp_path))
    build(plan, tmp_path / "own")
    found = json.loads((tmp_path / "own" / "firewall.json").read_text())
    rows = {item["item"]: [row["row"] for row in item["rows"]] for item in found["items"]}
    assert rows == {"mine test row 0": [0, 4], "mine test row 1": [1]}
