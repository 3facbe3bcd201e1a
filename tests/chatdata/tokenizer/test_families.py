"""Tokenizers of other families: small ones with their real settings give the ids that `tokenizers` gives."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import models, normalizers, pre_tokenizers, processors, trainers

from chatdata import load_tokenizer
from chatdata.errors import TokenizerError
from chatdata.tokenizer.bpe import SPECIAL_TOKENS, SPLIT_PATTERN, Tokenizer, append_special_tokens
from chatdata.tokenizer.encoders import canary_texts, find_encoder
from chatdata.tokenizer.files import save_tokenizer
from chatdata.tokenizer.merges import spell

# the patterns in the tokenizer.json of Llama 3 and of Qwen 2 and 3
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|" + _REST
QWEN = LLAMA3.replace("{1,3}", "")


def byte_level(use_regex: bool) -> pre_tokenizers.ByteLevel:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)


def split(pattern: str) -> pre_tokenizers.Sequence:
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Split(tokenizers.Regex(pattern), behavior="isolated"), byte_level(False)]
    )


def digits(individual: bool) -> pre_tokenizers.Sequence:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=individual), byte_level(True)])


PRE_TOKENIZERS = {
    "gpt2": byte_level(True),
    "llama3": split(LLAMA3),
    "qwen": split(QWEN),
    "smollm2": digits(True),
    "runs of digits": digits(False),
}
TEXTS = [
    "It's what we'd said: they'll weigh 12, 345 and 6789 apples, isn't it? WE'LL see, I'VE said so.",
    "  for i in range(100):\n\t\tprint(i ** 2, 'x' * 30)\n\n\n    return None  \r\n",
    "Die Größe der Straße, naïve café, cafe\u0301, 한국어 한국말, 漢字 漢文 仮名, Ελλάδα, Москва.",
    "The cat and the hat sat on the mat, and then the rat ran to the other cat.",
]


def trained(family: str) -> tokenizers.Tokenizer:
    """A tokenizer with a family's settings, its special tokens where the family has them."""
    tokenizer = tokenizers.Tokenizer(models.BPE(ignore_merges=family == "llama3"))
    tokenizer.pre_tokenizer = PRE_TOKENIZERS[family]
    first = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>"] if family == "smollm2" else []
    if family == "qwen":
        tokenizer.normalizer = normalizers.NFC()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=first, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXTS * 8, trainer)
    if family == "gpt2":
        tokenizer.add_special_tokens(["<|endoftext|>"])
    if family == "llama3":
        tokenizer.add_special_tokens(["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"])
        tokenizer.add_special_tokens([f"<|reserved_special_token_{i}|>" for i in range(8)])
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 400)]
        )
    if family == "qwen":
        tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
        tokenizer.add_tokens(["<tool_call>", "</tool_call>", "<think>", "</think>"])
    return tokenizer


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("families")
    for family in PRE_TOKENIZERS:
        (root / family).mkdir()
        trained(family).save(str(root / family / "tokenizer.json"))
        (root / family / "tokenizer_config.json").write_text('{"add_bos_token": true}')
    return root


@pytest.fixture(scope="module")
def pairs(folders: Path) -> dict[str, tuple[Tokenizer, tokenizers.Tokenizer]]:
    return {
        family: (
            load_tokenizer(folders / family, native=False),
            tokenizers.Tokenizer.from_file(str(folders / family / "tokenizer.json")),
        )
        for family in PRE_TOKENIZERS
    }


_ATOMS = [*"  \n\r\t'aAsStTe1239.-!<|½٣ⅷé가漢🤖\0\xa0\u2028\u3000\u200d", " the", "'S", "'ll", "'ſ", "e\u0301"]
_ATOMS += [*"\u0327\u0344\u0958\u212b\u1100\u1161\u11a8"]
_TEXTS = st.lists(st.sampled_from(_ATOMS), max_size=16).map("".join) | st.text(max_size=30)


@pytest.mark.parametrize("family", PRE_TOKENIZERS)
@settings(max_examples=300, deadline=None)
@given(text=_TEXTS)
def test_ids_equal(pairs: dict, family: str, text: str) -> None:
    ours, theirs = pairs[family]
    assume(not any(token in text for token in ours.special_ids))
    assert ours.encode_ordinary(text) == theirs.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("family", PRE_TOKENIZERS)
