"""`chatdata tokenizer train | import | show`."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from chatdata.cli.command import FILE, Group, json_option, tell, tokenizer_of
from chatdata.disk import check_free
from chatdata.errors import UsageError
from chatdata.progress import say

if TYPE_CHECKING:
    from chatdata.tokenizer.bpe import Tokenizer


@click.group(cls=Group)
def tokenizer() -> None:
    """Train, import and show tokenizers."""


@tokenizer.command()
@click.argument("files", nargs=-1, required=True, type=FILE)
@click.option("--vocab-size", type=int, default=65_536, help="Tokens, the nine special ones included.")
@click.option("--pattern", help="Split pattern (default: nanochat's).")
@click.option("--out", type=FILE, required=True, help="Folder to write.")
def train(files: tuple[Path, ...], vocab_size: int, pattern: str | None, out: Path) -> None:
    """Train byte-level BPE on text, JSONL or Parquet files of conversations or plain text. Deterministic.

    Examples:
      chatdata tokenizer train texts.jsonl more.parquet --vocab-size 65536 --out tokenizer
    """
    from chatdata.sources.training_texts import read_texts
    from chatdata.tokenizer.bpe import SPLIT_PATTERN, train_tokenizer

    check_free(out)
    _save(train_tokenizer(read_texts(files), vocab_size, SPLIT_PATTERN if pattern is None else pattern), out)


@tokenizer.command(name="import")
@click.argument("file", type=FILE)
@click.option("--pattern", help="Split pattern of a .tiktoken file.")
@click.option("--add-specials", is_flag=True, help="Append nanochat's special tokens after the highest id.")
@click.option("--out", type=FILE, required=True, help="Folder to write.")
def import_(file: Path, pattern: str | None, add_specials: bool, out: Path) -> None:
    """Check a tokenizer.pkl, tokenizer.json, .tiktoken file or folder and convert it to a tokenizer folder.

    Examples:
      chatdata tokenizer import tokenizer.pkl --out tokenizer
      chatdata tokenizer import vocab.tiktoken --pattern '\\S+|\\s+' --out tokenizer
      chatdata tokenizer import Qwen3-0.6B --add-specials --out tokenizer
    """
    from chatdata.tokenizer.bpe import Tokenizer, append_special_tokens
    from chatdata.tokenizer.files import read_tiktoken

    if pattern is not None and file.suffix != ".tiktoken":
        raise UsageError("--pattern goes with a .tiktoken file; others hold their own")
    loaded = tokenizer_of(file, native=not add_specials) if pattern is None else read_tiktoken(file, pattern)
    if count := loaded.num_bytes_appended:
        say(f"{file} has no token for {count} of the 256 single bytes; appended after its highest id")
    if add_specials and loaded.missing_special_tokens:
        special_ids = append_special_tokens(loaded.ranks, loaded.special_ids)
        loaded = Tokenizer(loaded.ranks, loaded.pattern, special_ids, loaded.name, loaded.nfc)
    _save(loaded, out)


@tokenizer.command()
@click.argument("path", type=FILE)
@click.option("--text", help="Show the tokens of this text.")
@json_option
def show(path: Path, text: str | None, as_json: bool) -> None:
    """Print vocabulary size, special tokens, split pattern and shard dtype; with --text, the tokens of a text.

    Examples:
      chatdata tokenizer show tokenizer
      chatdata tokenizer show out/mid --text 'Hi!'
    """
    from chatdata.look.console import shard_dtype

    loaded = tokenizer_of(path, native=False)
    facts: dict[str, Any] = {"vocab_size": loaded.vocab_size, "shards": shard_dtype(loaded.dtype.name)}
    facts |= {key: getattr(loaded, key) for key in ("pattern", "nfc", "special_ids", "canary_sha256")}
    if text is not None:
        facts["tokens"] = [[i, loaded.decode_token(i)] for i in loaded.encode_ordinary(text)]
    words = facts | {"special_ids": "  ".join(f"{name} {i}" for name, i in loaded.special_ids.items())}
    if text is not None:
        words["tokens"] = " ".join(f"{piece!r}:{i}" for i, piece in facts["tokens"])
    tell(facts, [f"{key:14} {value}" for key, value in words.items()], as_json)


def _save(loaded: "Tokenizer", out: Path) -> None:
    from chatdata.look.console import shard_dtype
    from chatdata.tokenizer.files import save_tokenizer

    check_free(out)
    save_tokenizer(loaded, out)
    say(f"{out}: {loaded.vocab_size:,} tokens, shards will be {shard_dtype(loaded.dtype.name)}")
