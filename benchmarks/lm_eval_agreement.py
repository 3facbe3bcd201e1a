"""Does lm-evaluation-harness choose the same letters as chateval on the same prompts?

    uv run --with "lm-eval[hf]" python benchmarks/lm_eval_agreement.py --data-dir ../shared/data/hub \\
        --tokenizer TOKENIZER --items 500

A model with random weights is exported to transformers. lm-eval's HFLM computes the log-likelihood of each letter after
each MMLU prompt, in its own batches, and the best letter is compared with chateval's. Differences are listed with
chateval's margin; below 1e-4 they are near ties.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from lm_eval.models.huggingface import HFLM

from chatdata.tasks import load_tasks
from chatdata.tokenizer.files import load_tokenizer, save_tokenizer
from chateval.ask.letters import choose_letters
from chateval.ask.questions import load_questions
from chateval.ask.subject import load_subject
from chattrain.model import parameter_shapes, random_config
from chattrain.nanochat.export import export_transformers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--items", type=int, default=500)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        tokenizer = load_tokenizer(arguments.tokenizer)
        save_tokenizer(tokenizer, out / "tokenizer")
        config = random_config("d2", tokenizer.vocab_size, 2048)
        generator = torch.Generator().manual_seed(0)
        weights = {n: torch.randn(s, generator=generator) / s[1] ** 0.5 for n, s in parameter_shapes(config).items()}
        weights["lm_head.weight"] *= 8  # spread the letters' logits
        ends = tokenizer.special_ids["<|bos|>"], tokenizer.special_ids["<|assistant_end|>"]
        export_transformers(weights, config, out / "hf", *ends, tokenizer_dir=out / "tokenizer", verify=False)

        subject = load_subject(out / "hf", torch.device("cpu"))
        (mmlu,) = load_questions(["mmlu"], load_tasks(), tokenizer, arguments.data_dir, limit=arguments.items)
        ours = []
        for first in range(0, len(mmlu.questions), 32):
            batch = mmlu.questions[first : first + 32]
            ours += choose_letters(subject, batch)

        theirs = HFLM(pretrained=str(out / "hf"), dtype="float32", device="cpu", batch_size=16, add_bos_token=False)
        requests = []
        for question in mmlu.questions:
            text = tokenizer.decode(question.prompt)
            assert theirs.tok_encode(text) == question.prompt, f"{question.item}: lm-eval encodes it differently"
            # pass ids, because lm-eval would encode prompt and letter as one text
            requests += [((text, letter), question.prompt, tokenizer.encode_ordinary(letter)) for letter in "ABCD"]
        values = [value for value, _ in theirs._loglikelihood_tokens(requests)]
        letters = ["ABCD"[max(range(4), key=values[i : i + 4].__getitem__)] for i in range(0, len(values), 4)]
    other = [(i, a.letter, b, a.margin) for i, (a, b) in enumerate(zip(ours, letters, strict=True)) if a.letter != b]
    counts = {letter: letters.count(letter) for letter in "ABCD"}
    print(f"{len(ours) - len(other)} of {len(ours)} letters agree (lm-eval's answers: {counts})")
    for item, our_letter, their_letter, margin in other:
        print(f"  item {item}: chateval {our_letter}, lm-eval {their_letter}, margin {margin:.2g}")


if __name__ == "__main__":
    main()