def test_what_is_saved_gives_the_same_ids(pairs: dict, family: str, tmp_path: Path) -> None:
    ours, theirs = pairs[family]
    save_tokenizer(ours, tmp_path)
    again = load_tokenizer(tmp_path, native=False)
    assert again.is_as_saved and (again.sha256, again.special_ids) == (ours.sha256, ours.special_ids)
    saved = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    texts = [*TEXTS, "cafe\u0301 12345  67\n", "x" * 20_000 + "\u0301", "don't 1st  2nd", *canary_texts()[:3]]
    for text in texts:
        ids = theirs.encode(text, add_special_tokens=False).ids
        for tokenizer in (again, pickle.loads(pickle.dumps(ours))):
            assert tokenizer.encode_ordinary(text) == tokenizer.encode_batch([text])[0].tolist() == ids
        assert saved.encode(text, add_special_tokens=False).ids == ids


def test_the_special_tokens_that_were_there(pairs: dict) -> None:
    assert pairs["gpt2"][0].special_ids == {"<|endoftext|>": 400}
    assert pairs["llama3"][0].special_ids["<|reserved_special_token_7|>"] == pairs["llama3"][0].vocab_size - 1 == 410
    assert pairs["smollm2"][0].special_ids["<repo_name>"] == 3 and pairs["smollm2"][0].vocab_size == 400
    ours, theirs = pairs["qwen"]
    assert ours.special_ids["<think>"] == 405
    # equality is for texts that spell no added token: here such a text stays text
    assert theirs.encode("<think>").ids == [405]
    assert len(ours.encode_ordinary("<think>")) > 1 and ours.decode([405]) == "<think>"


def test_the_page_has_the_patterns(pairs: dict) -> None:
    page = (Path(__file__).parents[3] / "docs" / "format.md").read_text(encoding="utf-8")
    assert f"    ByteLevel            {pairs['gpt2'][0].pattern}\n" in page
    assert f"    Digits, ByteLevel    {pairs['smollm2'][0].pattern}\n" in page
    assert pairs["runs of digits"][0].pattern == pairs["smollm2"][0].pattern.replace(r"\p{N}|", r"\p{N}+|", 1)
    assert (pairs["llama3"][0].pattern, pairs["qwen"][0].pattern) == (LLAMA3, QWEN)


def sweep(pre_tokenizer: pre_tokenizers.PreTokenizer, tmp_path: Path) -> list[int]:
    """Code points that tiktoken splits in other places."""
    # all pairs of bytes are tokens, so that another cut gives other ids
    tokens = [bytes([byte]) for byte in range(256)] + [bytes([a, b]) for a in range(256) for b in range(256)]
    vocab = {spell(token): i for i, token in enumerate(tokens)}
    theirs = tokenizers.Tokenizer(models.BPE(vocab, [(token[0], token[1]) for token in vocab if len(token) == 2]))
    theirs.pre_tokenizer = pre_tokenizer
    theirs.save(str(tmp_path / "tokenizer.json"))
    ours = load_tokenizer(tmp_path, native=False)

    def text(code_points: range) -> str:
        return "".join(f"a{c}1{c}{c} " for c in map(chr, code_points) if not "\ud800" <= c <= "\udfff")

    # all planes that have characters; of the rest, unassigned or private, one block in 16
    blocks = [range(i, i + 256) for i in range(0, 0x110000, 256) if i < 0x40000 or i >> 16 == 14 or i % 4096 == 0]
    texts = [text(block) for block in blocks]
    found = []
    for block, whole, encoded in zip(blocks, texts, theirs.encode_batch(texts), strict=True):
        if encoded.ids != ours.encode_ordinary(whole):
            one_by_one = [(c, text(range(c, c + 1))) for c in block]
            found += [c for c, one in one_by_one if theirs.encode(one).ids != ours.encode_ordinary(one)]
    return found


