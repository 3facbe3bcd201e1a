"""Export to transformers' NanoChat (5.x, models/nanochat), and the proof that the exported model is the same."""

import dataclasses
import json
import secrets
import shutil
from itertools import product
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from chatdata.disk import check_replaceable, write_json
from chatdata.errors import first_line
from chattrain.checkpoint import TOKENIZER_FILES, write_tensors
from chattrain.errors import ExportError, VerifyError
from chattrain.model import NORM_EPS, ROPE_THETA, SOFTCAP, ModelConfig, Tensors, check_weights, load_model

MAX_LOGIT_DIFFERENCE = 1e-5  # fp32, sdpa on both sides; the same model measured 0 to 2e-6
BY_VOCABULARY = ("transformer.wte.weight", "lm_head.weight")  # parameters with a row for each token
SIZES = {"sequence_len": "max_position_embeddings", "vocab_size": "vocab_size", "n_layer": "num_hidden_layers"}
SIZES |= {"n_head": "num_attention_heads", "n_kv_head": "num_key_value_heads", "n_embd": "hidden_size"}
VERIFY_ROWS, VERIFY_LENGTH = 2, 128


def export_transformers(
    weights: Tensors,
    config: ModelConfig,
    out: Path,
    bos_id: int,
    assistant_end_id: int,
    tokenizer_dir: Path | None = None,
    verify: bool = True,
) -> None:
    """Write a folder that transformers loads as NanoChat: fp32 weights, config, generation config, tokenizer files.

    weights: as nanochat names them. tokenizer_dir: a build's or checkpoint's tokenizer folder, copied along.
    verify: check it with `verify_export` (needs transformers) before renaming it to `out`.
    Raises WeightsError for weights that do not fit the config, ExportError if nothing can be written, VerifyError.
    """
    check_weights(weights, config, "export")
    for name, token in (("bos", bos_id), ("assistant_end", assistant_end_id)):
        if not 0 <= token < config.vocab_size:
            raise ExportError(f"export: {name} id {token} is not in the vocabulary of {config.vocab_size}")
    check_replaceable(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ExportError(f"export: {out} exists and is not an empty folder: choose another or remove it")
    if tokenizer_dir is not None and not (tokenizer_dir / "tokenizer.json").is_file():
        raise ExportError(f"export: no tokenizer.json in {tokenizer_dir}: must be a tokenizer folder of chatdata")
    if verify:
        _check_verifiable(config)

    partial = out.with_name(f".{out.name}.{secrets.token_hex(8)}.partial")
    partial.mkdir(parents=True)
    try:
        write_tensors(transformers_weights(weights, config), partial / "model.safetensors", {"format": "pt"})
        head = {"architectures": ["NanoChatForCausalLM"], "model_type": "nanochat", "dtype": "float32"}
        write_json(partial / "config.json", head | transformers_config(config, bos_id, assistant_end_id))
        write_json(partial / "generation_config.json", generation_config(bos_id, assistant_end_id))
        for name in TOKENIZER_FILES if tokenizer_dir is not None else ():
            if (tokenizer_dir / name).is_file():
                shutil.copyfile(tokenizer_dir / name, partial / name)
        if verify:
            verify_export(partial, weights, config, bos_id, assistant_end_id)
        partial.replace(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def transformers_names(config: ModelConfig) -> dict[str, str]:
    """nanochat's name → transformers', for every parameter."""
    names = {"transformer.wte.weight": "model.embed_tokens.weight", "lm_head.weight": "lm_head.weight"}
    block = {"attn.c_q": "self_attn.q_proj", "attn.c_k": "self_attn.k_proj", "attn.c_v": "self_attn.v_proj"}
    block |= {"attn.c_proj": "self_attn.o_proj", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
    for i, (ours, theirs) in product(range(config.n_layer), block.items()):
        names[f"transformer.h.{i}.{ours}.weight"] = f"model.layers.{i}.{theirs}.weight"
    return names


def transformers_weights(weights: Tensors, config: ModelConfig) -> dict[str, Tensor]:
    """The weights under transformers' names, without the padding rows: one left in has a logit of 0, which can win."""
    names = transformers_names(config)
    return {
        names[name]: (tensor[: config.vocab_size] if name in BY_VOCABULARY else tensor).detach().float().contiguous()
        for name, tensor in weights.items()
    }


def is_export(folder: Path) -> bool:
    """Whether the folder looks like a model of transformers."""
    return (folder / "config.json").is_file() and (folder / "model.safetensors").is_file()


def read_export(folder: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Sizes and weights (nanochat's names, fp32, padding rows zero again) of a folder that `export_transformers` wrote.

    Raises ExportError for a config field that our model does not have and for files that cannot be read, WeightsError
    for other tensors than the model's.
    """
    try:
        fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        tensors = load_file(folder / "model.safetensors")
        config = ModelConfig(**{ours: fields[theirs] for ours, theirs in SIZES.items()})
    except (OSError, KeyError, TypeError, ValueError, SafetensorError) as error:
        reason = f"{type(error).__name__} {first_line(error)}"
        raise ExportError(f"{folder}: not an export of chattrain: {reason}") from error
    free = ("bos_token_id", "eos_token_id", "initializer_range", "use_cache")  # nothing the hidden states depend on
    for name, value in ({"model_type": "nanochat"} | transformers_config(config, 0, 0)).items():
        if name not in free and fields.get(name) != value:
            raise ExportError(f"{folder}/config.json: {name} is {fields.get(name)!r}, must be {value!r}")
    ours = {theirs: name for name, theirs in transformers_names(config).items()}
    weights = {ours.get(name, name): tensor for name, tensor in tensors.items()}
    return config, whole_weights(weights, config, f"{folder}/model.safetensors")


def whole_weights(weights: Tensors, config: ModelConfig, where: str) -> dict[str, Tensor]:
    """Weights of a file (`where` names it) in fp32; padding rows that it lacks are added, zero and never chosen.

    Raises WeightsError for unknown, missing or wrongly shaped tensors.
    """
    whole = {name: tensor.float() for name, tensor in weights.items()}
    for name in BY_VOCABULARY:
        if name in whole and whole[name].shape[:1] == (config.vocab_size,):
            whole[name] = F.pad(whole[name], (0, 0, 0, config.vocab_rows - config.vocab_size))
    check_weights(whole, config, where)
    return whole


def transformers_config(config: ModelConfig, bos_id: int, assistant_end_id: int) -> dict[str, object]:
    """Every field of NanoChatConfig, none left to its default: those of eps, intermediate size and ids are not ours."""
    sizes = {theirs: getattr(config, ours) for ours, theirs in SIZES.items()} | {"intermediate_size": 4 * config.n_embd}
    block = {"hidden_act": "relu2", "attention_dropout": 0.0, "attention_bias": False, "rms_norm_eps": NORM_EPS}
    block["rope_parameters"] = {"rope_type": "default", "rope_theta": ROPE_THETA}
    head = {"final_logit_softcapping": SOFTCAP, "tie_word_embeddings": False}
    # a pad id here would freeze that row of the embedding in further training
    ids = {"bos_token_id": bos_id, "eos_token_id": [assistant_end_id, bos_id], "pad_token_id": None}
    return sizes | block | head | ids | {"initializer_range": 0.02, "use_cache": True}


def generation_config(bos_id: int, assistant_end_id: int) -> dict[str, object]:
    """Both ids end an answer; padding is assistant_end, as in nanochat's own batches."""
    return {"bos_token_id": bos_id, "eos_token_id": [assistant_end_id, bos_id], "pad_token_id": assistant_end_id}


def verify_export(
    folder: str | Path, weights: Tensors, config: ModelConfig, bos_id: int, assistant_end_id: int
) -> float:
    """Loads the folder with transformers (fp32, sdpa attention) and returns the largest difference of logits.

    Raises VerifyError unless every config field is as `transformers_config` says (logits alone do not see a wrong
    eps), every tensor was used, logits differ by at most 1e-5 and all arg-max are equal; also where the comparison
    would say nothing: bf16 rotary tables, which transformers does not have, and a model whose logits are all equal.
    """
    _check_verifiable(config)
    from transformers import AutoModelForCausalLM, NanoChatConfig, PreTrainedConfig

    try:
        theirs, loading = AutoModelForCausalLM.from_pretrained(
            folder, attn_implementation="sdpa", dtype=torch.float32, local_files_only=True, output_loading_info=True
        )
    except (OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
        raise VerifyError(f"verify: {folder}: transformers does not load it: {first_line(error)}") from error
    for problem, names in loading.items():
        if names:
            raise VerifyError(f"verify: {folder}: {problem.replace('_', ' ')} {sorted(names)} when loading")

    expected = transformers_config(config, bos_id, assistant_end_id)
    known, common = ({field.name for field in dataclasses.fields(kind)} for kind in (NanoChatConfig, PreTrainedConfig))
    if new := sorted(known - common - set(expected)):
        raise VerifyError(f"verify: this transformers has config fields {new} that the export does not write")
    generation = theirs.generation_config, generation_config(bos_id, assistant_end_id)
    for source, fields in ((theirs.config, expected), generation):
        for name, value in fields.items():
            if (found := getattr(source, name, "nothing")) != value:
                raise VerifyError(f"verify: {folder}: {type(source).__name__}.{name} is {found!r}, must be {value!r}")

    length = min(VERIFY_LENGTH, config.sequence_len)
    tokens = torch.randint(config.vocab_size, (VERIFY_ROWS, length), generator=torch.Generator().manual_seed(0))
    ours = load_model(config, weights)
    with torch.no_grad():
        our_logits, their_logits = ours.logits(ours(tokens)), theirs(tokens).logits
    if our_logits.min() == our_logits.max():
        raise VerifyError("verify: all logits are equal (a fresh model?), so any model would pass: train it first")
    if their_logits.shape != our_logits.shape:
        raise VerifyError(f"verify: {folder}: logits {tuple(their_logits.shape)}, must be {tuple(our_logits.shape)}")
    difference = (our_logits - their_logits).abs().max().item()
    num_other = (our_logits.argmax(-1) != their_logits.argmax(-1)).sum().item()
    if not difference <= MAX_LOGIT_DIFFERENCE or num_other:  # "not <=" also catches NaN
        others = f"{num_other} of {tokens.numel()} arg-max are others"
        most = f"(at most {MAX_LOGIT_DIFFERENCE})"
        raise VerifyError(f"verify: {folder}: logits differ by {difference:.3g} {most}, {others}")
    return difference


def _check_verifiable(config: ModelConfig) -> None:
    if config.rope_dtype != "float32":
        raise VerifyError(f"verify: rotary tables are {config.rope_dtype}; transformers only has float32 ones")
    try:
        import transformers
    except ImportError as error:
        raise VerifyError("verify: transformers is not installed: `uv sync` installs it") from error
    if int(transformers.__version__.split(".")[0]) < 5:
        raise VerifyError(f"verify: transformers is {transformers.__version__}, must be version 5 or newer")
