"""The calculator: literals in, literals out; then fuzz, and a replay of every recorded call."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from decimal import Context, Inexact, localcontext
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from chatdata.calculator import MAX_CHARACTERS, MAX_DEPTH, calculate, compare_outputs
from chatdata.errors import CalculatorError, ChatdataError
from chatdata.tasks import demo_math, gsm8k, spelling_bee


@pytest.mark.parametrize(
    ("expression", "result"),
    [
        ("3*4", "12"),
        ("12+30", "42"),
        ("100/8", "12.5"),
        ("1,000*2", "2000"),
        ("7", "7"),
        # exact, where binary floats are not
        ("0.1+0.2", "0.3"),
        ("2.8*700", "1960"),
        ("2+2+2+1/3+1/3+1/3", "7"),
        ("10/3*3", "10"),
        ("33/.55", "60"),
        # order of operations, as in Python
        ("2+3*4", "14"),
        ("10-3-2", "5"),
        ("2-3+4", "3"),
        ("48/4/2", "6"),
        ("48/4*2", "24"),
        ("7*9//2", "31"),
        ("(2+3)*4", "20"),
        ("2*(3+(4-1))*2", "24"),
        ("((5))", "5"),
        # signs
        ("71+-3", "68"),
        ("-14+-8+1", "-21"),
        ("-18/-2", "9"),
        ("2--3", "5"),
        ("--5", "5"),
        ("+5-+3", "2"),
        ("-(2+3)", "-5"),
        ("-2*-(1)", "2"),
        # floor division rounds down
        ("560//10", "56"),
        ("7//2", "3"),
        ("-7//2", "-4"),
        ("7.5//2", "3"),
        ("-(7//2)", "-3"),
        # forms of numbers
        (".5", "0.5"),
        ("2-.5", "1.5"),
        ("1.50", "1.5"),
        ("10.0", "10"),
        ("100", "100"),
        ("007", "7"),
        ("12,345,678+0", "12345678"),
        ("1,000.25*4", "4001"),
        (" 12 +  30 ", "42"),
        ("( 1 + 2 ) // 2", "1"),
        # no zero is negative, no integer has a point, nothing has an exponent
        ("-0", "0"),
        ("0*-5", "0"),
        ("0.0", "0"),
        ("2.5*4", "10"),
        ("1000000*1000000", "1000000000000"),
        ("123456789*987654321", "121932631112635269"),
        ("999999999999999999", "999999999999999999"),
        ("-999999999*1000000001", "-999999999999999999"),
        # 12 significant digits
        ("10/3", "3.33333333333"),
        ("2/3", "0.666666666667"),
        ("-2/3", "-0.666666666667"),
        ("200000/3", "66666.6666667"),
        ("1/3000", "0.000333333333333"),
        ("1/1000000000000000000", "0.000000000000000001"),
        ("1/1000000000000000001", "0.000000000000000001"),
        ("0.1999999999999999", "0.2"),
        ("0.9999999999999", "1"),
        ("1234567890123.4", "1234567890120"),
        ("99999999999999999.5", "100000000000000000"),
        ("0.1234567890125", "0.123456789012"),  # a tie goes to the even digit
        ("0.1234567890135", "0.123456789014"),
        # bounds lie on the intermediate size of nothing: only the result counts
        ("10000000000*10000000000/10000000000", "10000000000"),
    ],
)
def test_arithmetic(expression: str, result: str) -> None:
    assert calculate(expression) == result


@pytest.mark.parametrize(
    ("expression", "result"),
    [
        ("'banana'.count('a')", "3"),
        ('"banana".count("an")', "2"),
        ("'banana'.count(\"n\")", "2"),
        ("'banana'.count('x')", "0"),
        ("  'banana'.count('b') ", "1"),
        ("'aaa'.count('aa')", "1"),  # without overlap
        ("'Banana'.count('b')", "0"),
        ('"it\'s".count("\'")', "1"),
        ("'1+1'.count('1')", "2"),
        ("'naïve café'.count('é')", "1"),
        ("'字字典'.count('字')", "2"),
        ("'👍🏽👍'.count('👍')", "2"),
        ("'\ud800a'.count('\ud800')", "1"),
        ("'abc'.count('')", "4"),
        ("''.count('a')", "0"),
    ],
)
def test_count(expression: str, result: str) -> None:
    assert calculate(expression) == result


REFUSED = r"""
__import__('os').system('x')
().__class__.__bases__
9**9**9**9
2**3
'a'*10**9
'a'*3
'a'+'b'
'a'
('a').count('a')
'a'.count('a')+1
1+'a'.count('a')
'a'.count.__self__
'a'.count
'a'.count()
'a'.count(a)
'a'.count(1)
'a'.count('a', 0)
"a".count("a", 0)
'a'.count( 'a')
'a' .count('a')
'a'.count('a').real
'a'.upper()
'a'.__class__
'a'.count('a')x
'a'a'.count('a')
'a'.count('a''b')
'a' 'b'.count('a')
'it's'.count('s')
'a\n'.count('a')
'\x61'.count('a')
'\u0061'.count('a')
'a\'.count('a')
'a\'b'.count('a')
'a.count('a')
'a".count('a')
'''a'''.count('a')
b'a'.count(b'a')
r'a'.count('a')
f'{1+1}'.count('2')
f"{().__class__}"
'%s'%1
{'a'}.count('a')
['a'].count('a')
1e999999
1e5
0x10
0b1
0o7
1_000
1j
1.
5.+1
1.2.3
1..2
.
..5
1,00
1,0000
1000,000
,100
1,000,
1,000.5,0
1,2
.5,000
True
None
nan
inf
Infinity
x
two
pi
abs(1)
int('1')
open('/etc/passwd')
exec("1")
lambda: 1
(lambda: 1)()
[1 for _ in (1,)]
{}
[]
(1,2)
(x:=1)
x:=1
1 if 1 else 2
1 and 2
not 1
1<2
1==1
1=1
3*4=12
3*4=
1&1
1|1
1^1
~1
1<<9
1>>1
7%2
50%
$5
€5
5 dollars
2x3
2^3
1;1
1 2
1 .5
2(3)
(2)3
(2)(3)
1+
*1
/2
1*/2
1***2
1///2
1+*2
1-/2
()
(
)
(1
1)
(1+)
(1))
((1)
)(
1/0
1//0
1/(2-2)
0/0
1#2
@1
`1`
\
_
__builtins__
...
"""


@pytest.mark.parametrize(
    "expression",
    [
        *REFUSED.strip().split("\n"),
        "\u0663+\u0664",  # Arabic-Indic digits
        "\uff13*\uff14",  # full-width digits
        "1\uff0b1",  # full-width plus
        "\u00b2",  # superscript two
        "\u00bd",  # one half
        "1\u22121",  # minus sign
        "1\u20131",  # en dash
        "2\u00d73",
        "6\u00f72",
        "1\u00a0+1",  # no-break space
        "1\u200b+1",  # zero-width space
        "\u2019a\u2019.count(\u2019a\u2019)",  # typographic quotes
        "",
        " ",
        "1\n",
        "\n1",
        "1\t+1",
        "1\r\n+1",
        "1+\x001",
        "1\x00",
        "\ufeff1",
        "\ud800",
        "1+\udc80",
        "'a\n'.count('a')",
        "'a\0'.count('a')",
        "'a'.count('\r')",
        "'a'.count('a')\n",
        "1000000000000000000",
        "-1000000000*1000000000",
        "999999999999999999.5",  # would print as 10^18
        "1/2000000000000000000",
        "." + "0" * 18 + "1",
    ],
)
def test_everything_else_is_refused(expression: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(CalculatorError) as error:
        calculate(expression)
    reason = str(error.value)
    assert reason and reason.isprintable()  # one line, whatever the model wrote
    assert isinstance(error.value, ChatdataError)
    assert capfd.readouterr() == ("", "")  # no SyntaxWarning either


@pytest.mark.parametrize(
    ("expression", "reason"),
    [
        ("", "the expression ends where a number must come"),
        ("3*", "the expression ends where a number must come"),
        ("3*)", "a number must come before ')'"),
        ("3*/4", "a number must come before '/'"),
        ("3 4", "an operator must come before '4'"),
        ("(3(4))", "an operator must come before '('"),
        ("3)", "an operator must come before ')'"),
        ("(3", "a parenthesis is not closed"),
        ("3/(1-1)", "division by zero"),
        (
            "3 *  x",
            "character 6: 'x' does not fit; an expression has numbers (12, 1,000, 0.5), + - * / // ( ), "
            "or is 'text'.count('x')",
        ),
        (
            "2+1,00*3",
            "character 3: '1,00' does not fit; an expression has numbers (12, 1,000, 0.5), + - * / // ( ), "
            "or is 'text'.count('x')",
        ),
        ("9" * 19, "the result is too large: results lie between 1e-18 and 1e+18"),
        ("1/" + "9" * 19, "the result is too small: results lie between 1e-18 and 1e+18"),
        ("1+" * 200, "an expression has at most 256 characters, not 400"),
        ("(" * 33 + "1" + ")" * 33, "parentheses are nested deeper than 32"),
    ],
)
def test_reasons(expression: str, reason: str) -> None:
    with pytest.raises(CalculatorError) as error:
        calculate(expression)
    assert str(error.value) == reason


def test_bounds_are_where_they_are_said_to_be() -> None:
    assert calculate("(" * MAX_DEPTH + "1" + ")" * MAX_DEPTH) == "1"
    assert calculate("-" * (MAX_CHARACTERS - 1) + "1") == "-1"
    assert calculate("0" * (MAX_CHARACTERS - 1) + "1") == "1"
    assert calculate("'" + "a" * (MAX_CHARACTERS - 13) + "'.count('a')") == str(MAX_CHARACTERS - 13)
    assert calculate(" ".join("1" * 10).replace(" ", "+") + " " * (MAX_CHARACTERS - 19)) == "10"
    largest = "9" * 127
    assert calculate(f"{largest}/{largest}") == "1"


def test_the_callers_decimal_context_does_not_matter() -> None:
    with localcontext(Context(prec=3, traps=[Inexact])):
        assert calculate("999999999999999999") == "999999999999999999"
        assert calculate("-10/3") == "-3.33333333333"


@pytest.mark.parametrize(
    "expression",
    [
        "1" * 10_000_000,
        "(" * 100_000,
        "(" * 100_000 + "1" + ")" * 100_000,
        "-" * 1_000_000,
        " " * 10_000_000,
        "'" * 1_000_000,
        "'" + "a" * 10_000_000 + "'.count('a')",
        "\ud800" * 1_000_000,
        "(" * 256,
        "1/" * 128,
        "'" * 256,
    ],
    ids=range(11),
)
def test_long_and_deep_texts_are_refused(expression: str) -> None:
    with pytest.raises(CalculatorError):
        calculate(expression)


# fuzz


@settings(max_examples=500, deadline=None)
@given(
    st.text(max_size=300) | st.text("0123456789.,+-*/() '\"acount\\", max_size=40) | st.text("12.,+-*/()", max_size=12)
)
@example("1,000,000")
def test_any_text_gives_a_result_or_a_calculator_error(text: str) -> None:
    try:
        result = calculate(text)
    except CalculatorError as error:
        assert str(error).isprintable()
    else:
        assert re.fullmatch(r"-?(0|[1-9][0-9]*)(\.[0-9]*[1-9])?", result) and result != "-0"
        assert calculate(result) == result  # a result read back is itself


class Drawn(NamedTuple):
    """An expression and its value, made together; None where it divides by zero."""

    text: str
    value: Fraction | None
    binding: int  # 0 a sum, 1 a product, 2 an operand


def number(whole: int, decimals: str, form: str) -> Drawn:
    text = f"{whole:,}" if form == "commas" else str(whole)
    if form == "bare point" and decimals:
        whole, text = 0, ""
    return Drawn(text + ("." + decimals if decimals else ""), Fraction(f"{whole}.{decimals or 0}"), 2)


def binary(left: Drawn, sign: str, right: Drawn, space: str) -> Drawn:
    level = 0 if sign in "+-" else 1
    a, b = left.value, right.value
    if a is None or b is None or (sign in ("/", "//") and b == 0):
        value = None
    else:
        value = {
            "+": lambda: a + b,
            "-": lambda: a - b,
            "*": lambda: a * b,
            "/": lambda: a / b,
            "//": lambda: Fraction((a / b).__floor__()),
        }[sign]()
    text = f"{within(left, level)}{space}{sign}{space}{within(right, level + 1)}"
    return Drawn(text, value, level)


def negative(operand: Drawn) -> Drawn:
    return Drawn("-" + within(operand, 2), None if operand.value is None else -operand.value, 2)


def within(drawn: Drawn, level: int) -> str:
    return drawn.text if drawn.binding >= level else f"({drawn.text})"


NUMBERS = st.builds(
    number,
    st.integers(0, 12) | st.integers(0, 10**7),
    st.sampled_from(["", "", "5", "25", "10"]) | st.text("0123456789", max_size=4),
    st.sampled_from(["plain", "commas", "bare point"]),
)
EXPRESSIONS = st.recursive(
    NUMBERS,
    lambda inner: (
        st.builds(binary, inner, st.sampled_from(["+", "-", "*", "/", "//"]), inner, st.sampled_from(["", " "]))
        | st.builds(negative, inner)
        | inner.map(lambda drawn: Drawn(f"({drawn.text})", drawn.value, 2))
    ),
    max_leaves=12,
)


@settings(max_examples=500, deadline=None)
@given(EXPRESSIONS)
def test_expressions_equal_their_values(drawn: Drawn) -> None:
    value = drawn.value
    in_bounds = value is not None and (value == 0 or Fraction(1, 10**18) <= abs(value) < 10**18)
    if value is None or not in_bounds or len(drawn.text) > MAX_CHARACTERS:
        with pytest.raises(CalculatorError):
            calculate(drawn.text)
        return
    # the bound that stands in for limits on intermediate numbers
    assert max(len(str(abs(value.numerator))), len(str(value.denominator))) <= len(drawn.text)
    result = calculate(drawn.text)
    if value.denominator == 1:
        assert result == str(value.numerator)
        return
    digits = result.lstrip("-").replace(".", "").strip("0")
    assert "e" not in result and len(digits) <= 12
    magnitude = 0  # 10^magnitude <= |value| < 10^(magnitude + 1)
    while abs(value) >= Fraction(10) ** (magnitude + 1):
        magnitude += 1
    while abs(value) < Fraction(10) ** magnitude:
        magnitude -= 1
    assert abs(Fraction(result) - value) <= Fraction(10) ** (magnitude - 11) / 2


@given(
    st.text(st.characters(exclude_characters="'\\\n\r\0"), max_size=100),
    st.text(st.characters(exclude_characters='"\\\n\r\0'), max_size=3),
)
def test_counts_are_those_of_python(text: str, counted: str) -> None:
    assert calculate(f"'{text}'.count(\"{counted}\")") == str(text.count(counted))


# recorded outputs


@pytest.mark.parametrize(
    ("recorded", "computed", "agreement"),
    [
        ("12", "12", "equal"),
        ("3/4", "3/4", "equal"),
        ("10.0", "10", "format"),
        (".5", "0.5", "format"),
        ("0.50", "0.5", "format"),
        ("1,000", "1000", "format"),
        ("-0", "0", "format"),
        ("05", "5", "format"),
        ("3.33", "3.33333333333", "rounding"),
        ("3", "3.33333333333", "rounding"),
        (".67", "0.666666666667", "rounding"),
        ("-.67", "-0.666666666667", "rounding"),
        ("2", "2.5", "rounding"),
        ("3", "2.5", "rounding"),
        ("3.0", "3.33333333333", "different"),
        ("3.34", "3.33333333333", "different"),
        ("0.66", "0.666666666667", "different"),  # cut, not rounded
        ("12", "13", "different"),
        ("5", "-5", "different"),
        ("3.33333333333", "3.33", "different"),
        ("3/4", "0.75", "different"),
        ("", "0", "different"),
        (" 12", "12", "different"),
        ("1e1", "10", "different"),
        ("٣", "3", "different"),
        ("9" * 10_000, "1", "different"),
        ("1", "division by zero", "different"),
    ],
)
def test_compare_outputs(recorded: str, computed: str, agreement: str) -> None:
    assert compare_outputs(recorded, computed) == agreement


def replay(conversations: Iterable[dict[str, Any]]) -> Counter[str]:
    """Every tool call worked out again, counted by how the recorded output agrees."""
    agreements: Counter[str] = Counter()
    for conversation in conversations:
        parts = conversation["messages"][1]["content"]
        for call, output in pairwise(parts):
            if call["type"] == "python":
                agreements[compare_outputs(output["text"], calculate(call["text"]))] += 1
    return agreements


@pytest.mark.parametrize(
    ("split", "expected"),
    [("train", {"equal": 23_049, "format": 667}), ("test", {"equal": 4_126, "format": 155, "different": 1})],
)
def test_replay_gsm8k(shared: Path, split: str, expected: dict[str, int]) -> None:
    """The one call that differs is 3/4, recorded as "3/4"; written differently are 144.00, 4.80, .4 and the like."""
    table = pq.read_table(shared / "data" / "hub" / "openai" / "gsm8k" / "main" / f"{split}-00000-of-00001.parquet")
    assert replay(map(gsm8k.to_conversation, table.to_pylist())) == expected


@pytest.mark.parametrize("split", ["train", "test"])
def test_replay_spelling_bee(shared: Path, split: str) -> None:
    words = shared / "data" / "words_alpha.txt"
    make_row = spelling_bee.generate(split, {"words": words, "holdout": True, "phrasings": spelling_bee.PHRASINGS})
    assert replay(spelling_bee.to_conversation(make_row(i)) for i in range(2_000)) == {"equal": 2_000}


@pytest.mark.parametrize("split", ["train", "test"])
def test_replay_demo_math(split: str) -> None:
    make_row = demo_math.generate(split, {})
    agreements = replay(demo_math.to_conversation(make_row(i)) for i in range(2_000))
    assert set(agreements) == {"equal"} and agreements["equal"] >= 2_000
