from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chatdata.build.plan import mixture_order, permutation, select, share_rows
from chatdata.errors import RecipeError
from chatdata.recipe import Entry, Recipe, load_recipe, parse_recipe, shipped_recipes
from chatdata.tasks import Option, Task, load_tasks

TASKS = load_tasks()


def write(tmp_path: Path, text: str) -> str:
    (tmp_path / "r.toml").write_text(text)
    return str(tmp_path / "r.toml")


def test_all_named_recipes_load() -> None:
    assert list(shipped_recipes()) == [
        "base",
        "demo-mid",
        "demo-sft",
        "mid",
        "nanochat-2025-12-mid",
        "nanochat-2025-12-sft",
        "sft",
    ]
    for name in shipped_recipes():
        recipe = load_recipe(name, TASKS)
        assert recipe.stage in name
        scored = {("mmlu", "test"), ("arc", "test"), ("gsm8k", "test"), ("humaneval", "test")}
        assert not scored & {(entry.task, entry.split) for entries in recipe.splits.values() for entry in entries}


def test_mid_recipe_expanded() -> None:
    recipe = load_recipe("mid", TASKS)
    train = [(e.task, e.subset, e.split, e.start, e.stop, e.rows) for e in recipe.splits["train"]]
    assert train == [
        ("smoltalk", "", "train", None, None, None),
        ("mmlu", "auxiliary_train", "train", None, None, None),
        ("gsm8k", "main", "train", None, -420, None),
        ("identity", "", "train", None, None, None),
        ("identity", "", "train", None, None, None),
        ("simple_spelling", "", "train", None, None, 200_000),
        ("spelling_bee", "", "train", None, None, 80_000),
    ]
    assert all(e.options["holdout"] for e in recipe.splits["train"][-2:])
    assert (recipe.max_tokens, recipe.overflow, recipe.zero_supervised, recipe.seed) == (None, "keep", "keep", 42)
    sft = load_recipe("sft", TASKS)
    assert (sft.max_tokens, sft.overflow, sft.zero_supervised) == (2048, "truncate", "drop")
    for stage in ("mid", "sft"):
        parity = load_recipe(f"nanochat-2025-12-{stage}", TASKS)
        assert (parity.max_tokens, parity.overflow, parity.zero_supervised) == (2048, "truncate", "keep")
        assert parity.shuffle == {"train": True, "val": False} and len(parity.splits["val"]) == 1
        assert not any(e.options.get("holdout") for e in parity.splits["train"])


