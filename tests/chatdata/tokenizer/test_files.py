"""Tokenizer files: other libraries give the same ids; files that could mean other ids are refused."""

from __future__ import annotations

import base64
import json
import os
import pickle
import resource
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chatdata import load_tokenizer, render_conversation
from chatdata.disk import shown
from chatdata.errors import TokenizerError
from chatdata.tokenizer import files
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
    (tmp_path / "vocab.pattern").write_bytes(b"a|\xff")
    with pytest.raises(TokenizerError, match=r"vocab\.pattern: not UTF-8 at byte 2$"):
        load_tokenizer(tmp_path / "vocab.tiktoken")
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
        load_tokenizer(path)


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x04]r\x00\x00\x00\x10.",  # LONG_BINPUT: object number 2^28, 4 GB of memory
        b"\x80\x04]r\xff\xff\xff\xff.",
        b"\x80\x02]p99999999999\n.",  # PUT
        b"\x80\x04\x8d" + (2**40).to_bytes(8, "little") + b"x.",  # BINUNICODE8
        b"\x80\x04\x8e" + (2**62).to_bytes(8, "little") + b"x.",  # BINBYTES8
        b"\x80\x05\x96" + (2**32).to_bytes(8, "little") + b"x.",  # BYTEARRAY8
        b"\x80\x04B\xff\xff\xff\x7fx.",
        b"\x80\x02X\xff\xff\xff\xffx.",
        b"\x80\x04\x95" + (2**62).to_bytes(8, "little") + b"].",  # FRAME
        b"\x80\x04\x8b\xff\xff\xff\x7f1.",  # LONG4
        b"\x80\x04\x8a\xff1.",  # LONG1, cut
        b"\x80\x04h\x05.",  # BINGET of nothing
        b"\x80\x04" + b"(" * 100_000 + b"t" * 100_000 + b".",  # deep
        b"\x80\x04" + b"]" + b"2" * 1_000 + b"\x85" * 100_000 + b".",
        b"\x80\x04I" + b"9" * 5_000 + b"\n.",
        b"\x80\x04Pabc\n.",  # PERSID
        b"\x80\x04K\x01Q.",  # BINPERSID
        b"\x80\x05\x97.",  # NEXT_BUFFER
        b"\x80\x04\x82\x01.",  # EXT1
        b"\x80\x04ctiktoken.core",
        b"\x80\xff].",
        b"\xff",
    ],
)
def test_a_pickle_takes_no_more_memory_than_its_size(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "tokenizer.pkl"
    path.write_bytes(data)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (virtual_memory() + 2**28, hard))
    try:
        with pytest.raises(TokenizerError) as caught:
            read_pickle(path)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    assert str(caught.value).startswith(f"{path}: not a pickled tiktoken.core.Encoding: ")
    assert "MemoryError" not in str(caught.value) and len(str(caught.value).splitlines()) == 1


def virtual_memory() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def test_pickles_of_every_protocol_are_read(tmp_path: Path) -> None:
    state = {"name": "x", "pat_str": SPLIT_PATTERN, "mergeable_ranks": {**BYTES, b"a" * 300: 256, b"ab": 257}}
    state["special_tokens"] = append_special_tokens(state["mergeable_ranks"])
    for protocol in (2, 3, 4, 5):
        head = b"\x80\x04ctiktoken.core\nEncoding\n)\x81"
        body = pickle.dumps(state, protocol=protocol)[2:-1]
        (tmp_path / "tokenizer.pkl").write_bytes(head + body + b"b.")
        if protocol == 2:  # bytes become a call of a function
            with pytest.raises(TokenizerError, match=r"names the class _codecs.encode; only tiktoken"):
                read_pickle(tmp_path / "tokenizer.pkl")
        else:
            assert read_pickle(tmp_path / "tokenizer.pkl").ranks == state["mergeable_ranks"]


def test_a_sparse_vocabulary_is_refused(tmp_path: Path) -> None:
    path = tiktoken_file(tmp_path / "vocab.tiktoken", {**BYTES, b"ab": 2**32 - 100})
    with pytest.raises(TokenizerError, match=r"id 4294967205 does not fit; ids must be integers in 0 … 1,048,575$"):
        read_tiktoken(path, SPLIT_PATTERN)


def test_what_is_saved_means_the_same_to_tokenizers(tmp_path: Path) -> None:
    ranks = {**BYTES, **{f"{i:03}".encode(): 256 + i for i in range(1000)}, b"12": 1256, b"34": 1257}
    pattern = r"\p{L}+|\p{N}{1,3}+|a+$| ?[^\s\p{L}\p{N}]+|\s++$|\s+"
    tokenizer = Tokenizer(ranks, pattern, append_special_tokens(ranks), "test")
    save_tokenizer(tokenizer, tmp_path)
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    again = load_tokenizer(tmp_path)
    assert (again.pattern, again.ranks) == (r"\p{L}+|(?>\p{N}{1,3})|a+\z| ?[^\s\p{L}\p{N}]+|\s++\z|\s+", ranks)
    for text, expected in [
        ("12345", [256 + 123, 52, 53]),
        ("aa\n \n", [97, 97, 10, 32, 10]),
        ("1234567", [379, 712, 55]),
    ]:
        assert tokenizer.encode_ordinary(text) == again.encode_ordinary(text) == theirs.encode(text).ids == expected
    # the same words in a tokenizer.json mean what Oniguruma reads
    contents = (tmp_path / "tokenizer.json").read_text()
    (tmp_path / "tokenizer.json").write_text(contents.replace(r"(?>\\p{N}{1,3})", r"\\p{N}{1,2}+"))
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).encode_ordinary("1234") == theirs.encode("1234").ids == [379, 52]


