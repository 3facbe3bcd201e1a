"""Load a tokenizer from any accepted file or folder."""

from __future__ import annotations

from pathlib import Path

from chatdata.errors import TokenizerError
from chatdata.tokenizer.bpe import Tokenizer


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load a tokenizer from a build, a tokenizer folder, or a tokenizer.json, tokenizer.pkl or .tiktoken file.

    Raises TokenizerError if there is none or it cannot be used.
    """
    from chatdata.tokenizer import formats as tokenizer_files

    path = Path(path)
    if path.is_dir():
        candidates = [path / "tokenizer.json", path / "tokenizer" / "tokenizer.json", path / "tokenizer.pkl"]
        found = [candidate for candidate in candidates if candidate.is_file()]
        if not found:
            raise TokenizerError(f"{path}: no tokenizer.json, tokenizer/tokenizer.json or tokenizer.pkl in this folder")
        path = found[0]
    if not path.is_file():
        raise TokenizerError(f"{path}: no such tokenizer file or folder")
    if path.suffix == ".pkl":
        return tokenizer_files.read_pickle(path)
    if path.suffix == ".tiktoken":
        return tokenizer_files.read_tiktoken(path)
    if path.suffix == ".json":
        return tokenizer_files.read_json(path)
    raise TokenizerError(f"{path}: not a tokenizer; expected tokenizer.json, tokenizer.pkl or a .tiktoken file")
