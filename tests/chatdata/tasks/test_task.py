from __future__ import annotations

import hashlib
import re
from pathlib import Path

import pytest

from chatdata.conversation import parse_conversation
from chatdata.errors import SourceError, TaskError
from chatdata.tasks import (
    Task,
    arc,
    demo_choice,
    demo_math,
    gsm8k,
    humaneval,
    load_tasks,
    mmlu,
    simple_spelling,
    spelling_bee,
    text,
)
from chatdata.tasks.words import is_test_word, read_words

WORDS = ["apple", "banana", "cherry", "strawberry", "kiwi"]


@pytest.fixture
def word_file(tmp_path: Path) -> Path:
    path = tmp_path / "words.txt"
    path.write_bytes("\r\n".join(WORDS).encode() + b"\r\n")
    return path


def options(word_file: Path, holdout: bool = False) -> dict:
    return {"words": word_file, "holdout": holdout, "phrasings": spelling_bee.PHRASINGS}


def test_gsm8k_answer_becomes_tool_parts() -> None:
    row = {"question": "q", "answer": "It is 12/60 = $<<12/60=0.2>>0.2.\nA <<1+1>>2 <<x==y=3>>\n#### 2"}
    assert gsm8k.to_conversation(row)["messages"][1]["content"] == [
        {"type": "text", "text": "It is 12/60 = $"},
        {"type": "python", "text": "12/60"},
        {"type": "python_output", "text": "0.2"},
        {"type": "text", "text": "0.2.\nA "},
        {"type": "python", "text": "1+1"},
        {"type": "python_output", "text": ""},
        {"type": "text", "text": "2 "},
        {"type": "python", "text": "x==y"},
        {"type": "python_output", "text": "3"},
        {"type": "text", "text": "\n#### 2"},
    ]
    assert gsm8k.answer_parts("<<1=1>><<2=2>>") == [
        {"type": "text", "text": ""},
        {"type": "python", "text": "1"},
        {"type": "python_output", "text": "1"},
        {"type": "text", "text": ""},
        {"type": "python", "text": "2"},
        {"type": "python_output", "text": "2"},
        {"type": "text", "text": ""},
    ]


def test_mmlu_prompt_and_wrapped_row() -> None:
    row = {"question": "2+2?", "subject": "", "choices": ["1", "4", "3", "5"], "answer": 1}
    expected = {
        "messages": [
            {
                "role": "user",
                "content": "Multiple Choice question: 2+2?\n- 1=A\n- 4=B\n- 3=C\n- 5=D\n\n"
                "Respond only with the letter of the correct answer.",
            },
            {"role": "assistant", "content": "B"},
        ]
    }
    assert mmlu.to_conversation(row) == expected
    assert mmlu.to_conversation({"train": row}) == expected
    with pytest.raises(TaskError, match=r'^key "answer": 4 is outside its choices 0 … 3$'):
        mmlu.to_conversation({**row, "answer": 4})
    with pytest.raises(TaskError, match="3 choices; MMLU has 4"):
        mmlu.to_conversation({**row, "choices": ["a", "b", "c"]})


def test_arc_keeps_the_rows_labels() -> None:
    row = {"question": "q", "choices": {"text": ["x", "y", "z"], "label": ["1", "2", "3"]}, "answerKey": "3"}
    user, assistant = arc.to_conversation(row)["messages"]
    assert user["content"].split("\n")[1:4] == ["- x=1", "- y=2", "- z=3"]
    assert assistant["content"] == "3"
    with pytest.raises(TaskError, match="key \"answer\": 'D' is not one of its choices 1, 2, 3"):
        arc.to_conversation({**row, "answerKey": "D"})


def test_humaneval_solution() -> None:
    row = {"prompt": "def f():\n", "canonical_solution": "    return 1\n"}
    assert humaneval.to_conversation(row)["messages"][1]["content"] == "def f():\n\n    return 1\n"
    assert humaneval.TASK.scored_only


def test_simple_spelling_draws(word_file: Path) -> None:
    row = simple_spelling.generate("train", options(word_file))
    assert [row(i) for i in range(4)] == ["kiwi", "banana", "strawberry", "banana"]
    messages = simple_spelling.to_conversation("apple")["messages"]
    assert [m["content"] for m in messages] == ["Spell the word: apple", "apple:a,p,p,l,e"]


def test_spelling_bee_draws(word_file: Path) -> None:
    row = spelling_bee.generate("train", options(word_file))
    drawn = [(row(i)["word"], row(i)["letter"]) for i in range(4)]
    assert drawn == [("strawberry", "e"), ("banana", "b"), ("apple", "p"), ("banana", "a")]
    test_row = spelling_bee.generate("test", options(word_file))(0)
    assert (test_row["word"], test_row["letter"]) == ("cherry", "e")