def test_a_difference_to_tokenizers_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = {"Regex": r"\S+|\s"}
    contents = files._contents(DEMO)
    contents["pre_tokenizer"]["pretokenizers"][0]["pattern"] = wrong
    monkeypatch.setattr(files, "_contents", lambda tokenizer: contents)
    with pytest.raises(TokenizerError, match=r"^trained: tiktoken and tokenizers differ on the text ") as caught:
        save_tokenizer(DEMO, tmp_path / "t")
    assert str(caught.value).endswith("; it cannot be used") and len(str(caught.value).splitlines()) == 1
    assert not (tmp_path / "t").exists()


def edited(saved: Path, out: Path, **changes: object) -> Path:
    contents = json.loads((saved / "tokenizer.json").read_text())
    out.write_text(json.dumps({**contents, **changes}))
    return out


def test_foreign_tokenizer_json_is_refused_where_ids_could_differ(tmp_path: Path) -> None:
    save_tokenizer(DEMO, tmp_path)
    out = tmp_path / "edited.json"
    model = json.loads((tmp_path / "tokenizer.json").read_text())["model"]
    cases = [
        ({"normalizer": {"type": "NFKC"}}, "its normalizer 'NFKC' changes the text; only NFC can be done"),
        ({"pre_tokenizer": None}, r"its pre-tokenizer \(none\) is not ByteLevel, "),
        ({"pre_tokenizer": {"type": "Whitespace"}}, r"its pre-tokenizer \(Whitespace\) is not ByteLevel"),
        ({"model": {**model, "type": "WordPiece"}}, "its model is 'WordPiece', and not byte-level BPE"),
        ({"model": {**model, "byte_fallback": True}}, "its model is 'BPE', and not byte-level BPE"),
        ({"model": {**model, "merges": model["merges"][::-1]}}, "is out of id order"),
        ({"added_tokens": []}, "special tokens missing"),
        ({"model": None}, "not a tokenizer.json"),
    ]
    for changes, message in cases:
        with pytest.raises(TokenizerError, match=message) as caught:
            load_tokenizer(edited(tmp_path, out, **changes))
        ending = "; tiktoken cannot give its ids, but `chatdata build --chat-format` can use it"
        assert str(caught.value).endswith(ending) != ("special tokens" in message or "not a tokenizer" in message)
    # the layout GPT-2's own file has: one ByteLevel step that splits by its own pattern, merges as strings
    merges = [" ".join(merge) for merge in model["merges"]]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    gpt2 = read_json(edited(tmp_path, out, pre_tokenizer=byte_level, model={**model, "merges": merges}))
    assert gpt2.pattern.startswith("'(?:[sdmt]|ll|ve|re)| ?")
    assert gpt2.ranks == DEMO.ranks


def test_a_tokenizer_without_the_nine_special_tokens(tmp_path: Path) -> None:
    other = Tokenizer({**BYTES, b"ab": 256}, SPLIT_PATTERN, {"<|im_end|>": 300}, "other")
    save_tokenizer(other, tmp_path / "t")
    assert sorted(os.listdir(tmp_path / "t")) == ["tokenizer.json", "tokenizer_config.json"]
    assert "_token" not in (tmp_path / "t" / "tokenizer_config.json").read_text().replace("clean_up_tokenization", "")
    again = load_tokenizer(tmp_path / "t", native=False)
    assert again.is_as_saved and again.special_ids == {"<|im_end|>": 300} and again.vocab_size == 301
    assert again.missing_special_tokens == list(SPECIAL_TOKENS)
    assert (again.sha256, again.canary_sha256) == (other.sha256, other.canary_sha256)
    assert Tokenizer(BYTES, SPLIT_PATTERN, {}, "none").vocab_size == 256


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
        (with_split(behavior="Removed"), r"its pre-tokenizer \(Split, ByteLevel\) is not ByteLevel, Digits then"),
        (with_split(behavior="MergedWithNext"), "its pre-tokenizer .* Split .by a Regex, Isolated"),
        (with_split(invert=True), "its pre-tokenizer .* Split .by a Regex, Isolated"),
        (with_split(pattern={"String": " "}), "its pre-tokenizer .* Split .by a Regex, Isolated"),
        (with_split(pattern={"Regex": r"\w+|\W"}), r"x.json: the split pattern has '\\w\+\|\\W' at character 1, which"),
        ({"model": {**good["model"], "dropout": 0.5}}, "its model has dropout = 0.5"),
        ({"model": {**good["model"], "merges": merges[:3]}}, "do not both make the token"),
        ({"model": {**good["model"], "merges": [["a", "☃"]]}}, "merge 'a' '☃' is not of two tokens into a third"),
        (
            {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [byte_level, split]}},
            "its pre-tokenizer .* Split .by a Regex, Isolated",
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
