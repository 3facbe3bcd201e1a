"""Small Hugging Face tokenizer folders with the special tokens that families of models have, made on the spot."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA_SPLIT = QWEN_SPLIT.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
QWEN_CONTROLS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
QWEN_WORDS = ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>"]
LLAMA_CONTROLS = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>"]
LLAMA_CONTROLS += ["<|eot_id|>", "<|python_tag|>"]
TEXTS = ["the weather in Paris is mild, it's 21 degrees", "user assistant system name arguments parameters", '{"a": 1}']


def make_folder(
    folder: Path, template: str, split: str, controls: list[str], words: list[str], config: dict[str, str]
) -> Path:
    """controls: added tokens marked as special; words: added tokens that are not."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(split), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    if split == QWEN_SPLIT:
        tokenizer.normalizer = normalizers.NFC()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    tokenizer.add_tokens([AddedToken(name, special=True, normalized=False) for name in controls])
    tokenizer.add_tokens([AddedToken(name, special=False, normalized=False) for name in words])
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.jinja").write_text(template)
    return folder


def qwen_folder(folder: Path, template: str) -> Path:
    return make_folder(folder, template, QWEN_SPLIT, QWEN_CONTROLS, QWEN_WORDS, {"eos_token": "<|im_end|>"})


def llama_folder(folder: Path, template: str) -> Path:
    config = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
    return make_folder(folder, template, LLAMA_SPLIT, LLAMA_CONTROLS, [], config)


def trl_template(name: str) -> str:
    """A template that trl ships."""
    import trl

    return (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")
