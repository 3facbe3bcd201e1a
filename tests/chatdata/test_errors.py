from __future__ import annotations

import pytest

from chatdata.errors import general


@pytest.mark.parametrize(
    ("reason", "alike"),
    [
        ("not valid JSON at column 17: Expecting value", "not valid JSON at column N: Expecting value"),
        ("message 3, key \"role\": unknown role 'b; 1'; valid: user", "message N, key \"role\": unknown role '…'"),
        ("key \"notes\" is ShareGPT's, not Alpaca's", "key \"notes\" is ShareGPT's, not Alpaca's"),
    ],
)
def test_a_reason_without_what_differs(reason: str, alike: str) -> None:
    assert general(reason) == alike
