"""A split as tensors, for torch's DataLoader: the only module that imports torch, and only inside its functions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from chatdata.document import IGNORED
from chatdata.errors import PlanError
from chatdata.packing.epoch import STAGE_MASKS, Layout, TrainingPlan, plan_epoch
from chatdata.packing.layouts import Long
from chatdata.render.format import NANOCHAT
from chatdata.shards.masks import MaskPolicy, check_policy
from chatdata.shards.read import Split


def to_torch(
    split: Split,
    layout: Literal["documents"] | Layout = "documents",
    seq_len: int | None = None,
    mask: MaskPolicy | None = None,
    seed: int = 42,
    long: Long = "error",
) -> TorchDataset:
    """A map-style dataset over a split or View, for `torch.utils.data.DataLoader`: each worker maps the files itself.

    Items are dicts of int64 tensors. `labels` are not shifted, which is how transformers' models take them: labels[i]
    is input_ids[i] if that token is a target under the mask policy, else -100; labels[0] is always -100.
    `position_ids` count from 0 where attention should begin anew.

    documents: item i is document i, whole. Lengths differ: `collate_fn=dataset.collate` pads a batch to its longest.
    pad, pack, stream: item i is sequence i of chattrain's plan with T = `seq_len`. It has T + 1 tokens for T targets:
    labels[1:] are chattrain's targets and input_ids[:-1] its inputs, but for the last token of a sequence's last
    document, which chattrain does not feed. So G items in order are its step of G sequences.
        pad      one document and padding
        pack     several documents and padding. All but the last are without their last token, a target but no input:
                 its label is where the next document begins
        stream   tokens [i · T, (i + 1) · T + 1) of the split
    Padding is at the end, where causal attention never sees it: assistant_end, in other chat formats id 0, each at
    position 0. Given position_ids and use_cache=False, transformers' models keep attention inside packed documents.

    mask: a policy, by default the stage's, as in chattrain. seed: shuffles pad and pack. long: what happens in pad and
    pack to a document of more than T + 1 tokens; `dataset.plan.left_out` counts what is cut or left out.
    Raises PlanError, or PackingError for a document that is too long; also if there is no target or no sequence.
    """
    mask = check_policy(mask or STAGE_MASKS[split.build.manifest["stage"]])
    if layout == "documents" and seq_len is None:
        return TorchDataset(split, mask, None)
    if layout == "documents" or seq_len is None:
        raise PlanError(f"layout {layout!r}, seq_len {seq_len}: documents are whole, any other layout needs a seq_len")
    return TorchDataset(split, mask, plan_epoch(split, layout, mask, seq_len, 1, seed, long))


@dataclass(frozen=True, eq=False)
class TorchDataset:
    """Made by `to_torch`. Its plan, in which a step is a sequence, counts what is `left_out`."""

    split: Split
    mask: MaskPolicy
    plan: TrainingPlan | None  # None: layout documents

    def __len__(self) -> int:
        return self.plan.num_steps if self.plan else len(self.split)

    def __getitem__(self, i: int) -> dict[str, Any]:
        import torch

        runs = self._runs(range(len(self))[i])
        width = self.plan.seq_len + 1 if self.plan else runs[0][1]
        item = {key: np.full(width, value) for key, value in self._padding.items()}
        at = 0
        for start, count in runs:
            stop, end = start + count, at + count
            tokens, targets = self.split.tokens(start, stop), self.split.mask(start, stop, self.mask)[1:] == 1
            item["input_ids"][at:end] = tokens
            item["position_ids"][at:end] = np.arange(count)
            item["labels"][at + 1 : end][targets] = tokens[1:][targets]
            at = end - 1  # the next document begins on the place of this one's last token, which is only a target
        return {key: torch.from_numpy(values) for key, values in item.items()}

    def _runs(self, i: int) -> list[tuple[int, int]]:
        """The documents, or the part of a stream, in item i: the first token of each in the split, and how many."""
        offsets, plan = self.split.offsets, self.plan
        if plan is None:
            return [(int(offsets[i]), int(offsets[i + 1] - offsets[i]))]
        if plan.packing is None:
            return [(i * plan.seq_len, plan.seq_len + 1)]
        packing, placed = plan.packing, slice(*plan.packing.bounds[i : i + 2])
        return [*zip(offsets[packing.documents[placed]].tolist(), packing.lengths[placed].tolist(), strict=True)]

    @property
    def _padding(self) -> dict[str, int]:
        special_ids = self.split.build.manifest["tokenizer"]["special_ids"]
        # in other chat formats id 0: what is never a target may be any token
        return {"input_ids": special_ids.get(NANOCHAT.padding, 0), "labels": IGNORED, "position_ids": 0}

    def collate(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        """A batch of items, padded on the right to the longest."""
        from torch.nn.utils.rnn import pad_sequence

        return {key: pad_sequence([item[key] for item in items], True, self._padding[key]) for key in items[0]}