ENTRY = '\n[[train]]\ntask = "gsm8k"\n'
MATH = '\n[[train]]\ntask = "demo_math"\n'
BAD = [
    ('stage = "mid"\nsed = 1' + ENTRY, 'unknown key "sed"; did you mean "seed"?'),
    ('stage = "mid"\nseed = "1"' + ENTRY, 'key "seed": must be an integer of at least 0, not "1"'),
    ('stage = "mid"\nseed = true' + ENTRY, 'key "seed": must be an integer of at least 0, not true'),
    ('stage = "midd"' + ENTRY, 'key "stage": "midd"; did you mean "mid"?'),
    ("seed = 1" + ENTRY, 'no key "stage"; it must be base, mid or sft'),
    ('stage = "mid"', 'no key "train"; it must be one or more [[train]] entries'),
    ('stage = "mid"\noverflow = "cut"' + ENTRY, 'key "overflow": "cut"; valid: keep, truncate, drop, error'),
    (
        'stage = "mid"\nmax_tokens = 9007199254740992\noverflow = "drop"' + ENTRY,
        'key "max_tokens": must be a number from -9,007,199,254,740,991 to 9,007,199,254,740,991',
    ),
    ('stage = "mid"\nseed = 0xfffffffffffffffffffffff' + ENTRY, 'key "seed": must be a number from -9,007'),
    (
        'stage = "sft"\n[[train]]\ntask = "conversations"\npath = "x"\nepochs = 1_000_000_000',
        "[[train]] entry 1: more than 32,768 entries in a split; each epoch is one",
    ),
    ('stage = "sft"\n' + '[[train]]\ntask = "identity"\nepochs = 16385\n' * 2, "[[train]] entry 2: more than 32,768"),
    (
        'stage = "sft"\n[[train]]\ntask = "smoltalk"\nrows = 1_000_000_000',
        'key "rows": must be an integer of at least 1 and',
    ),
    (
        'stage = "sft"\n[[train]]\ntask = "gsm8k"\nignore = ["notes"]',
        '[[train]] entry 1, key "ignore": does nothing with "gsm8k"',
    ),
    (
        'stage = "sft"\n[[train]]\ntask = "smoltalk"\nignore = ["notes", "label"]',
        '[[train]] entry 1, key "ignore": "label" compares answers, but every answer here is trained on',
    ),
    ('stage = "sft"\n[[train]]\ntask = "smoltalk"\nignore = "notes"', 'key "ignore": must be a list, not "notes"'),
    ('stage = "mid"\noverflow = "drop"' + ENTRY, 'overflow = "drop" needs max_tokens'),
    (
        'stage = "mid"\nmax_tokens = 9' + ENTRY,
        'max_tokens = 9 does nothing with overflow = "keep"; choose truncate, drop or error',
    ),
    (
        'stage = "mid"\nmax_tokens = 1\noverflow = "drop"' + ENTRY,
        'key "max_tokens": must be an integer of at least 2, not 1',
    ),
    ('stage = "mid"\nshuffle = {test = true}' + ENTRY, 'key "shuffle": unknown key "test"; valid: train, val'),
    ('stage = "mid"\n[[train]]\nrows = 5', '[[train]] entry 1: no key "task"; it must be a string'),
    ('stage = "mid"\n[[train]]\ntask = "gsm8"', 'entry 1, key "task": unknown task "gsm8"; did you mean "gsm8k"?'),
    ('stage = "mid"' + ENTRY + "row = 5", '[[train]] entry 1: unknown key "row"; did you mean "rows"?'),
    (
        'stage = "mid"' + ENTRY + 'rows = "5"',
        'entry 1, key "rows": must be an integer of at least 1 and at most 100,000,000, not "5"',
    ),
    ('stage = "mid"' + ENTRY + "rows = 0", 'entry 1, key "rows": must be an integer of at least 1 and'),
    ('stage = "mid"' + ENTRY + "epochs = 0", 'entry 1, key "epochs": must be a number above 0, not 0'),
    ('stage = "mid"' + ENTRY + "val_share = 1", 'entry 1, key "val_share": must be a number between 0 and 1, not 1'),
    ('stage = "mid"' + ENTRY + 'name = ""', 'entry 1, key "name": must be a text that is not empty, not ""'),
    (
        'stage = "mid"' + ENTRY + "share = 1\nrows = 5",
        'entry 1, key "share": decides the rows, in place of rows and epochs',
    ),
    (
        'stage = "mid"' + ENTRY + "share = 1" + ENTRY,
        'r.toml: "share" is missing in 1 of 2 entries of train; give all of them one, or none',
    ),
    (
        'stage = "mid"' + ENTRY + ENTRY.replace("train", "val") + "val_share = 0.1",
        '[[val]] entry 1, key "val_share": is for [[train]] entries; val gets its rows by itself',
    ),
    (
        'stage = "sft"\n[[train]]\ntask = "smoltalk"\ncolumns = { promt = "q" }',
        'entry 1, key "columns": "promt"; did you mean "prompt"?',
    ),
    (
        'stage = "sft"\n[[train]]\ntask = "smoltalk"\ncolumns = { prompt = "q", completion = "q" }',
        'entry 1, key "columns": the same key of the rows under two names',
    ),
    ('stage = "mid"' + ENTRY + 'columns = { text = "t" }', 'entry 1, key "columns": does nothing with "gsm8k"'),
    ('stage = "mid"' + MATH + "rows = 9\nval_share = 0.1", 'key "val_share": does nothing, because "demo_math" is'),
    ('stage = "mid"' + ENTRY + "holdout = true", 'entry 1: unknown key "holdout"; valid: task, split'),
    ('stage = "mid"' + ENTRY + 'split = "tests"', 'key "split": "tests"; did you mean "test"?'),
    ('stage = "mid"' + ENTRY + 'subset = "mian"', 'key "subset": "mian"; did you mean "main"?'),
    ('stage = "mid"' + ENTRY + ENTRY.replace("gsm8k", "humaneval"), 'entry 2: "humaneval" is only for scoring'),
    ('stage = "mid"' + ENTRY.replace("gsm8k", "simple_spelling"), 'is generated and needs the key "rows"'),
    ('stage = "mid"' + ENTRY.replace("gsm8k", "text"), 'entry 1: "text" is text, but stage mid takes conversations'),
    ('stage = "base"' + ENTRY, 'entry 1: "gsm8k" is conversation, but stage base takes plain text'),
    ("stage = mid", "not valid TOML: "),
    ('stage = "mid"\nval = []' + ENTRY, 'key "val": must be one or more [[val]] entries, not []'),
    ('stage = "mid"\nshuffle = {val = false}' + ENTRY, 'key "shuffle.val": does nothing without a [[val]] entry'),
    ('stage = "mid"\nseed = -42' + ENTRY, 'key "seed": must be an integer of at least 0, not -42'),
    ('stage = "mid"\ntrain = {}', 'key "train": must be one or more [[train]] entries, not {}'),
    ('stage = "mid"\n[[train]]\ntask = ["gsm8k"]', 'entry 1, key "task": must be a string, not ["gsm8k"]'),
    ('stage = "mid"' + MATH + "rows = 10\npath = 'x'", 'key "path": does nothing, because "demo_math" is generated'),
    ('stage = "mid"' + ENTRY + "path = 'x.jsonl'\nrepo = 'a/b'", 'key "repo": does nothing, because "gsm8k" reads'),
    ('stage = "mid"' + ENTRY + "path = 'x.jsonl'\nsplit = 'bogus'", 'key "split": does nothing'),
    (
        'stage = "mid"' + MATH + "rows = 1000000000000000",
        'key "rows": must be an integer of at least 1 and at most 100',
    ),
    ('stage = "mid"' + MATH + "rows = 1\nstart = -1", "start and stop of a generated task cannot be negative"),
]


