"""What training on a build would look like, in numbers, before any GPU hour: `chatdata plan`.

The numbers come from `plan_epoch`, which chattrain trains on. Shapes as in packing/epoch.py.
"""

from typing import Any, get_args

import numpy as np
from rich.markup import escape

from chatdata.errors import PackingError, PlanError
from chatdata.look.console import console, share, table
from chatdata.packing import epoch
from chatdata.packing.epoch import Layout, TrainingPlan
from chatdata.packing.layouts import Long
from chatdata.shards.masks import MaskPolicy, check_policy
from chatdata.shards.read import Build, Split

WHAT_IF_LENGTHS = (512, 1024, 2048, 4096, 8192)


def plan_numbers(
    build: Build,
    seq_len: int,
    batch_size: int = 8,
    split: str = "train",
    mask: str | None = None,
    long: Long = "error",
    seed: int = 42,
) -> dict[str, Any]:
    """The plan at `seq_len` and the what-if table, for all layouts: plain data, printed by `chatdata plan --json`.

    batch_size: G, sequences of a step (B · ranks in chattrain). mask: by default the stage's. Failed plans are reported
    as {"refused": why}. Raises PlanError for arguments out of range.
    """
    if split not in build.splits:
        raise PlanError(f"{build.path} has no split {split!r}; it has {', '.join(build.splits)}")
    stage, use = build.manifest["stage"], check_policy(mask or epoch.STAGE_MASKS[build.manifest["stage"]])
    settings: dict[str, Any] = {"seq_len": seq_len, "batch_size": batch_size, "mask": use, "long": long, "seed": seed}
    return {
        "build_id": build.manifest["build_id"],
        "stage": stage,
        "stage_rows": epoch.STAGE_LAYOUTS[stage],
        "split": split,
        "documents": len(build[split]),
        "tokens": build[split].num_tokens,
        **settings,
        "plans": {layout: _plan(build[split], layout, **settings) for layout in get_args(Layout)},
        "what_if": what_if(build[split], use, batch_size, seed),
    }


def what_if(
    split: Split, mask: MaskPolicy, batch_size: int, seed: int, seq_lens: tuple[int, ...] = WHAT_IF_LENGTHS
) -> list[dict[str, Any]]:
    """One record per length and layout, over all sequences of an epoch, including those that do not fill a step.

    documents_cut: documents whose targets are not all in one sequence: stream splits them, pack and pad cut or drop
        them (`--long`). Apart from supervised_lost_if_dropped, pack and pad are counted with --long truncate.
    supervised_lost: supervised tokens that are not targets, because they were cut or are in stream's tail. If the mask
        is ignored, supervised means supervised by the stored mask.
    filled, efficiency: input tokens and targets ÷ positions; 0 for no sequences. A batch of layout pad is as wide as
        its longest sequence.
    """
    lengths, applied = np.diff(split.offsets), mask if mask != "ignore" else "apply"
    longest = int(lengths.max(initial=1))
    *supervised, whole = epoch.document_targets(split, applied, *seq_lens, longest)
    records = []
    for seq_len, kept in zip(seq_lens, supervised, strict=True):
        num_targets = np.maximum(np.minimum(lengths, seq_len + 1) - 1, 0) if mask == "ignore" else kept
        too_long = lengths > seq_len + 1
        for layout in get_args(Layout):
            # a sequence a step, so that none is left over
            plan = epoch.plan_epoch(split, layout, mask, seq_len, 1, seed, "truncate", num_targets, may_be_empty=True)
            input_tokens, targets = int(plan.tokens_per_step.sum()), int(plan.targets_per_step.sum())
            positions = _positions(plan, batch_size)
            if layout == "stream":
                tail = split.mask(min(plan.num_steps * seq_len + 1, split.num_tokens), split.num_tokens, applied)
                num_cut, lost = _num_split(split.offsets, seq_len), int(np.count_nonzero(tail))
            else:
                num_cut, lost = int(np.count_nonzero(too_long)), int((whole - kept).sum())
            dropped = lost if layout == "stream" else int(whole[too_long].sum())
            record = {"seq_len": seq_len, "rows": layout, "sequences": plan.num_steps, "documents_cut": num_cut}
            record |= {"supervised_lost": lost, "supervised_lost_if_dropped": dropped}
            record |= {"positions": positions, "padding": positions - input_tokens, "targets": targets}
            shares = (("filled", input_tokens), ("efficiency", targets))
            records.append(record | {name: round(part / max(positions, 1), 4) for name, part in shares})
    return records


