"""Load and save tokenizers: reads tokenizer.json, nanochat's tokenizer.pkl and .tiktoken; writes a tokenizer folder.

No pickle is ever executed: tokenizer.pkl goes through an unpickler that admits the one name `tiktoken.core.Encoding`,
and even that name only creates an object without code.
"""

from __future__ import annotations

import base64
import json
import pickle
from operator import itemgetter
from pathlib import Path
from typing import Any

from chatdata.errors import TokenizerError
from chatdata.tokenizer.bpe import Tokenizer, append_special_tokens

# OpenAI's GPT-2 pattern: what tokenizers' ByteLevel pre-tokenizer uses if it has to split, too
_GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


# byte → printable character, the byte-level alphabet of GPT-2 (openai/gpt-2:src/encoder.py)
_TO_CHAR = {byte: chr(byte) for byte in (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))}
_TO_CHAR |= {byte: chr(256 + i) for i, byte in enumerate(byte for byte in range(256) if byte not in _TO_CHAR)}
_TO_BYTE = {char: byte for byte, char in _TO_CHAR.items()}


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load a tokenizer from a build, a tokenizer folder, or a tokenizer.json, tokenizer.pkl or .tiktoken file.

    Raises TokenizerError if there is none or it cannot be used.
    """
    path = Path(path)
    if path.is_dir():
        candidates = [path / "tokenizer.json", path / "tokenizer" / "tokenizer.json", path / "tokenizer.pkl"]
        found = [candidate for candidate in candidates if candidate.is_file()]
        if not found:
            raise TokenizerError(f"{path}: no tokenizer.json, tokenizer/tokenizer.json or tokenizer.pkl in this folder")
        path = found[0]
    if not path.is_file():
        raise TokenizerError(f"{path}: no such tokenizer file or folder")
    readers = {".json": read_json, ".pkl": read_pickle, ".tiktoken": read_tiktoken}
    if path.suffix not in readers:
        raise TokenizerError(f"{path}: not a tokenizer; expected tokenizer.json, tokenizer.pkl or a .tiktoken file")
    return readers[path.suffix](path)


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja: the same bytes for the same tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    ranks = tokenizer.ranks
    by_id = sorted(ranks, key=ranks.__getitem__)
    vocab = {token.decode("latin-1").translate(_TO_CHAR): ranks[token] for token in by_id}
    model = {
        "type": "BPE",
        **dict.fromkeys(("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix")),
        **dict.fromkeys(("fuse_unk", "byte_fallback"), False),
        # tiktoken looks up a whole piece before it merges; so must tokenizers
        "ignore_merges": True,
        "vocab": vocab,
        "merges": _merges(vocab),
    }
    off = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = [
        {"id": token_id, "content": name, **off, "special": True}
        for name, token_id in sorted(tokenizer.special_ids.items(), key=itemgetter(1))
    ]
    split = {"type": "Split", "pattern": {"Regex": tokenizer.pattern}, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    contents = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": None,
        "decoder": byte_level,
        "model": model,
    }
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|bos|>",
        "eos_token": "<|assistant_end|>",
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    for name, text in (
        ("tokenizer.json", json.dumps(contents, ensure_ascii=False, separators=(",", ":"))),
        ("tokenizer_config.json", json.dumps(config, indent=1) + "\n"),
        ("chat_template.jinja", Path(__file__).with_name("chat_template.jinja").read_text(encoding="utf-8")),
    ):
        (folder / name).write_text(text, encoding="utf-8", newline="\n")


def _merges(vocab: dict[str, int]) -> list[tuple[str, str]]:
    """Pairs in merge order; `vocab` is in the order of its ids.

    tiktoken joins *any* two neighbours whose bytes are a token, so every split of a token into two tokens is a merge,
    not only the one it was trained with.
    """
    merges = []
    for token in vocab:
        lefts = [left for i in range(1, len(token)) if (left := token[:i]) in vocab and token[i:] in vocab]
        merges += [(left, token[len(left) :]) for left in sorted(lefts, key=vocab.__getitem__)]
    return merges


def read_json(path: Path) -> Tokenizer:
    """Read a `tokenizer.json` (byte-level BPE with one split pattern and the nine special tokens).

    Raises TokenizerError for anything whose ids tiktoken could not reproduce.
    """
    try:
        contents = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # also: a number of 5,000 digits, a thousand brackets
        raise TokenizerError(f"{path}: not valid JSON: {error}") from None
    try:
        model = contents["model"]
        if model.get("type") != "BPE" or model.get("byte_fallback") or model.get("unk_token"):
            raise TokenizerError(f"{path}: only byte-level BPE can be used, this is {model.get('type')!r}")
        unlike = [key for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix") if model.get(key)]
        if unlike:
            raise TokenizerError(
                f"{path}: its model has {unlike[0]} = {model[unlike[0]]!r}; tiktoken has no such setting"
            )
        if contents.get("normalizer") is not None:
            kind = contents["normalizer"].get("type")
            raise TokenizerError(f"{path}: its normalizer {kind!r} changes the text before encoding; tiktoken cannot")
        pattern = _split_pattern(contents.get("pre_tokenizer"), path)
        added = contents.get("added_tokens", [])
        matched = [token["content"] for token in added if not token.get("special")]
        if matched:
            raise TokenizerError(f"{path}: {matched[0]!r} is added but not special, so it is matched inside text")
        special_ids = {token["content"]: token["id"] for token in added}
        ranks = {_to_bytes(token, path): rank for token, rank in model["vocab"].items() if token not in special_ids}
        _check_merges(model["merges"], model["vocab"], bool(model.get("ignore_merges")), path)
    except (KeyError, TypeError, AttributeError) as error:
        raise TokenizerError(f"{path}: not a tokenizer.json: {type(error).__name__} {error}") from None
    return Tokenizer(ranks, pattern, special_ids, str(path))


def _split_pattern(pre_tokenizer: Any, path: Path) -> str:
    steps = (pre_tokenizer or {}).get("pretokenizers", [pre_tokenizer])
    splits = [step for step in steps if step and step["type"] == "Split"]
    for step in splits:
        if step.get("behavior") != "Isolated" or step.get("invert") or "Regex" not in step["pattern"]:
            raise TokenizerError(
                f"{path}: its Split must be Isolated, not inverted, with a Regex; tiktoken cannot do "
                f"{step.get('behavior')}"
            )
    patterns = [step["pattern"]["Regex"] for step in splits]
    byte_level = [step for step in steps if step and step["type"] == "ByteLevel"]
    if len(patterns) + len(byte_level) != len(steps) or len(byte_level) != 1 or byte_level[0]["add_prefix_space"]:
        raise TokenizerError(f"{path}: its pre-tokenizer is not one Split and ByteLevel; tiktoken cannot do the same")
    if byte_level[0].get("use_regex", True):
        patterns.append(_GPT2_PATTERN)
    if len(patterns) != 1:
        raise TokenizerError(f"{path}: its pre-tokenizer has {len(patterns)} split patterns; tiktoken takes one")
    return patterns[0]


def _check_merges(merges: list[Any], vocab: dict[str, int], ignore_merges: bool, path: Path) -> None:
    # ids become ranks, so the merges must be in the order of the ids they make, and make every longer token
    last, made = -1, set()
    for merge in merges:
        left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
        rank = vocab.get(left + right)
        if rank is None or rank < last:
            raise TokenizerError(f"{path}: merge {left!r} {right!r} is out of id order; tiktoken merges in id order")
        last = rank
        made.add(left + right)
    unmade = [token for token in vocab if len(token) > 1 and token not in made]
    unmade = [token for token in unmade if not (token.startswith("<|") and token.endswith("|>"))]
    if unmade and not ignore_merges:
        raise TokenizerError(f"{path}: no merge makes the token {unmade[0]!r}; tiktoken would use it all the same")


class _EncodingData:
    """Takes the state of a pickled tiktoken.Encoding as its attributes; nothing of tiktoken runs."""


class _EncodingUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("tiktoken.core", "Encoding"):
            return _EncodingData
        raise TokenizerError(f"names the class {module}.{name}; only tiktoken.core.Encoding is admitted")


def read_pickle(path: Path) -> Tokenizer:
    """Read nanochat's tokenizer.pkl (a pickled tiktoken.Encoding) without running any of it. Raises TokenizerError."""
    try:
        with path.open("rb") as file:
            state = vars(_EncodingUnpickler(file).load())
        ranks, pattern, special_ids = state["mergeable_ranks"], state["pat_str"], state["special_tokens"]
        plain = (
            isinstance(pattern, str)
            and all(type(token) is bytes and type(rank) is int for token, rank in ranks.items())
            and all(type(token) is str and type(rank) is int for token, rank in special_ids.items())
        )
        if not plain:
            raise TypeError("ranks or special tokens of another type")
    except TokenizerError as error:
        raise error.at(str(path)) from None
    except Exception as error:  # a crafted pickle can fail in any way
        raise TokenizerError(f"{path}: not a pickled tiktoken.core.Encoding: {type(error).__name__} {error}") from None
    return Tokenizer(ranks, pattern, special_ids, str(path))