@pytest.mark.parametrize(("text", "message"), BAD)
def test_strict(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(tmp_path, text), TASKS)
    assert message in str(caught.value) and str(caught.value).startswith(f"{tmp_path}/r.toml")


def test_unknown_recipe_name() -> None:
    with pytest.raises(RecipeError, match=r'^no recipe "midd" \(neither a file nor a name\); did you mean "mid"\?$'):
        load_recipe("midd", TASKS)


def test_limits_of_the_command_line_replace_the_recipes_own() -> None:
    assert load_recipe("sft", TASKS, max_tokens=512).max_tokens == 512
    assert load_recipe("sft", TASKS, overflow="keep").max_tokens is None
    assert load_recipe("mid", TASKS, max_tokens=512, overflow="drop").overflow == "drop"
    with pytest.raises(RecipeError, match=r"^mid.toml: max_tokens = 512 does nothing"):
        load_recipe("mid", TASKS, max_tokens=512)
    with pytest.raises(RecipeError, match=r'^mid.toml: overflow = "drop" needs max_tokens'):
        load_recipe("mid", TASKS, overflow="drop")


def test_permutation_is_that_of_datasets() -> None:
    assert permutation(10).tolist() == [5, 6, 0, 7, 3, 2, 4, 9, 1, 8]


def test_mixture_order_is_that_of_nanochat() -> None:
    pairs = [(0, i) for i in range(3)] + [(1, i) for i in range(5)]
    order = [pairs[i] for i in mixture_order([3, 5], 42, True)]
    assert order == [(1, 0), (1, 1), (1, 3), (1, 4), (0, 2), (1, 2), (0, 0), (0, 1)]
    assert mixture_order([3, 5], 42, False).tolist() == list(range(8))
    lengths = [460_341, 99_842, 7_473, 1_000, 1_000, 200_000, 80_000]
    first = mixture_order(lengths, 42, True)[:5]
    ends = np.cumsum(lengths)
    entries = np.searchsorted(ends, first, side="right")
    positions = first - np.concatenate([[0], ends])[entries]
    found = list(zip(entries.tolist(), positions.tolist(), strict=True))
    assert found == [(0, 164_777), (5, 44_243), (5, 72_171), (0, 139_373), (0, 238_077)]


def test_select() -> None:
    def taken(num_rows: int, limit: int | None = None, **keys: Any) -> range:
        return select(Entry("smoltalk", **keys), num_rows, limit)

    assert taken(10) == range(10)
    assert taken(10, stop=-4) == range(6)
    assert taken(10, start=-4, limit=2) == range(6, 8)
    assert taken(10, start=2, stop=8, rows=3) == range(2, 5)
    assert taken(10, rows=5, limit=99) == range(5)
    assert taken(10, start=2, epochs=0.3) == range(2, 4)
    assert taken(0) == range(0)
    for keys, message in (
        ({"stop": 11}, "stop = 11 is outside the source's 10 rows"),
        ({"start": -11}, "start = -11 is outside the source's 10 rows"),
        ({"start": 5, "stop": 5}, "start = 5, stop = 5 selects no rows of 10"),
        ({"start": 5, "rows": 6}, "rows = 6, but only 5 are there"),
    ):
        with pytest.raises(RecipeError, match=message):
            taken(10, **keys)


