"""Tokenizer files: other libraries give the same ids; files that could mean other ids are refused."""

from __future__ import annotations

import base64
import json
import os
import pickle
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chatdata import load_tokenizer, render_conversation
from chatdata.decode import shown
from chatdata.errors import TokenizerError
from chatdata.tokenizer.bpe import SPECIAL_TOKENS, SPLIT_PATTERN, Tokenizer, append_special_tokens, train_tokenizer
from chatdata.tokenizer.files import read_json, read_pickle, read_tiktoken, save_tokenizer

tokenizers = pytest.importorskip("tokenizers", reason="compares with tokenizers: uv sync")
transformers = pytest.importorskip("transformers", reason="compares with transformers: uv sync")

BYTES = {bytes([byte]): byte for byte in range(256)}


@pytest.fixture(scope="module")
def saved(nanochat_tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(nanochat_tokenizer, folder)
    return folder


def real_texts(shared: Path) -> list[str]:
    texts = []
    for name in ("HuggingFaceTB/smol-smoltalk/data/test", "openai/gsm8k/main/test"):
        for row in pq.read_table(shared / "data" / "hub" / f"{name}-00000-of-00001.parquet").to_pylist():
            texts += [m["content"] for m in row["messages"]] if "messages" in row else [row["question"], row["answer"]]
    return texts


def test_tokenizers_and_transformers_give_the_same_ids(
    shared: Path, nanochat_tokenizer: Tokenizer, saved: Path
) -> None:
    texts = [*real_texts(shared), "spelled: <|bos|><|user_end|>", "", "\x00\x1f \n\n", "ab\r\n\r\n  c", "٣٤ ⅷ 👩‍👩‍👧"]
    assert len(texts) > 15_000
    expected = [nanochat_tokenizer.encode_ordinary(text) for text in texts]
    fast = tokenizers.Tokenizer.from_file(str(saved / "tokenizer.json"))
    fast.encode_special_tokens = True  # ordinary encoding: a spelled special token stays text
    assert [encoding.ids for encoding in fast.encode_batch(texts, add_special_tokens=False)] == expected
    auto = transformers.AutoTokenizer.from_pretrained(saved)
    got = auto(texts[-2000:], add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert got == expected[-2000:]
    assert auto.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == list(range(65_527, 65_536))
    assert auto.decode(expected[0]) == texts[0]


@settings(max_examples=300)
@given(st.text(max_size=60))
def test_any_text_encodes_the_same_after_saving(text: str) -> None:
    assert FAST_DEMO.encode(text, add_special_tokens=False).ids == DEMO.encode_ordinary(text)
    assert DEMO.decode(DEMO.encode_ordinary(text)) == text


def demo_pair() -> tuple[Tokenizer, tokenizers.Tokenizer]:
    import tempfile

    texts = [
        "aaaa aaa aa ababab abab banana bandana 1234 12 3456",
        "\n\n  \t\r\n 你好，世界 你好 naïve naïve!!! ??? ...",
    ] * 9
    tokenizer = train_tokenizer(iter(texts), 256 + 9 + 40)
    with tempfile.TemporaryDirectory() as folder:
        save_tokenizer(tokenizer, Path(folder))
        fast = tokenizers.Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
    fast.encode_special_tokens = True
    return tokenizer, fast


DEMO, FAST_DEMO = demo_pair()


def test_chat_template_renders_like_us(shared: Path, nanochat_tokenizer: Tokenizer, saved: Path) -> None:
    auto = transformers.AutoTokenizer.from_pretrained(saved)
    differ = []
    for line in (shared / "golden" / "render.jsonl").read_text().splitlines():
        case = json.loads(line)
        ours = render_conversation(nanochat_tokenizer, case["conversation"])
        messages = case["conversation"]["messages"]
        theirs = auto.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        if theirs["input_ids"] != ours.tokens.tolist():
            differ.append(case["name"])
            continue
        assert theirs["assistant_masks"] == ours.mask.tolist(), case["name"]
        if "completion_ids" in case and len(ours) <= 2048:
            prompt = auto.apply_chat_template(messages[:-1], add_generation_prompt=True)["input_ids"]
            assert prompt == case["completion_ids"], case["name"]
    # a template makes one string of a conversation, so it cannot keep these two kinds apart from their look-alikes
    assert differ == ["special_token_text_in_user", "adjacent_text_parts"]


def test_round_trip_through_the_folder(nanochat_tokenizer: Tokenizer, saved: Path, tmp_path: Path) -> None:
    again = load_tokenizer(saved)
    assert again.ranks == nanochat_tokenizer.ranks
    assert again.canary_sha256 == nanochat_tokenizer.canary_sha256
    save_tokenizer(again, tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / name).read_bytes() == (saved / name).read_bytes()


def tiktoken_file(path: Path, ranks: dict[bytes, int]) -> Path:
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items()))
    return path