def read_tiktoken(path: Path, pattern: str | None = None) -> Tokenizer:
    """Read a .tiktoken file (a line per token: base64, rank); the nine special tokens are appended.

    Such a file does not hold the split pattern: it is `pattern`, else the text of the file `<name>.pattern` next to it.
    Raises TokenizerError if there is no pattern, or for the first line that is not a token and its rank.
    """
    if pattern is None:
        pattern_file = path.with_suffix(".pattern")
        if not pattern_file.is_file():
            raise TokenizerError(
                f"{path}: a .tiktoken file does not hold its split pattern; put the pattern in {pattern_file.name} "
                "next to it or use `chatdata tokenizer import --pattern`"
            )
        pattern = pattern_file.read_text(encoding="utf-8").rstrip("\r\n")
    ranks = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            encoded, rank = line.split()
            token, token_id = base64.b64decode(encoded, validate=True), int(rank)
        except ValueError:
            raise TokenizerError(f"{path} line {number}: expected a base64 token and its rank") from None
        if token in ranks:
            raise TokenizerError(f"{path} line {number}: the token {token!r} is listed twice")
        ranks[token] = token_id
    return Tokenizer(ranks, pattern, append_special_tokens(ranks), str(path))


def _to_bytes(text: str, path: Path) -> bytes:
    try:
        return bytes(_TO_BYTE[char] for char in text)
    except KeyError:
        raise TokenizerError(f"{path}: token {text!r} is not in the byte-level alphabet") from None
