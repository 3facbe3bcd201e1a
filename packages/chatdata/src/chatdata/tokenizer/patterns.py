r"""Split patterns that tiktoken (fancy-regex) and tokenizers (Oniguruma) read the same way, or after translation.

The grammar is what is known to mean the same to both; all else is refused. They differ in `\w`, `\h`, `\<`, `\xe9`,
`a{2}?`, `[a--b]`, `(?m)`, `\K`, in what `a(?i)b|c` ignores the case of, and Oniguruma's (?i:ss) also takes ß.

    pattern      alternatives with | between them; must not match the empty text
    item         a character, \n \r \t \f \v, \x41, \x{e9}, \u00e9, escaped punctuation; . \s \S \d \D \p{Lu} \P{Lu}
                 (any general category); [a-z\s\p{L}] [^a] (nothing nested, no && -- ~~); ^ $ \A \z;
                 (…) (?:…) (?>…) (?=…) (?!…) (?i:letters|letters)
    quantifier   ? * + {2} {2,} {2,3}, then perhaps ? (lazy, not after {2}) or + (possessive)

Three of these are translated. tiktoken's X{1,3}+ gives nothing back, Oniguruma's is X{1,3} again and again; tiktoken's
^ and $ are the ends of the text, Oniguruma's the ends of a line.
"""

import re
from typing import Literal, NamedTuple

Target = Literal["tokenizers", "tiktoken"]
MAX_DEPTH = 20
MAX_TIMES = 1_000  # that an item may be repeated, by nested counts together; what has no bound counts as more

_ESCAPED = r"\\[nrtfv]|\\x[0-7][0-9A-Fa-f]|\\x\{[0-9A-Fa-f]{1,6}\}|\\u[0-9A-Fa-f]{4}|\\[ !-/:;=?@\[-`{-~]"
_SET = r"\\[sSdD]|\\[pP]\{(?:L[ultmo]?|M[nce]?|N[dlo]?|P[cdseifo]?|S[mcko]?|Z[slp]?|C[cfo])\}"
_IN_CLASS = rf"(?:{_ESCAPED}|[^\\\[\]&~-]|&(?!&)|~(?!~))"
_CLASS = rf"\[\^?+(?!\])-?(?:{_SET}|{_IN_CLASS}(?:-{_IN_CLASS})?)*-?\]"
_LETTERS = r"(?:['A-Za-z]|\[['A-Za-z]+\])+"
_TOKEN = re.compile(
    rf"(?:(?P<one>{_ESCAPED}|{_SET}|{_CLASS}|[^\\\[\](){{}}|?*+^$])|(?P<fold>\(\?i:{_LETTERS}(?:\|{_LETTERS})*\))"
    r"|(?P<close>\)))(?:(?P<count>[?*+]|\{\d{1,3}(?:,\d{0,3})?\})(?P<kind>[?+]?))?"
    r"|(?P<open>\((?:\?[:>=!])?(?!\?))|(?P<bar>\|)|(?P<anchor>[\^$]|\\[Az])"
)
_LIGATURE = re.compile("ss|st|ff|fi|fl", re.IGNORECASE)  # spelled by one character, too
_ANCHORS = {"tokenizers": {"$": r"\z", "^": r"\A"}, "tiktoken": {"$": r"(?=\n|\z)"}}

# white space, and one or two characters of every general category, beyond Latin-1
_SAMPLES = "ĀāǅʰאΑ汉か\u0301ः\u20dd٣𝟘ⅷ㆒‿—„”‹›…∑₿˅☃🤖\u0600\ue000\u0378\U0010ffff\u180e\u200b\ufeff"
_SAMPLES += "\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u2028\u2029\u202f\u205f\u3000"
_CODE_POINT = re.compile(r"([^\x00-\x7f])|\\x\{(\w+)\}|\\u(\w{4})")


class _Part(NamedTuple):
    """A piece of a pattern.

    times: how often it repeats inside. one: it is a character or class with its count. simple: it does not look around,
    and if it takes a text of one character, then it takes that character in front of any other text, too.
    """

    text: str
    may_be_empty: bool = False
    times: int = 1
    simple: bool = False
    one: bool = False


def to_tokenizers(pattern: str) -> str:
    """tiktoken's pattern for a tokenizer.json. Raises ValueError, saying what both do not read the same way."""
    return "|".join(part.text for part in _read(pattern, "tokenizers"))


def to_tiktoken(pattern: str) -> str:
    """The pattern of a tokenizer.json for tiktoken. Raises ValueError as to_tokenizers does."""
    return "|".join(part.text for part in _read(pattern, "tiktoken"))