def _plan(split: Split, layout: Layout, batch_size: int, **settings: Any) -> dict[str, Any]:
    """The counts that chattrain's dry run prints as "plan", with positions, padding, and targets of a step."""
    try:
        plan = epoch.plan_epoch(split, layout=layout, step_sequences=batch_size, **settings)
    except (PackingError, PlanError) as error:
        return {"refused": str(error)}
    positions, counts, per_step = _positions(plan, batch_size), plan.counts(), plan.targets_per_step
    targets = {"min": int(per_step.min()), "mean": round(float(per_step.mean()), 1), "max": int(per_step.max())}
    padding = positions - counts["input_tokens"]
    return {**counts, "positions": positions, "padding": padding, "targets_per_step": targets}


def _positions(plan: TrainingPlan, batch_size: int) -> int:
    """Positions of the steps' sequences, padding included; a batch of pad is as wide as its longest sequence."""
    num_sequences = plan.num_steps * plan.step_sequences
    if plan.packing is None or plan.layout == "pack" or not num_sequences:
        return num_sequences * plan.seq_len
    firsts = np.arange(0, num_sequences, batch_size)
    widths = np.maximum.reduceat(plan.packing.lengths[:num_sequences], firsts) - 1  # pad: one document per sequence
    return int((widths * np.diff(firsts, append=num_sequences)).sum())


def _num_split(offsets: np.ndarray, seq_len: int) -> int:
    """Documents whose targets are in more than one sequence of a stream, or partly in its tail."""
    first, last = offsets[:-1] + 1, offsets[1:] - 1  # its own targets: the first token is a target of the one before
    return int(np.count_nonzero((last > first) & ((first - 1) // seq_len != (last - 1) // seq_len)))


def show_plan(numbers: dict[str, Any]) -> None:
    """Print what `plan_numbers` found: the plan at its T, what is left out, and the what-if table."""
    data = "stage {stage} (layout {stage_rows}), {split}: {documents:,} documents, {tokens:,} tokens"
    console().print((data + " · mask {mask} · {batch_size:,} × {seq_len:,} positions a step").format(**numbers))
    listed, left_out = [], []
    for layout, found in numbers["plans"].items():
        if "refused" in found:
            left_out.append(f"{layout}: {escape(found['refused'])}")
            continue
        per_step = found["targets_per_step"]
        cells = [found[key] for key in ("steps", "sequences", "input_tokens", "targets")]
        cells += [f"{per_step['mean']:,.1f}", per_step["min"], per_step["max"], found["padding"]]
        listed.append((layout, *cells, share(found["padding"], found["positions"])))
        left = [f"{value:,} {name.replace('_', ' ')}" for name, value in found["left_out"].items() if value]
        left_out.append(f"{layout}, left out: {', '.join(left) or 'nothing'}")
    if listed:
        steps = ("targets/step", "least", "most")
        table("\nan epoch", ("layout", "steps", "sequences", "input tokens", "targets", *steps, "padding", ""), listed)
    console().print("\n".join(left_out))
    cut, lost = ("documents cut", ""), ("supervised lost", "if dropped")
    columns = ("T", "layout", "sequences", *cut, *lost, "padding", "filled", "targets/position")
    listed = []
    for row in numbers["what_if"]:
        dropped = row["supervised_lost_if_dropped"] if row["rows"] != "stream" else "–"
        cells = [f"{row['seq_len']:,}", row["rows"], row["sequences"], row["documents_cut"]]
        cells += [share(row["documents_cut"], numbers["documents"]), row["supervised_lost"], dropped, row["padding"]]
        listed.append((*cells, f"{100 * row['filled']:.1f}%", f"{100 * row['efficiency']:.1f}%"))
    title = "\nwhat if (pack and pad with --long truncate; stream splits documents and loses only its tail)"
    table(title, columns, listed)
