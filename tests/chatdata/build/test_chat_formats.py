"""Builds in other chat formats: what they hold, that every tool takes them, and how they are refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chat_folders import llama_folder, qwen_folder, trl_template

import chatdata as library
from chatdata.build import engines, units
from chatdata.build.plan import make_build_plan
from chatdata.build.run import build
from chatdata.check.rerender import verify_semantic
from chatdata.check.verify import verify_full
from chatdata.errors import ChatdataError, ConversationError, UsageError
from chatdata.recipe import load_recipe
from chatdata.shards.manifest import build_id_of
from chatdata.sources.find import Locations
from chatdata.tasks.task import load_tasks
from chatdata.tokenizer.folder import read_folder

FORMATS = ["qwen3", "llama-3", "template"]
RECIPE = """
stage = "sft"
chat_format = "{}"
[[train]]
task = "conversations"
path = "chats.jsonl"
stop = -10
[[val]]
task = "conversations"
path = "chats.jsonl"
start = -10
"""


def chats() -> list[dict[str, Any]]:
    rows = []
    for i in range(60):
        parts = [{"type": "python", "text": f"weather(city='c{i}')"}, {"type": "python_output", "text": "mild"}]
        said: list[Any] = ["Fine.", f"<think>\nhm {i}\n</think>\n\nFine.", [*parts, {"type": "text", "text": "Mild."}]]
        said += [[{"type": "text", "text": "Wait."}, {"type": "python", "text": "2+3"}, parts[1]]]
        messages = [{"role": "system", "content": "Be brief."}] if i % 3 else []
        for turn in range(1 + i % 2):
            messages += [{"role": "user", "content": f"How is {i}?"}]
            messages += [{"role": "assistant", "content": said[(i + turn) % 4]}]
        rows.append({"messages": messages})
    rows[7]["messages"][-1]["weight"] = 0
    return rows


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with rows, a recipe for each format, the tokenizer folders, and a build in each format."""
    folder = tmp_path_factory.mktemp("formats")
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chats()))
    qwen_folder(folder / "qwen3", trl_template("qwen3"))
    llama_folder(folder / "llama-3", trl_template("llama3_2"))
    qwen_folder(folder / "template", trl_template("qwen3_training"))
    for name in FORMATS:
        (folder / f"{name}.toml").write_text(RECIPE.format(name))
        make(folder, name, folder / f"out-{name}")
    return folder


def make(folder: Path, name: str, out: Path, **options: Any) -> dict[str, Any]:
    """The report of a build with the recipe and the tokenizer of that name."""
    tasks = load_tasks(())
    recipe = load_recipe(str(folder / f"{name}.toml"), tasks)
    plan = make_build_plan(recipe, tasks, read_folder(folder / name), Locations(folder))
    build(plan, out, **options)
    return json.loads((out / "report.json").read_text())


@pytest.mark.parametrize("name", FORMATS)
def test_a_build_is_verified_to_the_row(work: Path, name: str) -> None:
    out = work / f"out-{name}"
    assert verify_full(out) == []
    tasks = load_tasks(())
    recipe = str(work / f"{name}.toml")
    assert verify_semantic(out, Locations(work), tasks, recipe=recipe, share=1.0) == []


def test_the_manifest_names_the_format_and_what_it_leaves_out(work: Path) -> None:
    from importlib.metadata import version

    manifests = {name: library.open_build(work / f"out-{name}").manifest for name in FORMATS}
    assert manifests["qwen3"]["chat_format"] == f"renderers:qwen3@{version('renderers')}"
    assert manifests["template"]["chat_format"].startswith("template:")
    assert manifests["llama-3"]["recipe"]["chat_format"] == "llama-3"
    for name in FORMATS:
        for file in (work / name).iterdir():
            assert (work / f"out-{name}" / "tokenizer" / file.name).read_bytes() == file.read_bytes()
    ledger = {name: manifests[name]["splits"]["train"]["entries"][0] for name in FORMATS}
    left_out = {name: (e.get("reasoning_left_out", 0), e.get("text_left_out", 0)) for name, e in ledger.items()}
    assert left_out == {"qwen3": (13, 0), "llama-3": (13, 12), "template": (0, 0)}
    assert {entry["documents"] for entry in ledger.values()} == {50}
    split = library.open_build(work / "out-template")["train"]
    assert split.index["untrained_turns"].sum() == 1 and split.index["num_turns"].sum() == 150


