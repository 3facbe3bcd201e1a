"""log.jsonl and loss.png while a run lasts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from chattrain.run.telemetry import TrainEntry, ValEntry, open_log


def train(step: int) -> TrainEntry:
    return TrainEntry(step, 5.0, 1.0, 10, 9, 1e3, "unknown", 1, 0.0, 1.0, "00")


def val(step: int, **tasks: float) -> ValEntry:
    return ValEntry(step, 1.0, tasks or {"a": 1.0}, 100, 0.5)


def test_what_a_resumed_run_does_again_leaves_the_log(tmp_path: Path) -> None:
    """A run that died before its first checkpoint also validates step 0 again."""
    for start, kept in ((0, []), (2, [("val", 0), ("train", 0), ("train", 1), ("val", 2)])):
        with open_log(tmp_path, start, None, is_first=True) as write:
            for entry in (val(0), train(0), train(1), val(2), train(2)) if start == 0 else ():
                write(entry)
        if start == 0:
            whole = (tmp_path / "log.jsonl").read_bytes()
            with open_log(tmp_path, 0, None, is_first=True):
                assert (tmp_path / "log.jsonl").read_bytes() == b"" and kept == []
            (tmp_path / "log.jsonl").write_bytes(whole + b'{"kind": "tr')
        else:
            lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
            assert [(line["kind"], line["step"]) for line in lines] == kept


def test_every_validation_draws_a_line_per_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figure = pytest.importorskip("matplotlib.figure").Figure
    drawn, savefig = [], figure.savefig

    def save(self, path: Path, **options) -> None:
        axes = self.axes[-1]
        lines = {line.get_label(): [float(y) for y in line.get_ydata()] for line in axes.get_lines()}
        drawn.append((len(self.axes), lines))
        savefig(self, path, **options)

    monkeypatch.setattr(figure, "savefig", save)
    with open_log(tmp_path, 0, None, is_first=True) as write:
        write(val(0, **{"gsm8k": 2.0, r"$\frac$": 1.5}))
        write(train(0))
        assert len(drawn) == 1 and (tmp_path / "loss.png").stat().st_size > 5_000
        write(val(1, **{"gsm8k": 1.75, r"$\frac$": 1.25}))
    expected = {"validation: gsm8k": [2.0, 1.75], r"validation: \$\frac\$": [1.5, 1.25], "validation: all": [1.0, 1.0]}
    assert [axes for axes, _ in drawn] == [2, 2] and drawn[1][1] == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.jsonl", "loss.png"]
