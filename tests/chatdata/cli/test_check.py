"""`chatdata check` and `chatdata verify` on the command line; what verify finds is tested in check/."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq


def test_verify_exit_code(demo_mid: Path, tmp_path: Path, chatdata: Callable) -> None:
    assert chatdata("verify", demo_mid).stdout == f"{demo_mid}: no damage found (quick)\n"
    broken = tmp_path / "broken"
    shutil.copytree(demo_mid, broken)
    path = broken / "train" / "mask-00000.npy"
    path.write_bytes(path.read_bytes()[:-5])
    result = chatdata("verify", broken)
    assert (result.returncode, result.stdout) == (3, f"{broken}: 1 problem (quick)\n")
    assert result.stderr.startswith(f"{path}: ")
    assert json.loads(chatdata("verify", broken, "--json").stdout)["problems"] == [result.stderr.strip()]


def test_check(tmp_path: Path, chatdata: Callable) -> None:
    good = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    call = [{"type": "python", "text": "f(1)"}, {"type": "python", "text": "1+1"}]
    lines = [good, good[:1], [good[0], {"role": "assistant", "content": call}]]
    (tmp_path / "a.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    result = chatdata("check", "a.jsonl", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "1 file, 3 conversations, 0 bad rows\n1 call of other tools, not replayed\n"

    (tmp_path / "b").mkdir()
    bad = ["", "[5", *["null"] * 22, json.dumps(good), json.dumps(good[1:]), '{"a": "x", "a": "y"}']
    (tmp_path / "b" / "b.jsonl").write_text("\n".join(bad))
    kind = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
    pq.write_table(pa.table({"messages": pa.array([good, good[1:]], kind)}), tmp_path / "c.parquet")
    result = chatdata("check", "a.jsonl", "b/b.jsonl", "c.parquet", cwd=tmp_path)
    assert (result.returncode, result.stdout.splitlines()) == (
        3,
        [
            "22 rows: a conversation is a list of messages or an object with messages, not null",
            f"  {', '.join(f'b/b.jsonl:{line}' for line in range(3, 23))} and 2 more",
            '2 rows: message 0, key "role": assistant where user must come; after an optional system message roles '
            "alternate user, assistant, starting with user",
            "  b/b.jsonl:26, c.parquet row 1",
            "1 row: not valid JSON at column 1: Expecting ',' delimiter",
            "  b/b.jsonl:2",
            '1 row: not valid JSON: key "a" twice in one object',
            "  b/b.jsonl:27",
            "3 files, 5 conversations, 26 bad rows",
            "1 call of other tools, not replayed",
        ],
    )
    found = json.loads(chatdata("check", "a.jsonl", "b/b.jsonl", "c.parquet", "--json", cwd=tmp_path).stdout)
    assert (found["files"], found["conversations"], found["rows"], len(found["listed"])) == (3, 5, 26, 26)
    assert found["counts"] == {"other_tools": 1}
    assert found["listed"][-1]["row"] == 1 and found["listed"][0] == {
        "file": "b/b.jsonl",
        "line": 2,
        "reason": "not valid JSON at column 1: Expecting ',' delimiter",
    }
    result = chatdata("check", "a.jsonl", "no.jsonl", cwd=tmp_path)
    assert (result.returncode, result.stderr) == (1, "Error: check: no.jsonl: no such file\n")