def test_spelling_bee_answer() -> None:
    row = {"word": "banana", "letter": "a", "question": "How many a in banana?"}
    user, assistant = spelling_bee.to_conversation(row)["messages"]
    assert user["content"] == "How many a in banana?"
    text_before, python, output, text_after = assistant["content"]
    assert text_before["text"].startswith("banana:b,a,n,a,n,a\nCounting a:\n1. b\n2. a → 1\n3. n\n4. a → 2\n")
    assert python == {"type": "python", "text": "'banana'.count('a')"}
    assert output == {"type": "python_output", "text": "3"}
    assert text_after["text"].endswith("\n#### 3")
    assert not re.search("text,text", ",".join(part["type"] for part in assistant["content"]))


def test_holdout_keeps_test_words_out_of_training(shared: Path) -> None:
    words = shared / "data" / "words_alpha.txt"
    assert len(read_words(words)) == 370_099
    for module in (simple_spelling, spelling_bee):
        drawn = {}
        for split in ("train", "test"):
            row = module.generate(split, options(words, holdout=True))
            drawn[split] = {value if isinstance(value := row(i), str) else value["word"] for i in range(3000)}
            assert all(is_test_word(word) == (split == "test") for word in drawn[split])
        assert not drawn["train"] & drawn["test"]
    # the rule of DESIGN 5, spelled out
    digest = hashlib.blake2b(b"apple", digest_size=8).digest()
    assert is_test_word("apple") == (int.from_bytes(digest, "little") % 10 == 0)
    assert 0.098 < sum(map(is_test_word, read_words(words))) / 370_099 < 0.102


def test_word_list_errors(tmp_path: Path) -> None:
    path = tmp_path / "w.txt"
    path.write_text("a\n\nb\n")
    with pytest.raises(SourceError, match=r"^w.txt line 2: an empty line in the word list$"):
        read_words(path)
    path.write_text("")
    with pytest.raises(SourceError, match=r"^w.txt: the word list is empty$"):
        read_words(path)


def test_phrasings() -> None:
    phrasings = spelling_bee.read_phrasings(spelling_bee.PHRASINGS)
    assert len(phrasings) == len(set(phrasings)) >= 40
    assert any(not phrasing.isascii() for phrasing in phrasings)


def test_demo_math_is_right_and_split_by_numbers() -> None:
    for split in ("train", "test"):
        row = demo_math.generate(split, {})
        for i in range(2000):
            answer = row(i)["answer"]
            calls = re.findall(r"<<(.+?)=(-?\d+)>>", answer)
            assert calls and all(re.fullmatch(r"\d+[-+*]\d+", call) for call, _ in calls)
            for call, result in calls:
                left, operator, right = re.fullmatch(r"(\d+)([-+*])(\d+)", call).groups()
                value = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}[operator](int(left), int(right))
                assert value == int(result) >= 0
            assert answer.endswith(f"#### {calls[-1][1]}")
            a, b = re.match(r"(\d+)[-+*](\d+)", calls[0][0]).groups()
            assert demo_math.is_test_pair(int(a), int(b)) == (split == "test")


def test_demo_choice_answers() -> None:
    row = demo_choice.generate("train", {})(5)
    assert sorted(row) == ["answer", "choices", "question"] and len(set(row["choices"])) == 4
    parse_conversation(demo_choice.TASK.to_conversation(row))


def test_text_task_needs_text() -> None:
    assert text.TASK.to_conversation({"text": "x"}) == "x"
    with pytest.raises(TaskError, match='key "text"'):
        text.TASK.to_conversation({"content": "x"})


def test_every_task_documents_a_row() -> None:
    for name, task in load_tasks().items():
        module = __import__(f"chatdata.tasks.{name}", fromlist=["TASK"])
        assert re.search(r"(row|line|lines).*:", module.__doc__) or "row is" in module.__doc__, name
        assert task.summary and task.licence


def test_task_files(tmp_path: Path) -> None:
    path = tmp_path / "my_task.py"
    path.write_text(
        "from chatdata.tasks import Task\n"
        "TASK = Task('mine', 'my own', 'MIT', lambda row: [{'role': 'user', 'content': row}],\n"
        "            generate=lambda split, options: lambda i: f'number {i}', splits={'': {'train': 0}})\n"
    )
    task = load_tasks((path,))["mine"]
    assert isinstance(task, Task) and task.code_sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    for source, message in [
        ("TASK = 5", "defines no TASK = chatdata.tasks.Task"),
        ("1/0", "cannot be imported: ZeroDivisionError: division by zero"),
        (path.read_text().replace("'mine'", "'gsm8k'"), 'the task name "gsm8k" is taken'),
        (
            path.read_text()
            .replace("import Task", "import ScoredSet, Scoring, Task")
            .replace("splits=", "scoring=Scoring(sets={'mine': ScoredSet()}, grade=str), splits="),
            'task "mine": rows are generated; ScoredSet "mine" must say how many, rows = N',
        ),
    ]:
        path.write_text(source)
        with pytest.raises(TaskError, match=message):
            load_tasks((path,))
    with pytest.raises(TaskError, match="no such task file"):
        load_tasks((tmp_path / "absent.py",))
