"""`chatdata build --dry-run`: about how many tokens, bytes and seconds a build will take, from a sample of its rows."""

import time
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from chatdata.build.plan import BuildPlan, number_documents
from chatdata.build.units import FAST_ENCODER_BYTES, Renderer, Unit, load_encoder, read_unit, render_unit
from chatdata.render.documents import RenderedDocuments
from chatdata.sources.source import Source, forget_readers

SAMPLE_ROWS, RUNS = 1_000, 10  # of each source, in runs of neighbours that are spread over it
CACHE_BYTES, OUT_BYTES = 130, 45  # of a document, without tokens and mask (docs/building.md)
FIXED_S = 1.5  # imports, tokenizer, encoder, scored items
TOKENS_PER_S = 5e6  # after rendering: the search for scored items, and writing


def estimate(plan: BuildPlan, workers: int, encoder: str = "auto") -> dict[str, Any]:
    """`tokens`, `output_bytes`, `cache_bytes`, `seconds` of a build with an empty cache; by split, tokens per entry.

    Renders SAMPLE_ROWS rows of each source and applies the recipe's policies to them. Raises the
    errors of a build for rows of the sample.
    """
    row_maps, dtype = number_documents(plan), plan.tokenizer.dtype
    token_bytes = dtype.itemsize + 1
    kept_tokens: dict[Source, float] = {}  # of a row, after the policies
    cache_bytes = seconds = num_kept = 0.0
    with TemporaryDirectory() as folder:
        num_bytes = sum(num_bytes for source in row_maps for _, num_bytes in source.segments(source.num_rows))
        if encoder == "auto" and num_bytes < FAST_ENCODER_BYTES:
            encoder = "tiktoken"
        renderer = Renderer(plan.sources, plan.tokenizer, encoder, Path(folder), plan.recipe.chat_format)
        if not plan.model_format:
            load_encoder(encoder, plan.tokenizer)
        for number, (source, row_map) in enumerate(row_maps.items()):
            rows = np.flatnonzero(row_map.document_of >= 0)
            sample = _sample(rows)
            units = [
                Unit(number, int(part[0]), np.isin(np.arange(part[0], part[-1] + 1), part), len(part), 0, f"sample-{i}")
                for i, part in enumerate(sample)
            ]
            started = time.perf_counter()
            for unit in units:  # a build does not start to read RUNS times: this time is left out
                for _ in source.read_batches(unit.first, unit.wanted):
                    pass
            read = time.perf_counter()
            paths = [render_unit(renderer, unit).path for unit in units]
            rendering = time.perf_counter() - read - (read - started)
            seconds += max(rendering, 0) * len(rows) / sum(map(len, sample))
            batches = [batch for path in paths for batch in read_unit(path, dtype)]
            documents = RenderedDocuments(batches, plan.recipe, partial(_place, source, np.concatenate(sample)))
            kept = documents.drop_reason == 0
            kept_tokens[source] = float(documents.num_tokens[kept].sum(dtype=np.int64)) / len(kept)
            num_taken = sum(len(p.taken) for entries in plan.splits.values() for p in entries if p.source is source)
            num_kept += num_taken * float(kept.mean())
            cache_bytes += len(rows) * (float(documents.original_tokens.mean()) * token_bytes + CACHE_BYTES)
    forget_readers()
    splits = {name: [round(len(e.taken) * kept_tokens[e.source]) for e in of] for name, of in plan.splits.items()}
    tokens = sum(map(sum, splits.values()))
    return {
        "tokens": tokens,
        "output_bytes": round(tokens * token_bytes + num_kept * OUT_BYTES),
        "cache_bytes": round(cache_bytes),
        "seconds": round(FIXED_S + seconds / workers + tokens / TOKENS_PER_S, 1),
        **splits,
    }


def _place(source: Source, rows: np.ndarray, document: int) -> str:
    return source.where(int(rows[document]))


def _sample(rows: np.ndarray) -> list[np.ndarray]:
    """Runs of neighbours, at most SAMPLE_ROWS in all."""
    if len(rows) <= SAMPLE_ROWS:
        return [rows]
    length = SAMPLE_ROWS // RUNS
    return [rows[first : first + length] for first in np.linspace(0, len(rows) - length, RUNS).astype(int).tolist()]