def test_tiktoken_file_gets_its_specials_appended(tmp_path: Path) -> None:
    path = tiktoken_file(tmp_path / "vocab.tiktoken", {**BYTES, b"ab": 256})
    with pytest.raises(TokenizerError, match=r"put the pattern in vocab.pattern next to it"):
        load_tokenizer(path)
    assert read_tiktoken(path, SPLIT_PATTERN).special_ids["<|bos|>"] == 257
    (tmp_path / "vocab.pattern").write_text(SPLIT_PATTERN + "\n")
    tokenizer = load_tokenizer(path)
    assert tokenizer.encode_ordinary("abc") == [256, 99]
    assert tokenizer.vocab_size == 266
    path.write_text("not base64 at all\n")
    with pytest.raises(TokenizerError, match=r"vocab.tiktoken line 1: expected a base64 token and its rank"):
        load_tokenizer(path)


class Evil:
    def __reduce__(self) -> tuple:
        return (os.system, ("touch pwned",))


def pickled_encoding(state: object) -> bytes:
    # the opcodes tiktoken's own pickle has: class by name, NEWOBJ, state, BUILD
    head = b"\x80\x04\x8c\x0dtiktoken.core\x8c\x08Encoding\x93)\x81"
    return head + pickle.dumps(state, protocol=4)[2:-1] + b"b."


def test_no_pickle_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "tokenizer.pkl"
    path.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(TokenizerError, match=r"names the class posix.system; only tiktoken.core.Encoding is admitted"):
        read_pickle(path)
    path.write_bytes(pickled_encoding({"mergeable_ranks": {b"a": Evil()}, "pat_str": "x", "special_tokens": {}}))
    with pytest.raises(TokenizerError, match=r"names the class posix.system"):
        read_pickle(path)
    assert not (tmp_path / "pwned").exists()
    for bad in (b"", b"junk", pickle.dumps({"a": 1}), pickled_encoding([1]), pickled_encoding({"pat_str": 5})):
        path.write_bytes(bad)
        with pytest.raises(TokenizerError, match=r"not a pickled tiktoken.core.Encoding"):
            read_pickle(path)
    good = {"name": "x", "pat_str": SPLIT_PATTERN, "mergeable_ranks": BYTES}
    path.write_bytes(pickled_encoding({**good, "special_tokens": append_special_tokens(BYTES)}))
    assert read_pickle(path).encode_ordinary("hi") == [104, 105]
    path.write_bytes(pickled_encoding({**good, "special_tokens": {"<|bos|>": 256}}))
    with pytest.raises(TokenizerError, match=r"special tokens missing: <\|user_start\|>, "):
        read_pickle(path)


def edited(saved: Path, out: Path, **changes: object) -> Path:
    contents = json.loads((saved / "tokenizer.json").read_text())
    out.write_text(json.dumps({**contents, **changes}))
    return out


