"""Read nanochat's tokenizer.pkl without running any of it.

It goes through an unpickler that admits the one name `tiktoken.core.Encoding`, and even that name only creates an
object without code. What it allocates is bounded by the size of the file.
"""

import io
import pickle
import pickletools
from pathlib import Path
from typing import Any

from chatdata.errors import TokenizerError
from chatdata.tokenizer.bpe import Tokenizer


class _EncodingData:
    """Takes the state of a pickled tiktoken.Encoding as its attributes; nothing of tiktoken runs."""


class _EncodingUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("tiktoken.core", "Encoding"):
            return _EncodingData
        raise TokenizerError(f"names the class {module}.{name}; only tiktoken.core.Encoding is admitted")


def _check_sizes(data: bytes) -> None:
    """Raise ValueError if an operation is longer than the file or numbers more objects than it can hold.

    The unpickler makes room before it reads: 10 bytes with object number 2^28 would take 4 GB. 0.06 s for nanochat's.
    """
    for operation, argument, at in pickletools.genops(data):
        if operation.name in ("PUT", "LONG_BINPUT") and not 0 <= (argument or 0) <= len(data):
            raise ValueError(f"byte {at} numbers more objects than the file has bytes")


def read_pickle(path: Path) -> Tokenizer:
    """Read nanochat's tokenizer.pkl (a pickled tiktoken.Encoding) without running any of it. Raises TokenizerError."""
    try:
        data = path.read_bytes()
        _check_sizes(data)
        state = vars(_EncodingUnpickler(io.BytesIO(data)).load())
        ranks, pattern, special_ids = state["mergeable_ranks"], state["pat_str"], state["special_tokens"]
        parts = ([pattern], str), (ranks, bytes), (ranks.values(), int), (special_ids, str), (special_ids.values(), int)
        if not all(set(map(type, part)) <= {kind} for part, kind in parts):
            raise TypeError("ranks or special tokens of another type")
    except TokenizerError as error:
        raise error.at(str(path)) from None
    except Exception as error:  # a crafted pickle can fail in any way
        reason = " ".join(str(error).split())
        raise TokenizerError(f"{path}: not a pickled tiktoken.core.Encoding: {type(error).__name__} {reason}") from None
    return Tokenizer(ranks, pattern, special_ids, str(path))