def covering(pattern: str) -> tuple[str, str]:
    """(the alternatives that take a character whatever is around it, characters of every kind that `pattern` knows).

    The alternatives are written for tokenizers, which tiktoken reads the same way.

    If every such character alone is matched by those alternatives, tiktoken loses no text.
    """
    codes = [ord(char) if char else int(x or u, 16) for char, x, u in _CODE_POINT.findall(pattern)]
    near = {code + i for code in codes for i in (-1, 0, 1)}  # where a range ends, the other side may be lost
    near = {code for code in near | set(range(256)) if 0 <= code < 0xD800 or 0xE000 <= code < 0x110000}
    alternatives = [part.text for part in _read(pattern, "tokenizers") if part.simple]
    return "|".join(alternatives), "".join(map(chr, sorted(near))) + _SAMPLES


def _read(pattern: str, target: Target) -> list[_Part]:
    """The alternatives of a pattern."""
    tokens, at = [], 0
    while at < len(pattern):
        tokens.append(_TOKEN.match(pattern, at) or _refuse(pattern, at))
        at = tokens[-1].end()
    tokens.reverse()
    alternatives = _alternatives(tokens, target, 0)
    if tokens:
        _refuse(pattern, tokens[-1].start())
    if any(part.may_be_empty for part in alternatives):
        raise ValueError("the split pattern can match the empty text; tiktoken fails on that")
    return alternatives


def _alternatives(tokens: list[re.Match[str]], target: Target, depth: int) -> list[_Part]:
    """Takes tokens, the last of the list first, up to the closing parenthesis or the end."""
    sequences: list[list[_Part]] = [[]]
    while tokens and not tokens[-1]["close"]:
        token = tokens.pop()
        if token["bar"]:
            sequences.append([])
        else:
            sequences[-1].append(_item(token, tokens, target, depth))
    return [
        _Part(
            "".join(part.text for part in parts),
            all(part.may_be_empty for part in parts),
            max((part.times for part in parts), default=1),
            all(part.simple for part in parts),
            len(parts) == 1 and parts[0].one,
        )
        for parts in sequences
    ]


def _item(token: re.Match[str], tokens: list[re.Match[str]], target: Target, depth: int) -> _Part:
    text = token["one"] or token["fold"]
    if token["anchor"]:
        if token[0] == "^" and target == "tiktoken":
            _refuse(token.string, token.start())
        return _Part(_ANCHORS[target].get(token[0], token[0]), may_be_empty=True)
    if token["open"]:
        inner = _alternatives(tokens, target, depth + 1) if depth < MAX_DEPTH else []
        if not tokens or not inner:
            _refuse(token.string, token.start())
        may_be_empty = token[0] in ("(?=", "(?!") or any(part.may_be_empty for part in inner)
        text = token[0] + "|".join(part.text for part in inner) + ")"
        is_simple = token[0] in ("(", "(?:") and all(part.simple for part in inner)
        is_simple |= token[0] == "(?>" and len(inner) == 1 and inner[0].one
        part = _Part(text, may_be_empty, max(part.times for part in inner), is_simple)
        return _quantified(part, tokens.pop(), target)
    if token["close"] or (token["fold"] and _LIGATURE.search(re.sub(r"\[\w+\]", "|", token["fold"]))):
        _refuse(token.string, token.start())
    return _quantified(_Part(text, simple=bool(token["one"]), one=bool(token["one"])), token, target)


def _quantified(part: _Part, token: re.Match[str], target: Target) -> _Part:
    """The part with the quantifier that the token ends in, if any."""
    count, kind = token["count"], token["kind"]
    if count is None:
        return part
    low, comma, high = {"?": "0,1", "*": "0,", "+": "1,"}.get(count, count.strip("{}")).partition(",")
    least, most = int(low), int(high or MAX_TIMES + 1) if comma else int(low)
    is_possessive_count = kind == "+" and count[0] == "{"
    is_again = is_possessive_count and target == "tiktoken"
    too_often = count != "?" and part.times * (most if high or not comma else 1) > MAX_TIMES
    is_lazy_number = kind == "?" and not comma
    is_open_again = is_again and (least == 0 or (comma and not high))
    if part.may_be_empty or most < max(least, 1) or too_often or is_lazy_number or is_open_again:
        _refuse(token.string, token.start("count"))
    text = part.text + count + kind
    if is_possessive_count:
        text = f"(?:{part.text}{count})+" if is_again else f"(?>{part.text}{count})"
    times = MAX_TIMES + 1 if is_again else part.times * most
    # a possessive group gives nothing back
    is_simple = part.one or (kind != "+" and (part.simple or least == 0))
    return _Part(text, least == 0, times, is_simple, part.one)


def _refuse(pattern: str, at: int) -> re.Match[str]:
    found = repr(pattern[at : at + 12]).replace(r"\\", "\\")
    doubt = "which tiktoken and tokenizers may read differently (docs/format.md says what both read the same way)"
    raise ValueError(f"the split pattern has {found} at character {at + 1}, {doubt}")
