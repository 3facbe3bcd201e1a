"""Generation: a batch gives what each prompt gives alone, tools included, and a broken cache is noticed."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest
import torch

import chateval.ask.generate
from chateval.ask.generate import Completion, Prompt, Sampling, generate
from chateval.ask.kv_cache import KeyValueCache

GREEDY = Sampling(max_new_tokens=24)
SCRIPTED = Sampling(max_new_tokens=64)
NUM_PROMPTS = 200


def with_sampling(prompts, sampling) -> list[Prompt]:
    return [prompt._replace(sampling=sampling) for prompt in prompts]


def answers(subject, prompts, sampling=GREEDY, batch_size=32) -> list[Completion]:
    found = {}
    for first in range(0, len(prompts), batch_size):
        for number, completion in generate(subject, with_sampling(prompts[first : first + batch_size], sampling)):
            found[first + number] = completion
    assert sorted(found) == list(range(len(prompts)))
    return [found[number] for number in range(len(prompts))]


def plain_answer(subject, prompt, num_tokens) -> list[int]:
    """The reference: the whole text through the model again for every token, no cache, no tool."""
    ids = list(prompt.tokens)
    ends = [subject.tokenizer.special_ids[name] for name in ("<|assistant_end|>", "<|bos|>")]
    while len(ids) - len(prompt.tokens) < num_tokens:
        token = int(subject.logits(subject.hidden(torch.tensor([ids]))[0, -1]).argmax())
        if token in ends:
            break
        ids.append(token)
    return ids[len(prompt.tokens) :]


def random_prompts(tokenizer, seed=0) -> list[Prompt]:
    draw = random.Random(seed)
    bos, start = (tokenizer.special_ids[name] for name in ("<|bos|>", "<|assistant_start|>"))
    texts = [[draw.randrange(390) for _ in range(draw.randint(1, 60))] for _ in range(NUM_PROMPTS)]
    return [Prompt([bos, *text, start], str(number)) for number, text in enumerate(texts)]


def sums(tokenizer) -> list[Prompt]:
    draw = random.Random(1)
    pairs = [(draw.randint(0, 10 ** draw.randint(1, 6)), draw.randint(0, 99)) for _ in range(NUM_PROMPTS)]
    bos, start = (tokenizer.special_ids[name] for name in ("<|bos|>", "<|assistant_start|>"))
    return [Prompt([bos, *tokenizer.encode_ordinary(f"{a} {b}"), start], f"{a} {b}") for a, b in pairs]


@pytest.fixture
def eager_subject(random_subject, monkeypatch):
    """Random weights that, drawn from, often call the tool, and a tool that answers whatever it is given."""
    special = random_subject.tokenizer.special_ids
    monkeypatch.setattr(chateval.ask.generate, "calculate", lambda text: str(len(text) * 37))
    weight = random_subject.model.lm_head.weight
    before = weight.detach().clone()
    usual = random_subject.hidden(torch.arange(390)[None])[0].mean(0)
    with torch.no_grad():
        weight.div_(8)  # flat enough that draws vary
        for name, logit in (("python_start", 4.5), ("python_end", 4.5), ("assistant_end", 3.0)):
            weight[special[f"<|{name}|>"]] = usual * (logit / usual.square().sum())
    yield random_subject
    with torch.no_grad():
        weight.copy_(before)


DRAWN = Sampling(temperature=1.0, max_new_tokens=24)


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN])
def test_a_batch_gives_what_each_prompt_gives_alone(random_subject, sampling) -> None:
    """200 prompts, random weights. Where ids differ, the two best logits must be within 1e-4."""
    prompts = random_prompts(random_subject.tokenizer)
    together, alone = answers(random_subject, prompts, sampling), answers(random_subject, prompts, sampling, 1)
    near_ties = []
    for number, (a, b) in enumerate(zip(together, alone, strict=True)):
        if a == b:
            continue
        place = next(i for i, (x, y) in enumerate(zip(a.tokens, b.tokens, strict=False)) if x != y)
        text = torch.tensor([[*prompts[number].tokens, *a.tokens[:place]]])
        best = random_subject.logits(random_subject.hidden(text)[0, -1]).topk(2).values
        assert best[0] - best[1] < 1e-4, f"prompt {number}, token {place}"
        near_ties.append((number, place, float(best[0] - best[1])))
    print("near ties:", near_ties)
    assert len(near_ties) <= NUM_PROMPTS // 100
    assert len({completion.tokens for completion in together}) > NUM_PROMPTS // 2
    assert "max_tokens" in {completion.ending for completion in together}


def test_tools_in_a_batch_are_those_of_each_prompt(eager_subject) -> None:
    """200 prompts, random weights, hundreds of tool calls at different places of different rows."""
    prompts = random_prompts(eager_subject.tokenizer)
    together, alone = answers(eager_subject, prompts, DRAWN), answers(eager_subject, prompts, DRAWN, 1)
    assert sum(a != b for a, b in zip(together, alone, strict=True)) <= NUM_PROMPTS // 100
    calls = sum(completion.tool_calls for completion in together)
    forced = sum(sum(completion.forced) for completion in together)
    print(f"{calls} calls, {forced} forced tokens")
    assert calls > 100 and forced > 400, "the comparison says nothing about tools"
    assert len({completion.ending for completion in together}) > 1


def test_the_cache_gives_what_the_whole_text_gives(random_subject) -> None:
    prompts = random_prompts(random_subject.tokenizer, seed=3)[:12]
    for prompt, completion in zip(prompts, answers(random_subject, prompts), strict=True):
        if completion.tool_calls == 0:
            assert list(completion.tokens) == plain_answer(random_subject, prompt, 24)


def test_the_scripted_model_calls_the_tool(scripted_subject) -> None:
    tokenizer = scripted_subject.tokenizer
    prompts = sums(tokenizer)
    together = answers(scripted_subject, prompts, SCRIPTED)
    assert together == answers(scripted_subject, prompts, SCRIPTED, batch_size=1)
    for prompt, completion in zip(prompts, together, strict=True):
        a, b = map(int, prompt.key.split())
        result = f"<|python_start|>{a}+{b}<|python_end|><|output_start|>{a + b}<|output_end|>#### {a + b}"
        assert tokenizer.decode(completion.tokens) == result
        assert (completion.ending, completion.tool_calls, completion.tool_failures) == ("assistant_end", 1, 0)
        output = [t for t, f in zip(completion.tokens, completion.forced, strict=True) if f]
        assert tokenizer.decode(output) == f"<|output_start|>{a + b}<|output_end|>"


def keep_other_rows(self, rows) -> None:
    KEEP(self, [*rows[1:], rows[0]])


def see_one_slot_too_few(self, positions, longest) -> None:
    ADVANCE(self, positions, longest)
    self._mask = self._mask & (torch.arange(self._num_read) != (positions - 1)[:, None])[:, None, None, :]


def write_one_slot_behind(self, positions, longest) -> None:
    ADVANCE(self, positions, longest)
    self._positions = (positions - 1).clamp(min=0)


KEEP, ADVANCE = KeyValueCache.keep, KeyValueCache.advance


@pytest.mark.parametrize(
    ("method", "sabotage"),
    [("keep", keep_other_rows), ("advance", see_one_slot_too_few), ("advance", write_one_slot_behind)],
)
def test_a_sabotaged_cache_is_noticed(scripted_subject, eager_subject, monkeypatch, method, sabotage) -> None:
    for subject, prompts, sampling in (
        (scripted_subject, sums(scripted_subject.tokenizer)[:40], SCRIPTED),
        (eager_subject, random_prompts(eager_subject.tokenizer)[:40], DRAWN),
    ):
        right = answers(subject, prompts, sampling)
        with monkeypatch.context() as patch:
            patch.setattr(KeyValueCache, method, sabotage)
            assert answers(subject, prompts, sampling) != right


def test_slots_read_in_multiples_of_64_change_no_answer(random_subject, scripted_subject, monkeypatch) -> None:
    """What a GPU does, on the CPU: the mask hides the other slots, and a batch reads few different numbers of them."""
    read = []

    def rounded(self, positions, longest) -> None:
        self._multiple = 64
        ADVANCE(self, positions, longest)
        read.append((longest, self._num_read, self.keys.size(2)))

    cases = (
        (random_subject, random_prompts(random_subject.tokenizer)[:40], GREEDY),
        (scripted_subject, sums(scripted_subject.tokenizer)[:40], SCRIPTED),
    )
    exact = [answers(*case) for case in cases]
    with monkeypatch.context() as patch:
        patch.setattr(KeyValueCache, "advance", rounded)
        found = [answers(*case) for case in cases]
    assert sum(a != b for a, b in zip(exact[0], found[0], strict=True)) <= 1  # a near tie
    assert exact[1] == found[1]
    for longest, num_read, num_slots in read:
        assert num_read == min(-(-(longest + 1) // 64) * 64, num_slots)  # no slot is made for rounding
    assert len({num_read for _, num_read, _ in read}) < 5 < len({longest for longest, _, _ in read})


def test_a_failed_call_leaves_the_model_to_go_on(scripted_subject) -> None:
    """ "one 2" is no sum: nothing is forced, and the script asks on until it is cut."""
    tokenizer = scripted_subject.tokenizer
    bos, start = (tokenizer.special_ids[name] for name in ("<|bos|>", "<|assistant_start|>"))
    prompt = Prompt([bos, *tokenizer.encode_ordinary("one 2"), start])
    ((_, completion),) = generate(scripted_subject, with_sampling([prompt], Sampling(max_new_tokens=12)))
    assert tokenizer.decode(completion.tokens).startswith("<|python_start|>one+2<|python_end|>???")
    assert (completion.tool_calls, completion.tool_failures, sum(completion.forced)) == (1, 1, 0)
    assert completion.ending == "max_tokens" and len(completion.tokens) == 12


def test_draws_are_those_of_the_prompt_not_of_the_batch(random_subject) -> None:
    prompts = random_prompts(random_subject.tokenizer)[:24]
    sampling = Sampling(temperature=1.0, top_k=50, max_new_tokens=16)
    together = answers(random_subject, prompts, sampling)
    assert together == answers(random_subject, prompts[::-1], sampling, batch_size=5)[::-1]
    other_draw = [Prompt(prompt.tokens, prompt.key + "/1") for prompt in prompts]
    assert sum(a == b for a, b in zip(together, answers(random_subject, other_draw, sampling), strict=True)) < 3
    assert together != answers(random_subject, prompts, Sampling(1.0, 50, 16, seed=7))


def rows(number, sampling) -> list:
    prompt = Prompt([0], "", sampling)
    return [chateval.ask.generate._Row(prompt, i, i, random.Random(i)) for i in range(number)]


def choose(logits, rows) -> list[int]:
    return chateval.ask.generate._choose(logits, rows)


def test_draws_follow_the_probabilities(scripted_subject) -> None:
    """10,000 draws from softmax([0, log 2, log 3, log 4]): 10, 20, 30, 40 %; with the best two: 0, 0, 3/7, 4/7."""
    logits = torch.tensor([[1.0, 2.0, 3.0, 4.0]]).log().expand(10_000, 4)
    for sampling, shares in (
        (Sampling(1.0), [0.1, 0.2, 0.3, 0.4]),
        (Sampling(1.0, 2), [0, 0, 3 / 7, 4 / 7]),
        (Sampling(1.0, top_p=0.69), [0, 0, 3 / 7, 4 / 7]),
        (Sampling(1.0, top_p=0.71), [0, 2 / 9, 3 / 9, 4 / 9]),
        (Sampling(1.0, top_p=0.0), [0, 0, 0, 1]),
        (Sampling(1.0, 3, top_p=0.75), [0, 0, 3 / 7, 4 / 7]),  # of the best three: 2/9, 3/9, 4/9
    ):
        counts = Counter(choose(logits, rows(10_000, sampling)))
        assert [counts[i] / 10_000 for i in range(4)] == pytest.approx(shares, abs=0.02)
    cold = Counter(choose(logits, rows(10_000, Sampling(temperature=0.02))))
    assert cold[3] > 9_950


def test_on_another_device_draws_come_from_its_softmax_in_fp32(monkeypatch) -> None:
    """Stands in for a GPU, where the softmax of 32 × 65,536 logits in float64 took 20 ms on the CPU."""
    logits = 5 * torch.randn(50, 200, generator=torch.Generator().manual_seed(0))

    def draws(logits, top_k) -> list[int]:
        some = [replace(row, cache_row=49 - row.number) for row in rows(50, Sampling(0.7, top_k))]
        return choose(logits, some)

    class OnDevice(torch.Tensor):
        """A tensor of the CPU that says it is on a GPU."""

        device = torch.device("cuda")

    softmax, dtypes = torch.Tensor.softmax, []
    note = lambda x, dim: dtypes.append(x.dtype) or softmax(x.as_subclass(torch.Tensor), dim)  # noqa: E731
    for top_k in (None, 20):
        on_cpu = draws(logits, top_k)
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "softmax", note)
            assert draws(logits.as_subclass(OnDevice), top_k) == on_cpu
            assert draws(logits, top_k) == on_cpu
    assert dtypes == [torch.float32, torch.float64] * 2
    # as drawn before there was a device to choose
    assert draws(logits, None)[:8] == [116, 56, 179, 113, 138, 134, 193, 144]


def test_equal_logits_give_the_lowest_id() -> None:
    assert choose(torch.tensor([[1.0, 5.0, 5.0], [2.0, 2.0, 2.0]]), rows(2, GREEDY)) == [1, 0]


def test_rows_of_a_batch_have_their_own_sampling(random_subject) -> None:
    """Draws of one row do not depend on the temperature, top_k, top_p or length of the others."""
    kinds = [GREEDY, Sampling(1.0, None, 24), Sampling(0.7, 20, 12, 7), Sampling(1.3, None, 30, 8, 0.6)]
    prompts = random_prompts(random_subject.tokenizer)[:24]
    mixed = [prompt._replace(sampling=kinds[i % 4]) for i, prompt in enumerate(prompts)]
    together = dict(generate(random_subject, mixed))
    alone = [next(generate(random_subject, [prompt]))[1] for prompt in mixed]
    assert [together[i] for i in range(24)] == alone
    assert {len(answer.tokens) for answer in alone} >= {12, 24, 30}


def test_on_token_ends_a_row_and_no_other(random_subject) -> None:
    prompts = with_sampling(random_prompts(random_subject.tokenizer)[:8], DRAWN)
    seen = Counter()

    def third_of_two(number, token, forced) -> bool:
        seen[number] += 1
        return number in (2, 5) and seen[number] == 3

    whole, found = dict(generate(random_subject, prompts)), dict(generate(random_subject, prompts, third_of_two))
    for number in range(8):
        if number in (2, 5):
            assert (found[number].ending, found[number].tokens) == ("stopped", whole[number].tokens[:3])
        else:
            assert found[number] == whole[number]


def test_answers_end_where_the_positions_do(make_subject) -> None:
    subject = make_subject(num_positions=32)
    bos = subject.tokenizer.special_ids["<|bos|>"]
    prompts = [Prompt([bos] * length) for length in (30, 31, 32, 40)]
    found = answers(subject, prompts)
    assert [completion.ending for completion in found] == ["context"] * 4
    assert [len(completion.tokens) for completion in found] == [2, 1, 0, 0]  # the last position is used
