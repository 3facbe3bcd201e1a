"""A Hugging Face tokenizer folder as it is, straight on `tokenizers`: for chat formats other than nanochat's.

Nothing is converted, so anything that tokenizer.json can say is allowed, and a build keeps a copy of the files.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from chatdata.errors import TokenizerError
from chatdata.tokenizer.bpe import MAX_UINT16_VOCAB, Tokenizer
from chatdata.tokenizer.merges import TO_BYTE

FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")  # those that are there


class FolderTokenizer(Tokenizer):
    """`special_ids` are all added tokens; a text must not spell those of `control_ids`, which are marked as special.

    special_tokens: `bos_token` and the like. It also has what `renderers` asks of a tokenizer.
    files: name → text. Raises TokenizerError if they are no tokenizer.
    """

    unk_token_id = None

    def __init__(self, files: Mapping[str, str], name: str) -> None:
        from tokenizers import Tokenizer as Raw

        self.files, self.name, self.name_or_path = dict(files), name, name
        try:
            config: dict[str, Any] = json.loads(files.get("tokenizer_config.json", "{}"))
            contents = json.loads(files["tokenizer.json"])
            # without what adds tokens, cuts, or trims offsets
            contents |= dict.fromkeys(("post_processor", "truncation", "padding"))
            self.raw = Raw.from_str(json.dumps(contents))
        except Exception as error:  # tokenizers raises no other kind
            raise TokenizerError(f"{name}: not a tokenizer folder: {str(error).partition(chr(10))[0]}") from None
        self.is_byte_level = "ByteLevel" in json.dumps(contents["decoder"])
        named = {key: value for key, value in config.items() if key.endswith("_token")}
        texts = {key: value["content"] if isinstance(value, dict) else value for key, value in named.items()}
        self.special_tokens = {key: text for key, text in texts.items() if isinstance(text, str)}
        templates = config.get("chat_template")  # one, or several by name
        named = {t["name"]: t["template"] for t in templates} if isinstance(templates, list) else {"default": templates}
        self.chat_template: str | None = files.get("chat_template.jinja", named.get("default"))
        added = self.raw.get_added_tokens_decoder()
        self.special_ids = {token.content: token_id for token_id, token in sorted(added.items())}
        ends = {self.special_tokens.get("bos_token"), self.special_tokens.get("eos_token")}
        self.control_ids = {i for i, token in added.items() if token.special or token.content in ends}
        self.control_pattern = re.compile("|".join(re.escape(added[i].content) for i in self.control_ids) or "(?!)")
        self.vocab_size = max(self.raw.get_vocab().values()) + 1
        self.dtype = np.dtype("<u2" if self.vocab_size <= MAX_UINT16_VOCAB else "<u4")

    def encode(self, text: str, **_: Any) -> list[int]:
        """Ids of `text`; added tokens spelled in it become those tokens."""
        return self.raw.encode_batch_fast([text], add_special_tokens=False)[0].ids  # without offsets: 0.75 of the time

    encode_ordinary = encode

    def __call__(self, text: str, **_: Any) -> dict[str, Any]:
        encoded = self.raw.encode(text, add_special_tokens=False)
        return {"input_ids": encoded.ids, "offset_mapping": encoded.offsets}

    def convert_tokens_to_ids(self, token: str) -> int | None:
        return self.raw.token_to_id(token)

    def decode(self, ids: Iterable[int], **_: Any) -> str:
        return self.raw.decode(list(ids), skip_special_tokens=False)

    @cached_property
    def token_bytes(self) -> dict[int, bytes]:
        """id → bytes of every token that is not added."""
        own = {rank: token for token, rank in self.raw.get_vocab().items() if token not in self.special_ids}
        if self.is_byte_level:
            return {rank: bytes(TO_BYTE.get(char, 63) for char in token) for rank, token in own.items()}
        single = {f"<0x{byte:02X}>": bytes([byte]) for byte in range(256)}
        return {rank: single.get(token, token.replace("▁", " ").encode()) for rank, token in own.items()}

    @cached_property
    def spelling(self) -> dict[int, bytes]:
        """id → bytes of every token, added ones by their names."""
        return self.token_bytes | {token_id: name.encode() for name, token_id in self.special_ids.items()}

    def normalised(self, text: str) -> bytes:
        """`text` as `spelling` has it."""
        text = self.raw.normalizer.normalize_str(text) if self.raw.normalizer else text
        return (text if self.is_byte_level else text.replace("▁", " ")).encode()

    def __reduce__(self) -> tuple[Any, ...]:
        return FolderTokenizer, (self.files, self.name)

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(json.dumps(self.files, sort_keys=True).encode()).hexdigest()


def read_folder(path: Path) -> FolderTokenizer:
    """The tokenizer of a folder, or of a build. Raises TokenizerError if there is none."""
    path = path / "tokenizer" if (path / "tokenizer").is_dir() else path
    files = {name: (path / name).read_text(encoding="utf-8") for name in FILES if (path / name).is_file()}
    if FILES[0] not in files:
        raise TokenizerError(f"{path}: no {FILES[0]}; --chat-format needs a Hugging Face tokenizer folder")
    return FolderTokenizer(files, str(path))
