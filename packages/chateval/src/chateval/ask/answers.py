"""Answer a batch of questions and grade the answers: one function for each way of scoring.

Each yields lines of items.jsonl, plain data with the fields of `chateval.results.items.Item`.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any, NamedTuple

from chatdata.render.format import NANOCHAT
from chatdata.tasks.task import Task, call_task
from chateval.ask.generate import Completion, Prompt, Sampling, generate
from chateval.ask.letters import choose_letters
from chateval.ask.questions import Question
from chateval.ask.subject import Subject, gold_losses
from chateval.sandbox.run_code import Isolation, run_code

WHOLE_ENDINGS = ("assistant_end", "bos")  # of answers that were not cut
CODE_THREADS = 4  # programs mostly wait for an interpreter to start


class Draw(NamedTuple):
    """One answer to be given: a question, and which of its draws."""

    question: Question
    draw: int

    @property
    def key(self) -> tuple[str, str, int]:
        return self.question.task, self.question.item, self.draw


def answer_letters(subject: Subject, draws: Sequence[Draw]) -> Iterator[dict[str, Any]]:
    """Multiple choice: the letter is the answer."""
    for draw, choice in zip(draws, choose_letters(subject, [draw.question for draw in draws]), strict=True):
        letter, gold = choice.letter, draw.question.gold
        # one that is too long is answered anyway, but the model was never trained on text this long
        ending = "letter beyond context" if choice.num_prompt_tokens > subject.num_positions else "letter"
        line = {**_head(draw), "output": letter, "extracted": letter, "gold": gold, "correct": letter == gold}
        line |= {"ending": ending, "num_prompt_tokens": choice.num_prompt_tokens, "num_tokens": 0}
        line |= {"gold_nats": choice.gold_nats, "gold_bytes": len(gold.encode())}
        yield line | {"tie": choice.tie, "margin": choice.margin, "letter_mass": choice.letter_mass}


def answer_texts(subject: Subject, task: Task, draws: Sequence[Draw], sampling: Sampling) -> Iterator[dict[str, Any]]:
    """Generated answers, graded by the task's own file, each as it ends."""
    for draw, completion, line in _generated(subject, draws, sampling):
        grade = call_task(task, task.scoring.grade, draw.question.row, answer_text(subject, completion))
        line |= {**grade._asdict(), "ending": completion.ending}
        yield line | {"tool_calls": completion.tool_calls, "tool_failures": completion.tool_failures}


def answer_programs(
    subject: Subject, task: Task, draws: Sequence[Draw], sampling: Sampling, isolation: Isolation
) -> Iterator[dict[str, Any]]:
    """Generated programs, run in the sandbox with their tests."""

    def run(draw: Draw, completion: Completion, line: dict[str, Any]) -> dict[str, Any]:
        text = answer_text(subject, completion)
        outcome = run_code(isolation, call_task(task, task.scoring.program, draw.question.row, text))
        cut = "" if completion.ending in WHOLE_ENDINGS else f"{completion.ending}, "
        line |= {"extracted": text, "gold": "its tests pass", "correct": outcome.passed}
        return line | {"ending": cut + outcome.ending, "detail": outcome.detail}

    with ThreadPoolExecutor(CODE_THREADS) as threads:
        running = [threads.submit(run, *answer) for answer in _generated(subject, draws, sampling)]
        try:
            for future in running:
                yield future.result()
        except BaseException:  # do not wait for the programs that have not started
            threads.shutdown(wait=False, cancel_futures=True)
            raise


def answer_text(subject: Subject, completion: Completion) -> str:
    """The text of an answer, without tool calls and their results.

    A call that is not closed is text, so that it hides no answer; what the tool was still writing is not.
    """
    special, tokens = subject.tokenizer.special_ids, completion.tokens
    closing = {special[part.opening]: special[part.closing] for part in (NANOCHAT.python, NANOCHAT.output)}
    delimiters = [i for i, token in enumerate(tokens) if token in closing or token in closing.values()]
    inside = {
        i for start, end in pairwise(delimiters) if closing.get(tokens[start]) == tokens[end] for i in range(start, end)
    }
    hidden = inside | {i for i, is_forced in enumerate(completion.forced) if is_forced}
    texts = subject.tokenizer.token_bytes
    return subject.tokenizer.decode([token for i, token in enumerate(tokens) if i not in hidden and token in texts])


def _head(draw: Draw) -> dict[str, Any]:
    question = draw.question
    head = {"task": question.task, "item": question.item, "subject": question.subject}
    return head | {"draw": draw.draw, "prompt_sha256": question.prompt_sha256}


def _generated(
    subject: Subject, draws: Sequence[Draw], sampling: Sampling
) -> Iterator[tuple[Draw, Completion, dict[str, Any]]]:
    """Each generated answer as it ends, and its line as far as it needs no grading."""
    gold = gold_losses(subject, [draw.question.document for draw in draws])
    prompts = [Prompt(draw.question.prompt, "/".join(map(str, draw.key)), sampling) for draw in draws]
    for number, completion in generate(subject, prompts):
        nats, num_bytes = gold[number]
        line = {**_head(draws[number]), "output": subject.tokenizer.decode(completion.tokens)}
        line |= {"num_prompt_tokens": len(prompts[number].tokens), "num_tokens": len(completion.tokens)}
        yield draws[number], completion, line | {"gold_nats": nats, "gold_bytes": num_bytes}
