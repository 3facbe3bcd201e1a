"""Builds to report on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from chatdata.build.plan import make_build_plan
from chatdata.build.run import build
from chatdata.look.report.page import write_report
from chatdata.recipe import load_recipe
from chatdata.sources.find import Locations
from chatdata.tasks import load_tasks
from chatdata.tokenizer.bpe import SPLIT_PATTERN, Tokenizer, append_special_tokens


def chat(user: str, answer: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]


TOOL = [{"type": "text", "text": "b"}, {"type": "python", "text": "1+1"}, {"type": "python_output", "text": "2"}]
# bos us a ue as b c ae · bos us a ue as b ps 1 + 1 pe os 2 oe ae · 16 tokens of user: dropped · bos us a ue as y × 11
TRAIN = [chat("a", "bc"), chat("a", TOOL), chat("u" * 20, "x"), chat("a", "y" * 20)]
VAL = [chat("z", "b")]  # bos us z ue as b ae
RECIPE = """
stage = "sft"
max_tokens = 16
overflow = "truncate"
zero_supervised = "drop"
[[train]]
task = "conversations"
path = "c.jsonl"
[[val]]
task = "conversations"
path = "v.jsonl"
"""


def _build_of(folder: Path, tokenizer: Tokenizer, sources: dict[str, Any], recipe: str, out: str = "out") -> Path:
    for name, conversations in sources.items():
        (folder / name).write_text("".join(json.dumps(messages) + "\n" for messages in conversations))
    (folder / "r.toml").write_text(recipe)
    tasks = load_tasks()
    build(
        make_build_plan(load_recipe(str(folder / "r.toml"), tasks), tasks, tokenizer, Locations(folder)), folder / out
    )
    return folder / out


@pytest.fixture(scope="session", autouse=True)
def _altair() -> None:
    for name in ("altair", "vl_convert", "jinja2"):
        pytest.importorskip(name, reason=f"a report needs {name}: uv sync --extra report")


@pytest.fixture
def build_small(tmp_path: Path, byte_tokenizer: Tokenizer) -> Callable[[str], Path]:
    """The build `small` again, in the folder of this name."""
    return lambda out: _build_of(tmp_path, byte_tokenizer, {"c.jsonl": TRAIN, "v.jsonl": VAL}, RECIPE, out)


@pytest.fixture
def small(build_small: Callable[[str], Path]) -> Path:
    return build_small("out")


HOSTILE = [
    "<img src=x onerror=\"document.title='ran'\">",
    "</script><script>document.title = 'ran'</script>",
    "</style><b>&lt;i&gt; &amp; <!-- <script> -->",
    "{{ 7 * 7 }} http://127.0.0.1:9/ needle",
]
HOSTILE_RECIPE = """
stage = "mid"
[[train]]
task = "conversations"
path = "<b>&amp;.jsonl"
[[train]]
task = "identity"
path = "i.jsonl"
[[val]]
task = "conversations"
path = "i.jsonl"
"""


@pytest.fixture(scope="session")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A report whose documents, source names, folder and vocabulary all try to be markup."""
    ranks = {bytes([byte]): byte for byte in range(256)}
    for i, entry in enumerate((b"</", b"</s", b"</sc", b"</scr", b"</scri", b"</scrip", b"</script", b"</script>")):
        ranks[entry] = 256 + i
    tokenizer = Tokenizer(ranks, SPLIT_PATTERN, append_special_tokens(ranks), "hostile")
    sources = {
        "<b>&amp;.jsonl": [chat(text, [{"type": "text", "text": f"re: {text}"}, *TOOL[1:]]) for text in HOSTILE],
        "i.jsonl": [chat(f"who {i}?", "long " * 2_000 if i == 5 else f"me {i}") for i in range(30)],
    }
    out = _build_of(tmp_path_factory.mktemp("hostile"), tokenizer, sources, HOSTILE_RECIPE, "<i>out&lt;")
    return write_report(out)


@pytest.fixture
def hostile_page(hostile: dict[str, Any]) -> Path:
    return Path(hostile["out"])


@pytest.fixture(scope="session")
def hostile_texts() -> list[str]:
    return HOSTILE
