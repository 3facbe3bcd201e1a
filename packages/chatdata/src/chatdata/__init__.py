"""chatdata: chat conversations rendered once, offline, to memory-mapped token shards with a parallel mask.

import chatdata
build = chatdata.open_build("out/demo-mid")
document = build["train"][0]          # .tokens, .mask: views; shows itself coloured in a notebook
"""

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from chatdata.document import Document as Document
    from chatdata.packing.torch import to_torch as to_torch
    from chatdata.render.specification import render_conversation as render_conversation
    from chatdata.render.specification import render_for_completion as render_for_completion
    from chatdata.shards.read import Build as Build
    from chatdata.shards.read import Split as Split
    from chatdata.shards.read import open_build as open_build
    from chatdata.tokenizer.bpe import Tokenizer as Tokenizer
    from chatdata.tokenizer.files import load_tokenizer as load_tokenizer


def version_of(package: str) -> str:
    """The installed version of a package; "unknown" if it is only on PYTHONPATH, unpacked or as source code."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


__version__ = version_of("chatdata")
_HOMES = {
    "Build": "shards.read",
    "Document": "document",
    "Split": "shards.read",
    "Tokenizer": "tokenizer.bpe",
    "load_tokenizer": "tokenizer.files",
    "open_build": "shards.read",
    "render_conversation": "render.specification",
    "render_for_completion": "render.specification",
    "to_torch": "packing.torch",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    # numpy and tiktoken are imported when first needed, so that `chatdata --help` answers at once
    from importlib import import_module

    if name in _HOMES:
        return getattr(import_module(f"chatdata.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'chatdata' has no attribute {name!r}")
