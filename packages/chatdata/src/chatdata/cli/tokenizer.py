"""`chatdata tokenizer train | import | show`, and how every command finds its tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from chatdata.cli.command import FILE, examples
from chatdata.errors import UsageError

if TYPE_CHECKING:
    from chatdata.tokenizer.bpe import Tokenizer


def tokenizer_of(path: Path | None, demo: bool) -> Tokenizer:
    """The tokenizer at `path`, else with `demo` the demo's own, trained now. Raises UsageError, TokenizerError."""
    from chatdata.tokenizer.load import load_tokenizer

    if path is not None:
        return load_tokenizer(path)
    if demo:
        from chatdata.demo.tokenizer import demo_tokenizer

        return demo_tokenizer()
    raise UsageError(
        "no tokenizer given: pass --tokenizer with a tokenizer.json, nanochat's tokenizer.pkl, a .tiktoken "
        "file or a build; make one with `chatdata tokenizer train`; or use --demo, which trains its own"
    )


@click.group()
def tokenizer() -> None:
    """Train, import and look at tokenizers."""


@tokenizer.command(
    epilog=examples("chatdata tokenizer train texts.jsonl more.parquet --vocab-size 65536 --out tokenizer")
)
@click.argument("files", nargs=-1, required=True, type=FILE)
@click.option("--vocab-size", type=int, default=65_536, show_default=True, help="Entries, the nine specials included.")
@click.option("--pattern", help="Split pattern (default: nanochat's).")
@click.option("--out", type=FILE, required=True, help="Folder to write.")
def train(files: tuple[Path, ...], vocab_size: int, pattern: str | None, out: Path) -> None:
    """Train byte-level BPE on text, JSONL or Parquet files (conversations, or a text column). Deterministic."""
    from chatdata.sources.training_texts import read_texts
    from chatdata.tokenizer.bpe import SPLIT_PATTERN
    from chatdata.tokenizer.train import train_tokenizer

    _check_free(out)
    _save(train_tokenizer(read_texts(files), vocab_size, SPLIT_PATTERN if pattern is None else pattern), out)


@tokenizer.command(
    name="import",
    epilog=examples(
        "chatdata tokenizer import tokenizer.pkl --out tokenizer",
        "chatdata tokenizer import vocab.tiktoken --pattern '\\S+|\\s+' --out tokenizer",
    ),
)
@click.argument("file", type=FILE)
@click.option("--pattern", help="Split pattern of a .tiktoken file.")
@click.option("--out", type=FILE, required=True, help="Folder to write.")
def import_(file: Path, pattern: str | None, out: Path) -> None:
    """Convert tokenizer.pkl, tokenizer.json or .tiktoken to a tokenizer folder, checked."""
    from chatdata.tokenizer.formats import read_tiktoken

    if pattern is not None and file.suffix != ".tiktoken":
        raise UsageError("--pattern goes with a .tiktoken file; others hold their own")
    if pattern is not None and file.is_file():
        _save(read_tiktoken(file, pattern), out)
    else:
        _save(tokenizer_of(file, demo=False), out)


@tokenizer.command(epilog=examples("chatdata tokenizer show tokenizer", "chatdata tokenizer show out/mid --text 'Hi!'"))
@click.argument("path", type=FILE)
@click.option("--text", help="Show how this text is cut into tokens.")
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def show(path: Path, text: str | None, as_json: bool) -> None:
    """Entries, special tokens, split pattern, shard dtype; how a text is cut."""
    loaded = tokenizer_of(path, demo=False)
    facts: dict[str, Any] = {
        "vocab_size": loaded.vocab_size,
        "shards": "uint16" if loaded.dtype.itemsize == 2 else "uint32 (over 65,536 entries)",
        "pattern": loaded.pattern,
        "special_ids": loaded.special_ids,
        "canary_sha256": loaded.canary_sha256,
    }
    if text is not None:
        facts["tokens"] = [[i, loaded.decode_token(i)] for i in loaded.encode_ordinary(text)]
    if as_json:
        click.echo(json.dumps(facts, ensure_ascii=False))
        return
    for key, value in facts.items():
        if key == "tokens":
            value = " ".join(f"{piece!r}:{i}" for i, piece in value)
        elif isinstance(value, dict):
            value = "  ".join(f"{name} {i}" for name, i in value.items())
        click.echo(f"{key:14} {value}")


def _check_free(out: Path) -> None:
    from chatdata.errors import BuildError

    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise BuildError(f"{out}: already exists; choose another --out")


def _save(loaded: Tokenizer, out: Path) -> None:
    from chatdata.tokenizer.formats import save_tokenizer

    _check_free(out)
    save_tokenizer(loaded, out)
    width = "uint16" if loaded.dtype.itemsize == 2 else "uint32, because it exceeds 65,536 entries"
    click.echo(f"{out}: {loaded.vocab_size:,} entries (shards will be {width})")