@pytest.mark.parametrize("name", FORMATS)
def test_workers_and_cache_change_no_byte(
    work: Path, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CHATDATA_CACHE", str(tmp_path / "cache"))
    for module in ("build.units", "sources.jsonl", "sources.file"):
        monkeypatch.setattr(f"chatdata.{module}.SEGMENT_BYTES", 4_000)
    monkeypatch.setattr("chatdata.sources.source.ROWS_PER_SEGMENT", 16)
    monkeypatch.setattr(engines, "BYTES_PER_WORKER", 1)
    report = make(work, name, tmp_path / "two", workers=2)
    assert report["units"]["cached"] == 0 and report["units"]["rendered"] > 2
    assert make(work, name, tmp_path / "cached")["units"] == {**report["units"], "rendered": 0, "cached": 4}
    expected = (work / f"out-{name}" / "manifest.json").read_bytes()
    assert (tmp_path / "two" / "manifest.json").read_bytes() == expected
    assert (tmp_path / "cached" / "manifest.json").read_bytes() == expected
    other = work / "other"
    shutil.copytree(work / name, other, dirs_exist_ok=True)
    template = (other / "chat_template.jinja").read_text()
    (other / "chat_template.jinja").write_text(template + "{# another #}")
    (work / "other.toml").write_text(RECIPE.format(name))
    assert make(work, "other", tmp_path / "other")["units"]["cached"] == 0
    shutil.rmtree(other)


def test_a_mask_that_is_not_its_spans_is_found(work: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(work / "out-qwen3", tmp_path / "out"))
    mask = np.load(out / "train" / "mask-00000.npy", mmap_mode="r+")
    first = int(np.flatnonzero(mask)[0])
    mask[first] = 0
    mask.flush()
    assert (
        f"{out}/train/mask-00000.npy: mask differs from the spans that are trained: train document 0, position {first}"
        in (verify_full(out))
    )


def test_a_manifest_that_contradicts_itself_is_refused(work: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(work / "out-qwen3", tmp_path / "out"))
    manifest = json.loads((out / "manifest.json").read_text())
    for value, problem in (
        ("renderers:llama-3@0.1.12", 'key "recipe.chat_format": "qwen3", but expected "llama-3"'),
        ("nanochat", 'key "recipe.chat_format": "qwen3", but expected "nanochat"'),
        ("mine", 'key "chat_format"'),
    ):
        manifest["chat_format"] = value
        manifest["build_id"] = build_id_of(manifest)
        (out / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(ChatdataError, match=problem):
            library.open_build(out)


def test_a_row_that_the_format_cannot_hold_is_named_or_dropped(work: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bad"
    folder.mkdir()
    rows = chats()
    rows[3] = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b<|im_end|>"}]}
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shutil.copytree(work / "qwen3", folder / "qwen3")
    (folder / "qwen3.toml").write_text(RECIPE.format("qwen3"))
    with pytest.raises(
        ConversationError, match=r"^chats.jsonl line 4: message 1: the text '<\|im_end\|>' would become"
    ):
        make(folder, "qwen3", tmp_path / "out")
    (folder / "qwen3.toml").write_text('invalid = "drop"' + RECIPE.format("qwen3"))
    make(folder, "qwen3", tmp_path / "out")
    split = library.open_build(tmp_path / "out").manifest["splits"]["train"]
    assert (split["documents"], split["entries"][0]["dropped"]["invalid"]) == (49, 1)
    assert verify_full(tmp_path / "out") == []


def test_the_firewall_searches(work: Path, tmp_path: Path) -> None:
    question = "How many legs do four spiders and three beetles have together in one small garden?"
    rows = [{"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": "50"}]}]
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows + chats()))
    (folder / "test.jsonl").write_text(json.dumps({"question": question}) + "\n")
    for name in ("qwen3", "llama-3"):
        shutil.copytree(work / name, folder / name)
        (folder / f"{name}.toml").write_text(RECIPE.format(name))
        against = [str(folder / "test.jsonl")]
        make(folder, name, tmp_path / name, against=against, decontaminate="drop")
        manifest = library.open_build(tmp_path / name).manifest
        assert manifest["splits"]["train"]["entries"][0]["dropped"]["contaminated"] == 1


def test_policies_follow_the_spans(work: Path) -> None:
    split = library.open_build(work / "out-template")["train"]
    starts, counts = np.array([0]), np.array([split.num_tokens])
    stored = split.mask(0, split.num_tokens)
    masks = {
        name: split.apply_policy(name, stored, starts, counts) for name in ("tools-only", "no-tools", "no-reasoning")
    }
    assert (masks["tools-only"] + masks["no-tools"] == stored).all() and masks["tools-only"].any()
    decode = split.build.tokenizer.decode
    tokens = split.tokens(0, split.num_tokens)
    left_out = decode(tokens[(stored == 1) & (masks["no-reasoning"] == 0)].tolist())
    assert left_out.startswith("<think>\nhm ") and "<|im_end|>" not in left_out


