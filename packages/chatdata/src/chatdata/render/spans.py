"""The spans of the index against the tokens and the mask: all that is known of other chat formats than nanochat's."""

from collections.abc import Iterator, Mapping

import numpy as np

from chatdata.document import Span
from chatdata.render.format import NANOCHAT, REASONING, TEXT

SUPERVISED_ROLES = [role for role, form in enumerate(NANOCHAT.spans) if form.supervised]
WHOLE_DOCUMENT = -1  # a finding's position if it is about no single token
# file, kind, documents (int64 [n]), positions (int64 [n]); a document may come several times
Problem = tuple[str, str, np.ndarray, np.ndarray]


def check_spans(mask: np.ndarray, offsets: np.ndarray, index: Mapping[str, np.ndarray]) -> Iterator[Problem]:
    """Where spans are no spans, or a token has not mask 1 if and only if it is in a trained one."""
    num_documents = len(offsets) - 1
    document = np.repeat(np.arange(num_documents), index["num_spans"])
    role, start, length = (index[f"span_{key}"].astype(np.int64) for key in ("role", "start", "length"))
    trained, stop = index["span_trained"] != 0, start + length
    wrong = (length <= 0) | (stop > np.diff(offsets)[document])
    wrong[1:] |= (document[1:] == document[:-1]) & (start[1:] < stop[:-1])
    for kind, chosen in (
        ("spans overlap or leave their document", wrong),
        ("a span is trained, but not the assistant's", trained & ~np.isin(role, SUPERVISED_ROLES)),
    ):
        yield whole("index", kind, np.bincount(document[chosen], minlength=num_documents) > 0)
    places = np.flatnonzero((mask <= 1) & (mask != inside(offsets, index, np.flatnonzero(trained))))
    documents = np.searchsorted(offsets, places, side="right") - 1
    yield "mask", "mask differs from the spans that are trained", documents, places - offsets[documents]


def differing_spans(expected: np.ndarray, index: Mapping[str, np.ndarray], broken: np.ndarray) -> np.ndarray:
    """bool [documents]: the spans of the index are not the `expected` ones.

    expected: int64 [4, spans], document, role, start and length. broken: bool [documents] whose spans are not compared.
    Text and reasoning cannot be told apart in the tokens, so neighbouring spans of these count as one.
    """
    num_documents = len(broken)
    document = np.repeat(np.arange(num_documents), index["num_spans"])
    found = np.stack([document, *(index[f"span_{key}"].astype(np.int64) for key in ("role", "start", "length"))])
    found[1][found[1] == REASONING] = TEXT
    strange = (found[3] == 0) | ((index["span_trained"] != 0) & ~np.isin(found[1], SUPERVISED_ROLES))
    wrong = np.bincount(document[strange], minlength=num_documents) > 0
    before, after = found[:, :-1], found[:, 1:]
    continues = (after[0] == before[0]) & (after[1] == TEXT) & (before[1] == TEXT) & (after[2] == before[2] + before[3])
    firsts = np.flatnonzero(np.concatenate([[True], ~continues])[: len(document)])
    found = np.stack([*found[:3, firsts], np.add.reduceat(found[3], firsts)])
    # documents with another number of spans are wrong; the others are compared span by span
    same_number = np.bincount(found[0], minlength=num_documents) == np.bincount(expected[0], minlength=num_documents)
    wrong |= ~same_number
    found, expected = (spans[:, (same_number & ~broken)[spans[0]]] for spans in (found, expected))
    wrong[found[0][(found != expected).any(axis=0)]] = True
    return wrong


def inside(offsets: np.ndarray, index: Mapping[str, np.ndarray], chosen: np.ndarray) -> np.ndarray:
    """bool [tokens]: whether a token is in one of the `chosen` spans of the index (int64, their numbers)."""
    stops = offsets[1:]
    document = np.repeat(np.arange(len(stops)), index["num_spans"])[chosen]
    starts = offsets[document] + index["span_start"][chosen]
    edges = np.zeros(int(offsets[-1]) + 1, dtype=np.int64)
    np.add.at(edges, np.minimum(starts, stops[document]), 1)
    np.add.at(edges, np.minimum(starts + index["span_length"][chosen], stops[document]), -1)
    return np.cumsum(edges[:-1]) > 0


def untrained(offsets: np.ndarray, index: Mapping[str, np.ndarray]) -> np.ndarray:
    """bool [tokens]: whether a token is in a span of the assistant that is not trained."""
    of_assistant = np.isin(index["span_role"], SUPERVISED_ROLES)
    return inside(offsets, index, np.flatnonzero((index["span_trained"] == 0) & of_assistant))


def untrained_index(spans: np.ndarray, num_spans: np.ndarray, untrained_turns: np.ndarray) -> dict[str, np.ndarray]:
    """The columns of an index that say which tokens are not trained. spans: SPAN_DTYPE [sum of num_spans]."""
    columns = {f"span_{name}": spans[name] for name in Span._fields}
    return {"num_spans": num_spans, "untrained_turns": untrained_turns, **columns}


def whole(file: str, kind: str, wrong: np.ndarray) -> Problem:
    """A problem of whole documents: wrong is bool [documents]."""
    documents = np.flatnonzero(wrong)
    return file, kind, documents, np.full(len(documents), WHOLE_DOCUMENT)


def first_of_each(documents: np.ndarray, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each document once, ascending, with its first position."""
    order = np.lexsort([positions, documents])
    documents, first = np.unique(documents[order], return_index=True)
    return documents, positions[order][first]