def test_every_code_point_but_13_numerals_behind_digits(tmp_path: Path) -> None:
    # Unicode 17's numerals: known to the Rust of tokenizers 0.23 (Digits), not to either regex engine; what the engines
    # know, which is all that the other families need, test_patterns.py compares
    assert sweep(PRE_TOKENIZERS["smollm2"], tmp_path) == [*range(0x11DE0, 0x11DEA), *range(0x16FF4, 0x16FF7)]


def test_nfc_is_only_looked_up_where_it_can_change_something(monkeypatch: pytest.MonkeyPatch) -> None:
    below = "".join(map(chr, range(0x300)))
    assert normalizers.NFC().normalize_str(below) == below
    assert all(normalizers.NFC().normalize_str(a + b) == a + b for a in below for b in "aé\u02ff")
    qwen = Tokenizer({bytes([i]): i for i in range(256)}, QWEN, {}, "qwen", nfc=True)
    assert qwen.normalized("e\u0301\ud800") == "é\ufffd"
    assert qwen.encode_ordinary("e\u0301") == [0xC3, 0xA9]
    monkeypatch.setattr(normalizers, "NFC", None)
    assert qwen.normalized(below) == below
    assert Tokenizer(qwen.ranks, QWEN, {}, "plain").normalized("e\u0301") == "e\u0301"


def test_nfc_is_part_of_the_identity() -> None:
    ranks = {bytes([i]): i for i in range(256)}
    plain, nfc = (Tokenizer(ranks, QWEN, {}, "t", nfc=nfc) for nfc in (False, True))
    assert plain.sha256 != nfc.sha256 and plain.canary_sha256 != nfc.canary_sha256


@pytest.mark.parametrize("encoder", ["tiktoken", "fastokens", "gigatoken"])
def test_fast_encoders_normalize(encoder: str) -> None:
    pytest.importorskip(encoder)
    tokens = [bytes([i]) for i in range(256)] + ["é".encode(), "가".encode()[:2], "가".encode()]
    ranks = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(ranks, SPLIT_PATTERN, append_special_tokens(ranks), "t", nfc=True)
    ids, counts = find_encoder(encoder, tokenizer).encode_batch(["e\u0301", "", "\u1100\u1161"])
    assert (ids.tolist(), counts.tolist()) == ([256, 258], [1, 0, 1])


@pytest.mark.parametrize("family", PRE_TOKENIZERS)
def test_auto_takes_tiktoken_for_other_patterns_in_silence(
    pairs: dict, family: str, capfd: pytest.CaptureFixture
) -> None:
    ours, _ = pairs[family]
    encoder = find_encoder("auto", ours)
    assert encoder.name == "tiktoken"
    ids, counts = encoder.encode_batch(["cafe\u0301", "It's"])
    assert ids.tolist() == ours.encode_ordinary("cafe\u0301") + ours.encode_ordinary("It's")
    assert counts.sum() == len(ids)
    assert capfd.readouterr() == ("", "")


