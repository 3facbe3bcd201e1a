"""The calculator: evaluates the text of a `python` part, arithmetic and one form of `.count`.

    3*4 -> 12    100/8 -> 12.5    .1+.2 -> 0.3    1,000*2 -> 2000    10/3 -> 3.33333333333    'banana'.count('a') -> 3

The text comes from a model, so nothing is ever executed: three functions walk the grammar below, which has no names,
attributes, calls or containers. Spaces are allowed between tokens; digits are ASCII; a comma groups three digits.

    expression = sum | string ".count(" string ")"
    sum        = product (("+" | "-") product)*
    product    = operand (("*" | "/" | "//") operand)*
    operand    = ("+" | "-") operand | number | "(" sum ")"
    number     = 12 | 1,000 | 0.5 | .5 | 1,000.25
    string     = between two ' or two ", without that quote, backslash, line break or NUL

These are the forms in the 27,998 calls of GSM8K (train and test): 928 have a `.5`, 220 parentheses, 13 a sign, 2 `//`;
none has a comma, a space, "$", "%", "x", "**" or a second "=". Spaces and commas are accepted because models write
them.

Arithmetic is on exact fractions: 0.1+0.2 is 0.3 and 10/3*3 is 10. With binary floats 54 of those calls differ from the
recorded number: 1959.9999999999998 for 2.8*700.

Work is bounded by the text alone. Every literal is used once and there are no powers, so neither numerator nor
denominator ever has more digits than the expression has characters.
"""

import operator
import re
from collections import deque
from decimal import ROUND_HALF_EVEN, Context, Decimal
from fractions import Fraction
from typing import Literal, TypeAlias

from chatdata.errors import CalculatorError

MAX_CHARACTERS = 256  # the longest call in GSM8K has 30; below 640, where int() may start to refuse digits
MAX_DEPTH = 32  # open parentheses; the walk takes three Python frames for each

Number: TypeAlias = "int | Fraction"  # an int if it is a whole number: four times as fast
Agreement = Literal["equal", "format", "rounding", "different"]

_NUMBER = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+"
# What may not follow a number: with `1,00` or `1.2.3` the first digits alone would be another number.
_TOKEN = re.compile(rf" *((?:{_NUMBER})(?![0-9.,])|//|[-+*/()])")
_MISFIT = re.compile(r"[0-9.,]+|.", re.DOTALL)
_SIGNED_NUMBER = re.compile(rf"-?(?:{_NUMBER})")
_STRING = r"'([^'\\\n\r\0]*)'|\"([^\"\\\n\r\0]*)\""
_COUNT = re.compile(rf" *(?:{_STRING})\.count\((?:{_STRING})\) *")
_PLAIN = re.compile(r"([0-9]{1,8})([-+*/])([0-9]{1,8})")  # every result stays far below _LIMIT
_PLAIN_SUMS = {"+": operator.add, "-": operator.sub, "*": operator.mul}
_SUMS = {"+": operator.add, "-": operator.sub}
_PRODUCTS = {"*": operator.mul, "/": lambda a, b: Fraction(a) / b, "//": operator.floordiv}
_SMALLEST, _LIMIT = Decimal("1e-18"), Decimal("1e18")  # of results but 0, either sign; GSM8K's largest: 2,920,000,000
_TWELVE_DIGITS = Context(prec=12, rounding=ROUND_HALF_EVEN, traps=[])


