from dataclasses import replace

import pytest

from chattrain.errors import UnknownStageError
from chattrain.schedule import find_stage, momentum, multiplier, stages


def test_policies():
    assert list(stages()) == ["base", "mid", "sft"]
    assert replace(find_stage("base"), name="mid") == find_stage("mid")
    policies = {name: (stage.layout, stage.mask, stage.lr_fraction) for name, stage in stages().items()}
    assert policies["mid"] == ("stream", "ignore", 1.0)
    assert policies["sft"] == ("pack", "apply", 0.02)


def test_unknown_stage():
    with pytest.raises(UnknownStageError, match="unknown stage 'stf': must be one of base, mid, sft"):
        find_stage("stf")


def test_multiplier():
    mid, sft = find_stage("mid"), find_stage("sft")
    assert [multiplier(mid, s, 10) for s in range(10)] == pytest.approx([1] * 8 + [1, 0.5])
    assert [multiplier(mid, s, 20) for s in range(14, 20)] == pytest.approx([1, 1, 1, 0.75, 0.5, 0.25])
    assert [multiplier(sft, s, 4) for s in range(4)] == [1, 0.75, 0.5, 0.25]
    assert multiplier(mid, 0, 1) == multiplier(sft, 0, 1) == 1


def test_momentum():
    mid, sft = find_stage("mid"), find_stage("sft")
    assert [momentum(mid, s) for s in (0, 150, 300, 5000)] == pytest.approx([0.85, 0.9, 0.95, 0.95])
    assert [momentum(sft, s) for s in (0, 1, 1000)] == [0.95] * 3