def test_import_adds_special_tokens(folders: Path, tmp_path: Path, chatdata: Callable) -> None:
    refused = chatdata("tokenizer", "import", folders / "qwen", "--out", tmp_path / "t")
    assert refused.stderr.endswith(
        "<|output_end|>; all nine must be in the tokenizer: `chatdata tokenizer import --add-specials` appends them, "
        "--chat-format does without\n"
    )
    result = chatdata("tokenizer", "import", folders / "qwen", "--add-specials", "--out", tmp_path / "t")
    assert result.stdout == f"{tmp_path / 't'}: 416 tokens, shards will be uint16\n"
    tokenizer = load_tokenizer(tmp_path / "t")
    assert {name: tokenizer.special_ids[name] for name in SPECIAL_TOKENS} == {
        name: 407 + i for i, name in enumerate(SPECIAL_TOKENS)
    }
    assert tokenizer.special_ids["<think>"] == 405 and tokenizer.nfc
    assert sorted(path.name for path in (tmp_path / "t").iterdir()) == [
        "chat_template.jinja",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    shown = chatdata("tokenizer", "show", folders / "qwen", "--json")
    assert json.loads(shown.stdout)["nfc"] is True
    # what is there already stays where it is
    again = chatdata("tokenizer", "import", tmp_path / "t", "--add-specials", "--out", tmp_path / "again")
    assert again.returncode == 0 and load_tokenizer(tmp_path / "again").sha256 == tokenizer.sha256


def test_special_tokens_go_behind_the_highest_id_holes_or_not() -> None:
    ranks = {bytes([i]): i for i in range(256)}
    assert append_special_tokens(ranks, {"<|bos|>": 5_000, "<|x|>": 70_000}) == {
        "<|bos|>": 5_000,
        "<|x|>": 70_000,
        **{name: 70_001 + i for i, name in enumerate(SPECIAL_TOKENS[1:])},
    }
    tokenizer = Tokenizer(ranks, QWEN, append_special_tokens(ranks, {"<|x|>": 70_000}), "holes")
    assert tokenizer.vocab_size == 70_010 and tokenizer.dtype == np.dtype("<u4")


def test_single_bytes_that_a_vocabulary_lacks_are_appended(folders: Path, tmp_path: Path, chatdata: Callable) -> None:
    contents = json.loads((folders / "smollm2" / "tokenizer.json").read_text())
    for byte in (0x04, 0xFF):  # as SmolLM2 does; a text cannot have 0xFF
        del contents["model"]["vocab"][spell(bytes([byte]))]
    (tmp_path / "tokenizer.json").write_text(json.dumps(contents))
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    ours = load_tokenizer(tmp_path, native=False)
    assert ours.num_bytes_appended == 2 and ours.vocab_size == 402
    for text in (*TEXTS, "".join(map(chr, range(5, 0x300)))):
        assert ours.encode_ordinary(text) == theirs.encode(text).ids
    assert (theirs.encode("\x04").ids, ours.encode_ordinary("\x04")) == ([], [400])
    contents["model"]["unk_token"] = "<|endoftext|>"  # changes nothing for other texts
    (tmp_path / "tokenizer.json").write_text(json.dumps(contents))
    assert load_tokenizer(tmp_path, native=False).sha256 == ours.sha256
    result = chatdata("tokenizer", "import", tmp_path, "--add-specials", "--out", tmp_path / "t")
    assert result.stdout == (
        f"{tmp_path} has no token for 2 of the 256 single bytes; appended after its highest id\n"
        f"{tmp_path / 't'}: 411 tokens, shards will be uint16\n"
    )
    saved = load_tokenizer(tmp_path / "t")
    assert saved.num_bytes_appended == 0 and saved.special_ids["<|bos|>"] == 402


@pytest.mark.parametrize(
    "pre_tokenizer",
    [
        pre_tokenizers.ByteLevel(add_prefix_space=True),
        byte_level(False),  # nothing splits
        pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level(False)]),
        pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), split(QWEN)]),
        pre_tokenizers.Sequence(
            [pre_tokenizers.Split(tokenizers.Regex(QWEN), "removed", invert=True), byte_level(False)]
        ),
        pre_tokenizers.Sequence([pre_tokenizers.Split(tokenizers.Regex(QWEN), "isolated"), byte_level(True)]),
        pre_tokenizers.Metaspace(),
    ],
)
def test_other_pre_tokenizers_are_refused(pre_tokenizer: pre_tokenizers.PreTokenizer, tmp_path: Path) -> None:
    tokenizer = trained("gpt2")
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(TokenizerError) as caught:
        load_tokenizer(tmp_path)
    assert "its pre-tokenizer (" in str(caught.value) and str(caught.value).endswith(
        ") is not ByteLevel, Digits then ByteLevel, or Split (by a Regex, Isolated) then ByteLevel, without "
        "add_prefix_space; tiktoken cannot give its ids, but `chatdata build --chat-format` can use it"
    )


def test_an_added_word_is_refused(tmp_path: Path) -> None:
    tokenizer = trained("gpt2")
    tokenizer.add_tokens(["covid"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(TokenizerError, match="'covid' is added but not special, so it is matched inside text; "):
        load_tokenizer(tmp_path, native=False)


def test_a_folder_with_only_vocabulary_and_merges(tmp_path: Path) -> None:
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).write_text("")
    with pytest.raises(TokenizerError, match=r"no tokenizer\.json, .*; vocab\.json and merges\.txt do not say how to"):
        load_tokenizer(tmp_path)
