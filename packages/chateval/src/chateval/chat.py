"""Chat with a checkpoint in the terminal. Answers appear token by token, with tool calls and results in colour."""

import codecs
import contextlib
import signal
import sys
from collections.abc import Callable, Iterator, Sequence

import click

from chatdata.errors import printable
from chatdata.render.format import NANOCHAT
from chatdata.tokenizer.bpe import Tokenizer
from chateval.ask.generate import Prompt, Sampling, generate
from chateval.ask.subject import Subject

HELP = "/clear starts over, /help shows this line, /quit or Ctrl-D exits. Ctrl-C ends an answer."
CALL, RESULT = NANOCHAT.python, NANOCHAT.output
TOOL_MARKS = {CALL.opening: " ⟨", CALL.closing: "⟩", RESULT.opening: " → ", RESULT.closing: " "}


def converse(subject: Subject, sampling: Sampling, says: Sequence[str]) -> None:
    """Answer each of `says`, or each typed line; the whole conversation is the prompt of the next answer."""
    special = subject.tokenizer.special_ids
    history = [special[NANOCHAT.bos]]
    for number, text in enumerate(says or _typed()):
        if says:
            click.echo(click.style("you ", dim=True) + text)
        if text.startswith("/"):
            history = history[:1] if text == "/clear" else history
            click.echo("– a new conversation –" if text == "/clear" else HELP)
            continue
        user = NANOCHAT.user
        message = [special[user.opening], *subject.tokenizer.encode_ordinary(text), special[user.closing]]
        prompt = Prompt([*history, *message, special[NANOCHAT.assistant_start]], str(number), sampling)
        with contextlib.nullcontext([]) if says else _interrupts() as interrupts:
            ((_, completion),) = generate(subject, [prompt], _shower(subject.tokenizer, interrupts))
        click.echo()  # the bytes of an incomplete character are not shown
        if completion.ending == "context":
            click.echo(f"[the conversation fills the model's {subject.num_positions:,} positions: /clear starts over]")
        elif completion.ending == "max_tokens":
            click.echo(f"[cut at {sampling.max_new_tokens} tokens: --max-new-tokens]")
        history = [*prompt.tokens, *completion.tokens, special[NANOCHAT.assistant_end]]


@contextlib.contextmanager
def _interrupts() -> Iterator[list[int]]:
    """Ctrl-C adds to this list and raises nothing."""
    found: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: found.append(number))
    try:
        yield found
    finally:
        signal.signal(signal.SIGINT, before)


def _typed() -> Iterator[str]:
    """Typed lines, until the end of input or /quit."""
    if sys.stdin.isatty():
        import readline  # noqa: F401  (arrow keys and history in input())

        click.echo(HELP)
    with contextlib.suppress(EOFError):
        while (text := input("you " if sys.stdin.isatty() else "").strip()) != "/quit":
            if text:
                yield text


def _shower(tokenizer: Tokenizer, interrupts: Sequence[int]) -> Callable[[int, int, bool], bool]:
    """The on_token of `generate` that prints each token as soon as its bytes form characters.

    An interrupt ends the answer, whose tokens stay in the conversation.
    """
    names = {token: name for name, token in tokenizer.special_ids.items()}
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    colour: str | None = None

    def show(number: int, token: int, forced: bool) -> bool:
        nonlocal colour
        name = names.get(token)
        if name is None:
            text = printable(decoder.decode(tokenizer.token_bytes[token]))
            click.echo(click.style(text, fg=colour), nl=False)
        else:
            click.echo(click.style(TOOL_MARKS.get(name, name), fg="cyan", dim=True), nl=False)
            colour = {CALL.opening: "cyan", RESULT.opening: "green"}.get(name)
        return bool(interrupts)

    return show
