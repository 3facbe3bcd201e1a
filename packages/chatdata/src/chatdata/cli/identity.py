"""`chatdata identity`."""

from pathlib import Path

import click

from chatdata.cli.command import FILE, command, json_option, tell
from chatdata.errors import PersonaError


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
    lines = [
        f"{out}: {num_rows:,} conversations, {facts['answers']:,} answers, {facts['answers_with_name']:,} of them name "
        f"{loaded.name}; {facts['facts_told']} of {facts['facts']} facts used"
    ]
    if facts["languages_only_named"]:
        named, known = ", ".join(facts["languages_only_named"]), ", ".join(identity.known_languages().values())
        lines.append(f"only named, because they have no phrasings: {named} (phrasings exist for {known})")
    lines.append(f"this persona can give up to {facts['largest_rows']:,} different conversations")
    tell({"out": str(out), **facts}, lines, as_json)
