"""chatdata verify, level semantic: the build against its sources, rendered again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from chatdata.check.rerender import choose, verify_semantic
from chatdata.check.verify import verify_full
from chatdata.conversation import Reading
from chatdata.document import Document
from chatdata.errors import MissingSource, RecipeError
from chatdata.render import specification as render
from chatdata.sources.find import Locations
from chatdata.tasks import load_tasks
from chatdata.tokenizer.bpe import Tokenizer


def semantic(built: Path, **options: Any) -> list[str]:
    return verify_semantic(built, Locations(Path()), load_tasks(), recipe=str(built.parent / "r.toml"), **options)


def redo_digest(arrays: dict[str, Any], doc: int) -> None:
    part = slice(*arrays["offsets"][doc : doc + 2].tolist())
    ids, mask = arrays["tokens"][part].tobytes(), arrays["mask"][part].tobytes()
    arrays["index"][doc]["digest"] = xxhash.xxh3_128_digest(ids + mask)


def test_a_sound_build(built: Path, demo_mid: Path) -> None:
    assert semantic(built) == []
    assert verify_semantic(demo_mid, Locations(Path()), load_tasks()) == []  # a shipped recipe is found by itself


def test_semantic_through_the_command_line(built: Path, demo_mid: Path, chatdata: Callable) -> None:
    result = chatdata("verify", demo_mid, "--level", "semantic", "--share", "0.2")
    assert (result.returncode, result.stdout) == (0, f"{demo_mid}: no damage found (semantic)\n")
    assert "check train: " in result.stderr and "hash: " in result.stderr and "demo_math train: " in result.stderr
    recipe = built.parent / "r.toml"
    assert chatdata("verify", built, "--level", "semantic", "--recipe", recipe).returncode == 0
    source = built.parent / "i.jsonl"
    source.write_text(source.read_text().replace("me 3", "me 7"))
    result = chatdata("verify", built, "--level", "semantic", "--recipe", recipe, "--json")
    here = [f"{built}/train: document {doc} (i.jsonl line 4): id at position 11 is 51" for doc in (0, 2)]
    assert (result.returncode, json.loads(result.stdout)["problems"]) == (
        3,
        [
            "source i.jsonl: i.jsonl has another SHA-256 than the build's",
            *(f"{document}, but rendered again 55" for document in here),
        ],
    )
    result = chatdata("verify", built, "--recipe", recipe)
    assert (result.returncode, result.stderr) == (2, "Error: --recipe goes with --level semantic\n")


def test_semantic_finds_another_renderer(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = render.render_conversation

    def one_token_more(tokenizer: Tokenizer, conversation: Any, reading: Reading) -> Document:
        document = original(tokenizer, conversation, reading)
        tokens, mask = (np.insert(values, 2, value) for values, value in ((document.tokens, 97), (document.mask, 0)))
        return Document(tokens, mask, document.spans, tokenizer)

    monkeypatch.setattr(render, "render_conversation", one_token_more)
    problems = semantic(built)
    assert len(problems) == 11 and all(": document " in problem for problem in problems[:10])
    assert "but rendered again" in problems[0] and problems[10].endswith(
        " more differences from what is rendered again"
    )


def test_semantic_finds_one_other_token(built: Path, edit: Callable) -> None:
    def change(arrays: dict[str, Any]) -> None:
        start = int(arrays["offsets"][5])
        assert arrays["tokens"][start + 2] < 256
        arrays["tokens"][start + 2] ^= 1
        redo_digest(arrays, 5)

    edit(built, change)
    assert verify_full(built) == []
    problems = semantic(built)
    assert len(problems) == 1 and f"{built}/train: document 5 (" in problems[0] and "id at position 2 is" in problems[0]


def test_semantic_finds_another_order(built: Path, edit: Callable) -> None:
    def swap(arrays: dict[str, Any]) -> None:
        one, *rest = arrays["index"]
        other = next(row for row in rest if row["entry"] == one["entry"])
        for key in ("row", "task_position"):
            one[key], other[key] = other[key], one[key]

    edit(built, swap)
    assert verify_full(built) == []
    assert any("is not in the order of the recipe's mixture" in problem for problem in semantic(built))


def test_semantic_needs_what_the_build_was_made_of(built: Path) -> None:
    with pytest.raises(MissingSource, match=r"c\.jsonl: no such file"):  # the manifest names files without folders
        verify_semantic(built, Locations(Path()), load_tasks())
    recipe = built.parent / "r.toml"
    recipe.write_text(recipe.read_text().replace("epochs = 2", "epochs = 3"))
    with pytest.raises(RecipeError, match=r"^r is not the recipe of this build: train\[3\] is absent in the build"):
        semantic(built)


def test_semantic_requests_no_address_that_only_the_manifest_names(
    tmp_path: Path, build_in: Callable, sign: Callable, byte_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "r.toml").write_text('stage = "sft"\n[[train]]\ntask = "simple_spelling"\nwords = "w.txt"\nrows = 3\n')
    (tmp_path / "w.txt").write_text("alpha\nbravo\n")
    built = build_in(tmp_path, byte_tokenizer)
    address = "https://example.org/w.txt"
    sign(built, lambda manifest: manifest["recipe"]["train"][0].update(words=address))
    requested: list[str] = []

    def stream(method: str, url: str, **_: Any) -> Any:
        requested.append(url)
        raise ConnectionError("no")

    monkeypatch.setattr("huggingface_hub.get_session", lambda: SimpleNamespace(stream=stream))
    with pytest.raises(MissingSource, match=f"^{address} is not in the cache; only the build names it: pass --words"):
        verify_semantic(built, Locations(Path()), load_tasks())
    assert requested == []
    assert verify_semantic(built, Locations(Path(), words=str(tmp_path / "w.txt")), load_tasks()) == []
    with pytest.raises(MissingSource, match=f"cannot download {address}: no"):
        verify_semantic(built, Locations(Path(), words=address), load_tasks())
    assert requested == [address]


def test_plain_text(tmp_path: Path, build_in: Callable, edit: Callable, byte_tokenizer: Tokenizer) -> None:
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.jsonl").write_text('{"text": ""}\n{"text": "two"}\n')
    entries = "".join(f'[[train]]\ntask = "text"\npath = "{name}"\n' for name in ("a.txt", "b.jsonl"))
    (tmp_path / "r.toml").write_text(f'stage = "base"\nmax_tokens = 3\noverflow = "truncate"\n{entries}')
    built = build_in(tmp_path, byte_tokenizer)
    assert semantic(built) == []
    edit(built, lambda arrays: arrays["tokens"].__setitem__(-1, 257))
    assert any("tokens-00000.npy: user_start in plain text" in problem for problem in verify_full(built))


@given(st.lists(st.integers(0, 5), max_size=400), st.floats(0, 1))
def test_the_choice(entries: list[int], share: float) -> None:
    chosen = choose(np.array(entries, dtype=np.int64), share).tolist()
    assert sorted(set(chosen)) == chosen and len(chosen) >= min(len(entries), max(100, share * len(entries)))
    assert {entries[i] for i in chosen} == set(entries)


def test_the_choice_is_spread() -> None:
    chosen = choose(np.zeros(100_000, dtype=np.int64), 0.01)
    assert len(chosen) == 1000
    assert all(60 < count < 140 for count in np.histogram(chosen, bins=10)[0])