def test_the_command_line(work: Path, tmp_path: Path, command_line: Callable) -> None:
    shutil.copytree(work, tmp_path / "w")
    folder = tmp_path / "w"
    (folder / "plain.toml").write_text(RECIPE.format("nanochat"))
    made = "chatdata build --recipe plain.toml --chat-format qwen3 --tokenizer qwen3 --out out/q"
    assert command_line(made, folder).returncode == 0
    for line in (
        *(
            "chatdata verify out/q --level semantic --recipe plain.toml",
            "chatdata inspect out/q",
            "chatdata stats out/q",
        ),
        *("chatdata report out/q --out q.html", "chatdata plan out/q --seq-len 256", "chatdata diff out/q out/q"),
        "chatdata export out/q --to olmo --out olmo",
        "chatdata build --recipe plain.toml --chat-format qwen3 --tokenizer out/q --out out/again",
        "chattrain run --data out/q --init random:1x32x1 --out run --seq-len 256 --device-batch-size 2 --steps 2 "
        "--eval-every 2",
        "chattrain run --data out/q --init run --out run2 --seq-len 256 --device-batch-size 2 --steps 1 --layout pad",
    ):
        result = command_line(line, folder)
        assert result.returncode == 0, (line, result.stderr)
    assert (folder / "out/q/manifest.json").read_bytes() == (folder / "out/again/manifest.json").read_bytes()
    estimate = command_line(f"{made} --dry-run", folder)
    assert estimate.returncode == 0, estimate.stderr
    for line, message in (
        ("chatdata build --recipe plain.toml --chat-format qwen3 --out x", "needs --tokenizer with the model's"),
        ("chatdata build --recipe plain.toml --chat-format qwen4 --tokenizer qwen3 --out x", "Known: "),
        ("chatdata build --recipe plain.toml --chat-format llama-3 --tokenizer qwen3 --out x", "is no tokenizer for"),
        (
            "chatdata build --recipe plain.toml --chat-format qwen3 --tokenizer template --out x",
            "write different tokens",
        ),
        ("chatdata build --recipe plain.toml --tokenizer out/q --out x", "special tokens missing"),
        ("chatdata build --stage base --chat-format qwen3 --tokenizer qwen3 --out x", "is for conversations"),
        ("chateval run --checkpoint run --tasks gsm8k --out x", "another chat format"),
        ("chattrain export run --out x", "another chat format"),
    ):
        result = command_line(line, folder)
        assert result.returncode in (1, 2), line
        assert message in result.stderr and result.stderr.count("\n") == 1, result.stderr


def test_trl_trains_on_it(work: Path, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl", reason="trains with trl: uv sync")
    torch = pytest.importorskip("torch", reason="trains with torch: uv sync")
    from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

    split = library.open_build(work / "out-qwen3")["train"]
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    torch.manual_seed(0)
    vocab_size = split.build.manifest["tokenizer"]["vocab_size"]
    model = Qwen3ForCausalLM(Qwen3Config(vocab_size=vocab_size, intermediate_size=64, head_dim=16, **sizes))
    tokenizer = AutoTokenizer.from_pretrained(split.build.path / "tokenizer", pad_token="<|endoftext|>")
    settings = trl.SFTConfig(
        output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=2, report_to=[], use_cpu=True, bf16=False
    )
    trainer = trl.SFTTrainer(model, args=settings, train_dataset=split.to_dataset(), processing_class=tokenizer)
    fed = next(iter(trainer.get_train_dataloader()))
    assert (fed["labels"] != -100).any() and (fed["labels"] == -100).any()
    trainer.train()
    assert trainer.state.global_step == 1


def test_nanochats_tokenizer_is_no_folder(work: Path, byte_tokenizer: Any, tmp_path: Path) -> None:
    tasks = load_tasks(())
    recipe = load_recipe(str(work / "qwen3.toml"), tasks)
    with pytest.raises(UsageError, match="chat format qwen3 needs a Hugging Face tokenizer folder, not bytes"):
        build(make_build_plan(recipe, tasks, byte_tokenizer, Locations(work)), tmp_path / "out")
    assert units.NATIVE == "nanochat"