def test_a_file_in_the_way_does_not_become_a_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo-mid").write_text("my notes")
    assert load_recipe("demo-mid", TASKS).stage == "mid"


def test_numbers_of_a_users_task_fit_a_manifest() -> None:
    task = Task("mine", "s", "MIT", lambda row: row, options={"size": Option(int), "ratio": Option(float)})
    for value in (2**53, -(2**53), 10**5_000, float("inf"), float("nan")):
        key = "size" if isinstance(value, int) else "ratio"
        table = {"stage": "sft", "train": [{"task": "mine", "path": "x", key: value}]}
        with pytest.raises(
            RecipeError, match=rf'^r.toml, key "train\[0\].{key}": must be a number from -9,007,199,254'
        ):
            parse_recipe(table, "r.toml", Path("r.toml"), {"mine": task})
    table = {"stage": "sft", "train": [{"task": "mine", "path": "x", "size": 2**53 - 1, "ratio": 1e300}]}
    parse_recipe(table, "r.toml", Path("r.toml"), {"mine": task})


def parsed(**entry: Any) -> Recipe:
    table = {"stage": "sft", "train": [{"task": "conversations", "path": "x", **entry}]}
    return parse_recipe(table, "r.toml", Path("r.toml"), TASKS)


def test_a_part_of_an_epoch_is_an_entry_of_its_own() -> None:
    assert [entry.epochs for entry in parsed(epochs=2.3).splits["train"]] == [1, 1, 0.3]
    assert [entry.get("epochs") for entry in parsed(epochs=1.5).resolved()["train"]] == [None, 0.5]
    assert [entry.epochs for entry in parsed(epochs=3.0).splits["train"]] == [1, 1, 1]


def test_val_share_makes_an_entry_of_val() -> None:
    recipe = parsed(val_share=0.1, rows=20, epochs=2, name="mine")
    assert [entry.in_val for entry in recipe.splits["train"]] == [False, False]
    assert [(e.in_val, e.rows, e.name) for e in recipe.splits["val"]] == [(True, None, "mine")]
    assert recipe.splits["val"][0].resolved()["val_share"] == 0.1


def test_columns_and_names_are_resolved() -> None:
    entry = parsed(columns={"prompt": "q", "completion": "a"}, name="mine").splits["train"][0]
    assert entry.reading.columns == (("completion", "a"), ("prompt", "q"))
    assert entry.resolved()["columns"] == {"completion": "a", "prompt": "q"}
    assert (entry.label, entry.resolved()["name"]) == ("mine", "mine")
    assert parsed().resolved()["train"][0]["name"] == "conversations"


def test_share_rows() -> None:
    assert share_rows([10, 10], [1, 1]) == [10, 10]
    assert share_rows([10, 100], [1, 3]) == [10, 32]  # N = 43: 44 would take 11 of the first
    assert share_rows([10, 5], [0.7, 0.3]) == [10, 4]
    assert share_rows([3], [0.1]) == [3]


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(1, 9)), min_size=1, max_size=4))
def test_share_rows_are_the_most_that_repeat_none(entries: list[tuple[int, int]]) -> None:
    rows, shares = [list(values) for values in zip(*entries, strict=True)]
    wanted = ([number * share // sum(shares) for share in shares] for number in itertools.count())
    fitting = itertools.takewhile(lambda counts: all(map(int.__le__, counts, rows)), wanted)
    assert share_rows(rows, shares) == list(fitting)[-1]


def test_ignored_keys_are_in_the_manifest_if_there_are_any() -> None:
    table: dict[str, Any] = {"stage": "sft", "train": [{"task": "conversations", "path": "x"}]}
    plain = parse_recipe(table, "r.toml", Path("r.toml"), TASKS).resolved()["train"][0]
    table["train"][0]["ignore"] = ["notes"]
    ignoring = parse_recipe(table, "r.toml", Path("r.toml"), TASKS).resolved()["train"][0]
    assert "ignore" not in plain and ignoring == plain | {"ignore": ["notes"]}