def calculate(expression: str) -> str:
    """Result of one calculator call, the text of a `python_output` part.

    Integers are written in full, without ".0"; other results are rounded to 12 significant digits, without trailing
    zeros, with a 0 before the point, never with an exponent. `'text'.count('x')` counts as str.count
    does: code points, without overlap.
    Raises CalculatorError, and nothing else, for any other text; the message says what is wrong and where.
    """
    if len(expression) > MAX_CHARACTERS:
        raise CalculatorError(f"an expression has at most {MAX_CHARACTERS} characters, not {len(expression)}")
    if match := _PLAIN.fullmatch(expression):  # two thirds of GSM8K's calls, in a tenth of the time
        left, right = int(match[1]), int(match[3])
        if match[2] != "/":
            return str(_PLAIN_SUMS[match[2]](left, right))
        if right and left % right == 0:
            return str(left // right)
    if match := _COUNT.fullmatch(expression):
        text, counted = (group for group in match.groups() if group is not None)
        return str(text.count(counted))
    tokens = _tokens(expression)
    try:
        result = _sum(tokens, 0)
    except ZeroDivisionError:
        raise CalculatorError("division by zero") from None
    if tokens:
        raise CalculatorError(f"an operator must come before {tokens[0]!r}")
    return _format(result)


def compare_outputs(recorded: str, computed: str) -> Agreement:
    """How a recorded output agrees with the result of `calculate`.

    equal: the same text. format: the same number, written differently (`.50` and `0.5`, `1,000` and `1000`).
    rounding: the recorded number is the computed one rounded to as many decimals as were recorded, ties either way.
    different: anything else, also if one of them is not a number of the calculator's form or is too long.
    """
    if recorded == computed:
        return "equal"
    if not all(len(text) <= MAX_CHARACTERS and _SIGNED_NUMBER.fullmatch(text) for text in (recorded, computed)):
        return "different"
    difference = abs(Fraction(_number(recorded)) - _number(computed))
    if difference == 0:
        return "format"
    num_decimals = len(recorded.partition(".")[2])
    return "rounding" if difference <= Fraction(1, 2 * 10**num_decimals) else "different"


def _tokens(expression: str) -> deque[str]:
    tokens: deque[str] = deque()
    position, end = 0, len(expression.rstrip(" "))
    while position < end:
        match = _TOKEN.match(expression, position, end)
        if match is None:
            rest = expression[position:end].lstrip(" ")
            found = _MISFIT.findall(rest)[0]
            raise CalculatorError(
                f"character {end - len(rest) + 1}: {found!r} does not fit; an expression has numbers (12, 1,000, 0.5), "
                "+ - * / // ( ), or is 'text'.count('x')"
            )
        tokens.append(match[1])
        position = match.end()
    return tokens


def _sum(tokens: deque[str], depth: int) -> Number:
    result = _product(tokens, depth)
    while tokens and tokens[0] in _SUMS:
        operate = _SUMS[tokens.popleft()]
        result = operate(result, _product(tokens, depth))
    return result


def _product(tokens: deque[str], depth: int) -> Number:
    result = _operand(tokens, depth)
    while tokens and tokens[0] in _PRODUCTS:
        operate = _PRODUCTS[tokens.popleft()]
        result = operate(result, _operand(tokens, depth))
    return result


def _operand(tokens: deque[str], depth: int) -> Number:
    sign = 1
    while tokens and tokens[0] in _SUMS:  # a loop, not recursion: signs may be as many as the expression is long
        sign *= -1 if tokens.popleft() == "-" else 1
    if not tokens:
        raise CalculatorError("the expression ends where a number must come")
    token = tokens.popleft()
    if token == "(":
        if depth == MAX_DEPTH:
            raise CalculatorError(f"parentheses are nested deeper than {MAX_DEPTH}")
        result = _sum(tokens, depth + 1)
        if not tokens:
            raise CalculatorError("a parenthesis is not closed")
        if tokens[0] != ")":
            raise CalculatorError(f"an operator must come before {tokens[0]!r}")
        tokens.popleft()
        return sign * result
    if token == ")" or token in _PRODUCTS:
        raise CalculatorError(f"a number must come before {token!r}")
    return sign * _number(token)


def _number(text: str) -> Number:
    whole, _, decimals = text.replace(",", "").partition(".")
    return Fraction(int(whole + decimals), 10 ** len(decimals)) if decimals else int(whole)


def _format(result: Number) -> str:
    number = Decimal(result.numerator)
    if result.denominator > 1:
        number = _TWELVE_DIGITS.divide(number, Decimal(result.denominator))
    if number and not _SMALLEST <= number.copy_abs() < _LIMIT:  # copy_abs, because abs() rounds to the caller's context
        size = "small" if number.copy_abs() < _SMALLEST else "large"
        raise CalculatorError(f"the result is too {size}: results lie between {_SMALLEST:e} and {_LIMIT:e}")
    text = format(number, "f")
    return text.rstrip("0").rstrip(".") if "." in text else text