def test_foreign_tokenizer_json_is_refused_where_ids_could_differ(tmp_path: Path) -> None:
    save_tokenizer(DEMO, tmp_path)
    out = tmp_path / "edited.json"
    model = json.loads((tmp_path / "tokenizer.json").read_text())["model"]
    cases = [
        ({"normalizer": {"type": "NFC"}}, "its normalizer 'NFC' changes the text before encoding"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "its pre-tokenizer is not one Split, then ByteLevel"),
        ({"model": {**model, "type": "WordPiece"}}, "only byte-level BPE can be used, this is 'WordPiece'"),
        ({"model": {**model, "merges": model["merges"][::-1]}}, "is out of id order"),
        ({"added_tokens": []}, "special tokens missing"),
        ({"model": None}, "not a tokenizer.json"),
    ]
    for changes, message in cases:
        with pytest.raises(TokenizerError, match=message):
            read_json(edited(tmp_path, out, **changes))
    # the layout GPT-2's own file has: one ByteLevel step that splits by its own pattern, merges as strings
    merges = [" ".join(merge) for merge in model["merges"]]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    gpt2 = read_json(edited(tmp_path, out, pre_tokenizer=byte_level, model={**model, "merges": merges}))
    assert gpt2.pattern.startswith("'(?:[sdmt]|ll|ve|re)| ?")
    assert gpt2.ranks == DEMO.ranks


def test_tokenizer_json_that_means_something_else(tmp_path: Path, byte_tokenizer: Tokenizer) -> None:
    save_tokenizer(train_tokenizer(iter(["the cat and the hat, " * 60]), 272), tmp_path)
    good = json.loads((tmp_path / "tokenizer.json").read_text())
    split, byte_level = good["pre_tokenizer"]["pretokenizers"]
    path = tmp_path / "x.json"

    def read(**changes: object) -> None:
        path.write_text(json.dumps({**good, **changes}))
        read_json(path)

    def with_split(**changes: object) -> dict:
        return {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{**split, **changes}, byte_level]}}

    read()
    merges = good["model"]["merges"]
    hello = {**good["added_tokens"][0], "content": "hello", "id": 999, "special": False}
    for changes, message in [
        (with_split(behavior="Removed"), "its Split must be Isolated"),
        (with_split(behavior="MergedWithNext"), "tiktoken cannot do MergedWithNext"),
        (with_split(invert=True), "its Split must be Isolated, not inverted"),
        (with_split(pattern={"String": " "}), "with a Regex"),
        (with_split(pattern={"Regex": r"\w+|\W"}), r"x.json: the split pattern has '\\w\+\|\\W' at character 1, which"),
        ({"model": {**good["model"], "dropout": 0.5}}, "its model has dropout = 0.5"),
        ({"model": {**good["model"], "merges": merges[:3]}}, "no merge makes the token '.*', ids do"),
        ({"model": {**good["model"], "merges": [["a", "☃"]]}}, "merge 'a' '☃' is not of two tokens into a third"),
        (
            {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [byte_level, split]}},
            "not one Split, then ByteLevel",
        ),
        ({"added_tokens": [*good["added_tokens"], hello]}, "'hello' is added but not special"),
    ]:
        with pytest.raises(TokenizerError, match=message):
            read(**changes)


@pytest.mark.parametrize("bad", ["x", 1.5, None, True, -1, 2**32, 2**70])
def test_an_id_that_is_no_number_of_32_bits(tmp_path: Path, byte_tokenizer: Tokenizer, bad: object) -> None:
    save_tokenizer(byte_tokenizer, tmp_path)
    contents = json.loads((tmp_path / "tokenizer.json").read_text())
    contents["model"]["vocab"]["a"] = bad
    (tmp_path / "tokenizer.json").write_text(json.dumps(contents))
    with pytest.raises(TokenizerError, match=rf"tokenizer.json: id {shown(bad)} does not fit; ids must"):
        read_json(tmp_path / "tokenizer.json")


@pytest.mark.parametrize("text", ["[" * 100_000, "9" * 5_000])
def test_a_tokenizer_json_that_python_cannot_read(tmp_path: Path, text: str) -> None:
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(TokenizerError, match=r"tokenizer.json: not valid JSON: "):
        read_json(tmp_path / "tokenizer.json")
