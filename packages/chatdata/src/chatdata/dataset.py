"""A split as a `datasets.Dataset`, as TRL's SFTTrainer takes it, over the memory of the shards."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from chatdata.arrow import list_to_arrow, to_arrow
from chatdata.masks import apply_policy

if TYPE_CHECKING:
    from datasets import Dataset

    from chatdata.masks import MaskPolicy
    from chatdata.shards import Split

IGNORED = -100  # transformers' and TRL's label for no loss


def to_dataset(split: Split, policy: MaskPolicy = "supervised") -> Dataset:
    """One row per document: input_ids (uint16 or uint32), labels (int32), assistant_masks (uint8), lists of one length.

    labels are the ids where the mask under `policy` is 1 and -100 elsewhere, aligned with input_ids: transformers'
    models shift them. With them in place TRL (1.16) tokenizes and masks nothing of its own; without (older releases, or
    after `remove_columns("labels")`) it makes the same of assistant_masks. input_ids and, as stored, assistant_masks
    are the memory maps of the shards; labels take 4 bytes a token of memory. Raises PlanError for an unknown policy.
    """
    import pyarrow as pa
    from datasets import Dataset
    from datasets.table import InMemoryTable

    types = {
        "input_ids": pa.from_numpy_dtype(np.dtype(split.build.manifest["dtype"])),
        "labels": pa.int32(),
        "assistant_masks": pa.uint8(),
    }
    tables = [pa.schema([(name, pa.list_(kind)) for name, kind in types.items()]).empty_table()]
    first = 0
    for number, shard in enumerate(split.shards):
        tokens, stored, offsets = (split.map(kind, number) for kind in ("tokens", "mask", "offsets"))
        mask = apply_policy(split, policy, stored, np.array([first]), np.array([len(stored)]))
        labels = tokens.astype(np.int32)
        labels[mask == 0] = IGNORED
        columns = [list_to_arrow(to_arrow(values), np.diff(offsets)) for values in (tokens, labels, mask)]
        tables.append(pa.table(columns, names=list(types)))
        first += shard["tokens"]
    # without a name of its own the dataset would be named by a hash over all of its bytes
    name = f"{split.build.manifest['build_id'][:32]}-{split.name}-{policy}"
    return Dataset(InMemoryTable(pa.concat_tables(tables)), fingerprint=name)
