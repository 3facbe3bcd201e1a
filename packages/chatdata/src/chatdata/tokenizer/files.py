"""Load and save tokenizers: reads tokenizer.json, nanochat's tokenizer.pkl and .tiktoken; writes a tokenizer folder."""

import base64
import json
import re
from pathlib import Path
from typing import Any

from chatdata.errors import TokenizerError
from chatdata.tokenizer.bpe import Tokenizer, append_special_tokens
from chatdata.tokenizer.encoders import canary_texts
from chatdata.tokenizer.folder import FILES, FolderTokenizer
from chatdata.tokenizer.merges import TO_BYTE, TO_CHAR, ranks_of_merges
from chatdata.tokenizer.patterns import to_tiktoken
from chatdata.tokenizer.pickled import read_pickle

# OpenAI's GPT-2 pattern: what tokenizers' ByteLevel pre-tokenizer uses if it has to split, too
_GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# the same behind a Digits step: no piece continues past a numeral, and white space in front of one ends its piece
_BETWEEN_NUMERALS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"

_DELIMITER = re.compile(r"<.+>|\[.+\]", re.DOTALL)  # how added tokens look that ordinary text does not spell


def load_tokenizer(path: str | Path, *, native: bool = True) -> Tokenizer:
    """Load a tokenizer from a build, a tokenizer folder, or a tokenizer.json, tokenizer.pkl or .tiktoken file.

    native: it is for nanochat's chat format, so all nine special tokens must be there.
    Raises TokenizerError if there is none or it cannot be used.
    """
    path = Path(path)
    if path.is_dir():
        candidates = [path / "tokenizer.json", path / "tokenizer" / "tokenizer.json", path / "tokenizer.pkl"]
        if not (found := [candidate for candidate in candidates if candidate.is_file()]):
            hint = "; vocab.json and merges.txt do not say how to split text: save it with transformers' AutoTokenizer"
            absent = "no tokenizer.json, tokenizer/tokenizer.json or tokenizer.pkl in this folder"
            raise TokenizerError(f"{path}: {absent}{hint if (path / 'merges.txt').is_file() else ''}")
        path = found[0]
    if not path.is_file():
        raise TokenizerError(f"{path}: no such tokenizer file or folder")
    readers = {".json": read_json, ".pkl": read_pickle, ".tiktoken": read_tiktoken}
    if path.suffix not in readers:
        raise TokenizerError(f"{path}: not a tokenizer; expected tokenizer.json, tokenizer.pkl or a .tiktoken file")
    tokenizer = readers[path.suffix](path)
    if native and (missing := tokenizer.missing_special_tokens):
        raise TokenizerError(
            f"{path}: special tokens missing: {', '.join(missing)}; all nine must be in the tokenizer: "
            "`chatdata tokenizer import --add-specials` appends them, --chat-format does without"
        )
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja: the same bytes for the same tokenizer.

    A tokenizer without nanochat's special tokens gets no chat template, and no bos, eos and pad token in its
    configuration. The pad token is nanochat's padding. Documents contain it, too, so padding is known by position.
    The files of a FolderTokenizer are written as they are.
    Raises TokenizerError if `tokenizers` gives other ids for some canary text.
    """
    files = tokenizer.files if isinstance(tokenizer, FolderTokenizer) else _files(tokenizer)
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8", newline="")


def _files(tokenizer: Tokenizer) -> dict[str, str]:
    contents = json.dumps(_contents(tokenizer), ensure_ascii=False, separators=(",", ":"))
    if not tokenizer.is_as_saved:
        _compare_with_tokenizers(tokenizer, contents)
    shipped = {name: Path(__file__).with_name(name).read_text(encoding="utf-8") for name in FILES[1:]}
    if not tokenizer.missing_special_tokens:
        return {"tokenizer.json": contents, **shipped}
    config = json.loads(shipped["tokenizer_config.json"])
    plain = {key: value for key, value in config.items() if key not in ("bos_token", "eos_token", "pad_token")}
    return {"tokenizer.json": contents, "tokenizer_config.json": json.dumps(plain, indent=1) + "\n"}


def _contents(tokenizer: Tokenizer) -> dict[str, Any]:
    """What goes into tokenizer.json: `tokenizers` gives the tokenizer's ids for every text that it does not refuse."""
    contents: dict[str, Any] = json.loads(Path(__file__).with_name("blank_tokenizer.json").read_text(encoding="utf-8"))
    off = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    special = tokenizer.special_ids.items()  # in the order of their ids
    contents["added_tokens"] = [{"id": token_id, "content": name, **off, "special": True} for name, token_id in special]
    contents["normalizer"] = {"type": "NFC"} if tokenizer.nfc else None
    contents["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = tokenizer.pattern_of_tokenizers
    # tiktoken looks up a whole piece before it merges, so the model has ignore_merges
    contents["model"]["vocab"], contents["model"]["merges"] = tokenizer.spelled
    return contents


def _compare_with_tokenizers(tokenizer: Tokenizer, contents: str) -> None:
    """Encode the canary texts with `tokenizers`, too. contents: of a tokenizer.json."""
    import tokenizers

    try:
        theirs = tokenizers.Tokenizer.from_str(contents)
    except Exception as error:  # it raises no other kind
        raise TokenizerError(f"{tokenizer.name}: tokenizers cannot read it: {str(error).splitlines()[0]}") from None
    theirs.encode_special_tokens = True  # ordinary encoding: a spelled special token stays text
    theirs.no_truncation()
    theirs.no_padding()
    texts = canary_texts()
    for text, encoded in zip(texts, theirs.encode_batch(texts, add_special_tokens=False), strict=True):
        if encoded.ids != (ids := tokenizer.encode_ordinary(text)):
            found = f"{text[:60]!r}: {ids[:8]} and {encoded.ids[:8]}; it cannot be used"
            raise TokenizerError(f"{tokenizer.name}: tiktoken and tokenizers differ on the text {found}")


def read_json(path: Path) -> Tokenizer:
    """Read a `tokenizer.json`: byte-level BPE whose ids tiktoken gives for every text that spells no added token and
    has none of the bytes that the vocabulary lacks, if any.

    Raises TokenizerError for anything else: merges.py has the condition for vocabularies, patterns.py the one for split
    patterns, `_split_pattern` the pre-tokenizers. What comes after the model (a bos token, say) is ignored.
    """
    try:
        contents = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # also: a number of 5,000 digits, a thousand brackets
        raise TokenizerError(f"{path}: not valid JSON: {error}") from None
    try:
        model = contents["model"]
        if model.get("type") != "BPE" or model.get("byte_fallback"):
            raise ValueError(f"its model is {model.get('type')!r}, and not byte-level BPE")
        for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
            if model.get(key):
                raise ValueError(f"its model has {key} = {model[key]!r}")
        normalizer = contents.get("normalizer")
        if normalizer not in (None, {"type": "NFC"}):
            raise ValueError(f"its normalizer {normalizer.get('type')!r} changes the text; only NFC can be done")
        pattern = to_tiktoken(_split_pattern(contents.get("pre_tokenizer")))
        added = contents.get("added_tokens", [])
        for token in added:
            if not (token.get("special") or _DELIMITER.fullmatch(token["content"])):
                raise ValueError(f"{token['content']!r} is added but not special, so it is matched inside text")
            token["special"] = True
        special_ids = {token["content"]: token["id"] for token in added}
        # SmolLM2 lacks 21: tokenizers drops them in silence, tiktoken fails. Here they get ids behind all others.
        lacking = [char for char in map(TO_CHAR.__getitem__, range(256)) if char not in model["vocab"]]
        first = max(*model["vocab"].values(), *special_ids.values()) + 1 if lacking else 0
        model["vocab"] |= {char: first + i for i, char in enumerate(lacking)}
        vocab = {token: rank for token, rank in model["vocab"].items() if token not in special_ids}
        others = pattern, special_ids, str(path), normalizer is not None
        tokenizer = Tokenizer(_ranks_of(vocab, path), *others)
        model["merges"] = [tuple(merge.split(" ", 1) if isinstance(merge, str) else merge) for merge in model["merges"]]
        if contents == _contents(tokenizer):
            tokenizer.is_as_saved = True
            return tokenizer
        kept = ranks_of_merges(vocab, model["merges"], bool(model.get("ignore_merges")))
        if len(kept) < len(vocab):
            tokenizer = Tokenizer(_ranks_of(kept, path), *others)
        tokenizer.num_bytes_appended = len(lacking)
    except (KeyError, TypeError, AttributeError) as error:
        raise TokenizerError(f"{path}: not a tokenizer.json: {type(error).__name__} {error}") from None
    except TokenizerError:
        raise
    except ValueError as error:
        way_out = "tiktoken cannot give its ids, but `chatdata build --chat-format` can use it"
        raise TokenizerError(f"{path}: {error}; {way_out}") from None
    _compare_with_tokenizers(tokenizer, json.dumps(contents))
    return tokenizer


def _ranks_of(vocab: dict[str, int], path: Path) -> dict[bytes, int]:
    try:
        return {bytes(map(TO_BYTE.__getitem__, token)): rank for token, rank in vocab.items()}
    except KeyError:
        odd = next(token for token in vocab if not TO_BYTE.keys() >= set(token))
        raise TokenizerError(f"{path}: token {odd!r} is not in the byte-level alphabet") from None


def _split_pattern(pre_tokenizer: Any) -> str:
    """The pattern that cuts as a pre-tokenizer of this table does. Raises ValueError for any other."""
    pre_tokenizer = pre_tokenizer or {"type": "none"}
    steps = [{"use_regex": True, **step} for step in pre_tokenizer.get("pretokenizers", [pre_tokenizer])]
    match steps:
        case [{"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}]:
            return _GPT2_PATTERN
        case [
            {"type": "Split", "pattern": {"Regex": str(regex)}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
        ]:
            return regex
        case [
            {"type": "Digits", "individual_digits": bool(individual)},
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
        ]:
            return (r"\p{N}|" if individual else r"\p{N}+|") + _BETWEEN_NUMERALS
    known = "ByteLevel, Digits then ByteLevel, or Split (by a Regex, Isolated) then ByteLevel, without add_prefix_space"
    raise ValueError(f"its pre-tokenizer ({', '.join(step['type'] for step in steps)}) is not {known}")


def read_tiktoken(path: Path, pattern: str | None = None) -> Tokenizer:
    """Read a .tiktoken file (a line per token: base64, rank); the nine special tokens are appended.

    Such a file does not hold the split pattern: it is `pattern`, else the text of the file `<name>.pattern` next to it.
    Raises TokenizerError if there is no pattern, or for the first line that is not a token and its rank.
    """
    if pattern is None:
        pattern_file = path.with_suffix(".pattern")
        if not pattern_file.is_file():
            way_out = f"put the pattern in {pattern_file.name} next to it or use `chatdata tokenizer import --pattern`"
            raise TokenizerError(f"{path}: a .tiktoken file does not hold its split pattern; {way_out}")
        try:
            pattern = pattern_file.read_text(encoding="utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise TokenizerError(f"{pattern_file}: not UTF-8 at byte {error.start}") from None
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
