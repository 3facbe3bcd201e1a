"""Commands that make what a build reads: `chatdata tokenizer train | import | show`, `chatdata identity`."""

from pathlib import Path
from typing import Any

import click

from chatdata.cli.command import FILE, Group, command, json_option, tell, tokenizer_of
from chatdata.disk import check_free
from chatdata.errors import PersonaError, UsageError
from chatdata.progress import say


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
    words = facts | {"special_ids": "  ".join(f"{name} {i}" for name, i in loaded.special_ids.items())}
    if text is not None:
        facts["tokens"] = [[i, loaded.decode_token(i)] for i in loaded.encode_ordinary(text)]
        words["tokens"] = " ".join(f"{piece!r}:{i}" for i, piece in facts["tokens"])
    tell(facts, [f"{key:14} {value}" for key, value in words.items()], as_json)


def _save(loaded: Any, out: Path) -> None:
    from chatdata.look.console import shard_dtype
    from chatdata.tokenizer.files import save_tokenizer

    check_free(out)
    save_tokenizer(loaded, out)
    say(f"{out}: {loaded.vocab_size:,} tokens, shards will be {shard_dtype(loaded.dtype.name)}")


@command(name="identity")
@click.argument("persona", metavar="PERSONA", type=FILE)
@click.option("--out", type=FILE, required=True, help="JSONL file to write.")
@click.option("--rows", "num_rows", type=click.IntRange(min=1), default=1000, help="How many.")
@click.option("--force", is_flag=True, help="Replace OUT if it exists.")
@json_option
def identity_command(persona: Path, out: Path, num_rows: int, force: bool, as_json: bool) -> None:
    """Write conversations in which the assistant says who it is.

    PERSONA is a small TOML file:

    \b
    name = "Pebble"                          # required; the rest is optional
    description = "a tiny demo chat model"   # completes "I am …"
    maker = "the chatdata project"           # completes "I was made by …"
    licence = "MIT"                          # completes "My licence is …"
    languages = ["English", "Spanish"]
    facts = [
        "I was trained on a laptop in minutes.",
        { question = "How big are you?", answer = ["I am tiny.", "I have a million parameters."] },
    ]

    All conversations are different. The same persona gives the same conversations on every machine, and a longer file
    starts with the shorter one.

    Examples:
      chatdata identity me.toml --out me.jsonl
      chatdata identity me.toml --rows 5000 --out me.jsonl --force
      chatdata build --stage mid --identity me.jsonl --tokenizer tokenizer.pkl --out out/mid
    """
    from chatdata.identity import conversations as identity
    from chatdata.identity.persona import load_persona

    identity.check_target(out, force)
    loaded = load_persona(persona)
    try:
        conversations = identity.identity_conversations(loaded, num_rows)
    except PersonaError as error:
        raise error.at(str(persona)) from None
    identity.write_conversations(conversations, out)
    facts = identity.identity_facts(loaded, conversations)
    counts = "{rows:,} conversations, {answers:,} answers, {answers_with_name:,} of them name".format(**facts)
    lines = [f"{out}: {counts} {loaded.name}; {facts['facts_told']} of {facts['facts']} facts used"]
    if facts["languages_only_named"]:
        named, known = ", ".join(facts["languages_only_named"]), ", ".join(identity.known_languages().values())
        lines.append(f"only named, because they have no phrasings: {named} (phrasings exist for {known})")
    lines.append(f"this persona can give up to {facts['largest_rows']:,} different conversations")
    tell({"out": str(out), **facts}, lines, as_json)
