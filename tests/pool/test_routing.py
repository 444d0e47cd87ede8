from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

import pytest

from gallama.config.server_config import RoutingPolicyName
from gallama.conversation import ChatRequest, Message, RawPrompt, ToolCall, ToolChoice, ToolSpec
from gallama.pool.routing import POLICIES, InstanceLoad, PrefixIndex, estimated_tokens, prefix_blocks
from gallama.pool.routing.prefixes import BLOCK_BYTES, COMMON_WAYS, MAX_PROMPT_BYTES
from tests.pool.fake_workers import FakeLauncher, model, running, until
from tests.pool.fake_workers import answer as answer_of

CAPACITY = 16
UNEVEN = CAPACITY // 4 + 1
WORDS = ("llama", "mountain", "grass", "wool", "Ωμέγα", "山", "\n", "a", "of the", "😀")


def load(index: int, *, busy: int = 0, served: int = 0, matched: int = 0) -> InstanceLoad:
    return InstanceLoad(index=index, busy=busy, served=served, capacity=CAPACITY, matched_blocks=matched)


def ask(*messages: Message, **fields: Any) -> ChatRequest:
    return ChatRequest(request_id="r", model="m", messages=messages, **fields)


def raw(prompt: RawPrompt) -> ChatRequest:
    return ChatRequest(request_id="r", model="m", prompt=prompt)


def system(words: str) -> Message:
    return Message(role="system", content=words)


def user(words: str) -> Message:
    return Message(role="user", content=words)


def answer(words: str) -> Message:
    return Message(role="assistant", content=words)


def random_text(rng: random.Random, most_words: int = 300) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(1, most_words)))


def random_messages(rng: random.Random) -> list[Message]:
    return [
        Message(role=rng.choice(("user", "assistant", "tool")), content=random_text(rng)) for _ in "12345"
    ]


def common_length(one: Sequence[bytes], other: Sequence[bytes]) -> int:
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


@dataclass
class Fleet:
    """The instances of one model as the pool knows them."""

    policy: RoutingPolicyName
    size: int
    blocks_read: int = 0
    """Those that the instances did not know."""
    busy: list[int] = field(init=False)
    served: list[int] = field(init=False)
    indexes: list[PrefixIndex] = field(init=False)

    def __post_init__(self) -> None:
        self.busy, self.served = [0] * self.size, [0] * self.size
        self.indexes = [PrefixIndex(100_000) for _ in range(self.size)]

    def give(self, request: ChatRequest) -> int:
        """The instance that a request goes to."""
        blocks = prefix_blocks(request)
        loads = [
            load(i, busy=self.busy[i], served=self.served[i], matched=self.indexes[i].matched(blocks))
            for i in range(self.size)
            if self.busy[i] < CAPACITY
        ]
        index = POLICIES[self.policy](loads).index
        self.busy[index] += 1
        self.served[index] += 1
        self.blocks_read += len(blocks) - self.indexes[index].matched(blocks)
        self.indexes[index].remember(blocks)
        return index

    def converse(
        self, rng: random.Random, conversations: int, turns: int, at_once: int, system_prompt: str = ""
    ) -> list[list[int]]:
        """Let conversations take their turns in a random order; the instances that each one's went to."""
        histories = [[system(system_prompt)] if system_prompt else [] for _ in range(conversations)]
        visited: list[list[int]] = [[] for _ in range(conversations)]
        running: list[int] = []
        while any(len(each) < turns for each in visited):
            idle = [i for i, each in enumerate(visited) if len(each) < turns and i not in running]
            if len(running) == at_once or not idle:
                ended = running.pop(rng.randrange(len(running)))
                histories[ended].append(answer(random_text(rng)))
                self.busy[visited[ended][-1]] -= 1
                continue
            taken = rng.choice(idle)
            histories[taken].append(user(f"{rng.random()} {random_text(rng)}"))
            visited[taken].append(self.give(ask(*histories[taken])))
            running.append(taken)
        return visited


def test_there_is_a_policy_for_each_name_that_may_be_set() -> None:
    assert set(POLICIES) == set(get_args(RoutingPolicyName))


@pytest.mark.parametrize("policy", POLICIES)
def test_the_only_instance_is_picked(policy: RoutingPolicyName) -> None:
    only = load(3, busy=9, served=9)
    assert POLICIES[policy]([only]) is only


@pytest.mark.parametrize("policy", POLICIES)
def test_idle_instances_are_used_evenly(policy: RoutingPolicyName) -> None:
    served = [0, 0, 0]
    for _ in range(30):
        loads = [load(i, served=count) for i, count in enumerate(served)]
        served[POLICIES[policy](loads).index] += 1
    assert served == [10, 10, 10]


def test_least_busy_prefers_the_instance_with_fewer_requests() -> None:
    loads = [load(0, busy=2, served=2), load(1, busy=1, served=50)]
    assert POLICIES["least_busy"](loads).index == 1


def test_round_robin_prefers_the_instance_that_was_given_fewer() -> None:
    loads = [load(0, busy=2, served=2), load(1, busy=1, served=50)]
    assert POLICIES["round_robin"](loads).index == 0


def test_affinity_prefers_the_longest_prefix() -> None:
    loads = [load(0, busy=1, matched=3), load(1, busy=UNEVEN - 1, matched=4), load(2)]
    assert POLICIES["prefix_affinity"](loads).index == 1


def test_affinity_prefers_the_less_busy_of_two_with_the_same_prefix() -> None:
    loads = [load(0, busy=2, matched=4), load(1, busy=1, matched=4), load(2)]
    assert POLICIES["prefix_affinity"](loads).index == 1


def test_an_uneven_load_breaks_affinity() -> None:
    loads = [load(0, busy=UNEVEN, matched=100), load(1, busy=0), load(2, busy=1)]
    assert POLICIES["prefix_affinity"](loads).index == 1


@pytest.mark.parametrize("capacity", [1, 2, 4])
def test_one_request_more_is_no_uneven_load(capacity: int) -> None:
    loads = [
        InstanceLoad(index=i, busy=busy, served=0, capacity=capacity, matched_blocks=busy)
        for i, busy in enumerate((0, 1))
    ]
    assert POLICIES["prefix_affinity"](loads).index == 1


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("at_once", [1, 4])
@pytest.mark.parametrize("system_prompt", ["", "Be a llama. " * 2000], ids=["none", "common"])
def test_conversations_are_spread_evenly_and_stay_with_their_instance(
    size: int, at_once: int, system_prompt: str
) -> None:
    for seed in range(5):
        fleet = Fleet("prefix_affinity", size)
        visited = fleet.converse(
            random.Random(seed), conversations=40, turns=5, at_once=at_once, system_prompt=system_prompt
        )
        assert all(len(set(each)) == 1 for each in visited), visited
        conversations_of = Counter(each[0] for each in visited)
        assert min(conversations_of[i] for i in range(size)) >= 0.6 * 40 / size


def test_many_requests_with_one_prompt_fill_all_instances() -> None:
    fleet, request = Fleet("prefix_affinity", 3), ask(user("the same " * 1000))
    for _ in range(3 * CAPACITY):
        fleet.give(request)
    assert fleet.busy == [CAPACITY] * 3


def test_no_instance_has_much_more_to_do_than_another() -> None:
    rng = random.Random(0)
    fleet = Fleet("prefix_affinity", 3)
    document = random_text(rng, 2000)
    for _ in range(2 * CAPACITY):
        fleet.give(ask(user(document + rng.choice(("1", "2")))))
        assert max(fleet.busy) - min(fleet.busy) <= UNEVEN


def test_affinity_has_less_to_read_than_taking_turns() -> None:
    def read(policy: RoutingPolicyName) -> int:
        fleet = Fleet(policy, 2)
        fleet.converse(random.Random(0), conversations=20, turns=5, at_once=3)
        return fleet.blocks_read

    assert read("prefix_affinity") < 0.6 * read("round_robin")


def test_a_later_turn_has_all_blocks_of_the_turn_before() -> None:
    rng = random.Random(0)
    for _ in range(100):
        messages = random_messages(rng)
        before = prefix_blocks(ask(*messages))
        after = prefix_blocks(ask(*messages, answer(random_text(rng)), user(random_text(rng))))
        assert after[: len(before)] == before
        assert len(after) > len(before)


def test_no_block_behind_a_change_is_shared() -> None:
    rng = random.Random(0)
    for _ in range(100):
        messages = random_messages(rng)
        place = rng.randrange(len(messages))
        cut = rng.randrange(len(messages[place].content) + 1)
        words = messages[place].content[:cut] + "!" + messages[place].content[cut:]
        changed = [
            *messages[:place],
            Message(role=messages[place].role, content=words),
            *messages[place + 1 :],
        ]
        one, other = prefix_blocks(ask(*messages, user("x"))), prefix_blocks(ask(*changed, user("x")))
        shared = common_length(one, other)
        assert not set(one[shared:]) & set(other[shared:])
        before_change = prefix_blocks(ask(*messages[:place]))
        assert len(before_change) <= shared < min(len(one), len(other))


@pytest.mark.parametrize(
    "other",
    [
        ask(system("Hi"), user("there")),
        ask(user("Hi"), user("ther")),
        ask(user("Hithere")),
        ask(user("Hi"), Message(role="user", content="there", name="Ana")),
        ask(user("Hi"), answer("Hello"), user("there")),
        ask(user("Hi"), Message(role="assistant", tool_calls=(ToolCall(id="1", name="f", arguments=""),))),
        ask(user("Hi"), user("there"), tools=(ToolSpec(name="f"),)),
        ask(user("Hi"), user("there"), leading_prompt="Well"),
    ],
)
def test_prompts_that_differ_have_different_blocks(other: ChatRequest) -> None:
    assert prefix_blocks(other) != prefix_blocks(ask(user("Hi"), user("there")))


def test_what_templates_do_not_show_makes_no_difference() -> None:
    tools = (ToolSpec(name="f"),)
    plain = ask(
        user("Hi"), Message(role="assistant", tool_calls=(ToolCall(id="1", name="f", arguments="{}"),))
    )
    other = ask(
        user("Hi"),
        Message(role="assistant", tool_calls=(ToolCall(id="2", name="f", arguments="{}"),), reasoning="Hm."),
        tools=tools,
        tool_choice=ToolChoice(mode="none"),
        max_tokens=3,
    )
    assert prefix_blocks(ask(*plain.messages, user("?"))) == prefix_blocks(
        ask(*other.messages, user("?"), tools=tools, tool_choice=ToolChoice(mode="none"))
    )


def test_of_a_huge_prompt_only_the_beginning_has_blocks() -> None:
    most = MAX_PROMPT_BYTES // BLOCK_BYTES
    huge = [ask(user("山" * MAX_PROMPT_BYTES)), ask(*[user("")] * 10_000), ask(*[user("x" * 700)] * 10_000)]
    assert all(0 < len(prefix_blocks(request)) <= most for request in huge)
    assert prefix_blocks(huge[0]) == prefix_blocks(ask(*huge[0].messages, user("more")))


def test_an_index_knows_what_it_was_given_and_nothing_else() -> None:
    rng = random.Random(0)
    index, given = PrefixIndex(None), []
    for _ in range(20):
        blocks = prefix_blocks(ask(user(f"{rng.random()} {random_text(rng)}")))
        assert index.matched(blocks) == 0
        index.remember(blocks)
        given.append(blocks)
    assert [index.matched(blocks) for blocks in given] == [len(blocks) for blocks in given]


def test_an_index_that_forgot_knows_nothing() -> None:
    index, blocks = PrefixIndex(None), prefix_blocks(ask(user("Hi")))
    index.remember(blocks)
    index.forget()
    assert (index.matched(blocks), len(index)) == (0, 0)


def test_a_beginning_that_went_on_in_many_ways_counts_for_nothing() -> None:
    index, common = PrefixIndex(None), system("Be a llama. " * 200)
    for way in range(COMMON_WAYS):
        assert index.matched(prefix_blocks(ask(common, user("new")))) == len(index) - way
        index.remember(prefix_blocks(ask(common, user(str(way)))))
    assert index.matched(prefix_blocks(ask(common, user("new")))) == 0
    old = prefix_blocks(ask(common, user("0")))
    assert index.matched(old) == len(old)


def test_an_index_is_bounded_by_the_cache_and_drops_what_was_used_longest_ago() -> None:
    cache_tokens, bytes_of_prompts = 40_000, 16_000
    index = PrefixIndex(cache_tokens)
    prompts = [prefix_blocks(ask(user(f"{i} " + "x" * bytes_of_prompts))) for i in range(100)]
    for prompt in prompts:
        index.remember(prompt)
        index.remember(prompts[0])
    kept = [number for number, prompt in enumerate(prompts) if index.matched(prompt) == len(prompt)]
    assert len(index) * BLOCK_BYTES <= 4 * 2 * cache_tokens
    assert kept == [0, *range(100 - len(kept) + 1, 100)]
    assert len(kept) >= cache_tokens * 4 // bytes_of_prompts


def test_an_index_drops_the_end_of_a_prompt_before_its_beginning() -> None:
    rng = random.Random(0)
    index = PrefixIndex(1)
    for _ in range(50):
        prompt = prefix_blocks(ask(*[user(random_text(rng, 3000)) for _ in range(4)]))
        index.remember(prompt)
        assert index.matched(prompt) == min(len(prompt), len(index))


def test_a_prompt_longer_than_the_cache_is_known_by_its_beginning() -> None:
    index = PrefixIndex(1)
    prompt = prefix_blocks(ask(user("x" * MAX_PROMPT_BYTES)))
    index.remember(prompt)
    assert 0 < index.matched(prompt) == len(index) < len(prompt)


def test_tokens_are_estimated_from_all_that_the_model_reads() -> None:
    text = "The llama lives in the mountains and eats grass. " * 100
    request = ask(user(text))
    estimate = estimated_tokens(request)
    assert 0.2 * len(text) < estimate < 0.3 * len(text)
    longer = [
        ask(user(text), answer(text)),
        ask(user(text), tools=(ToolSpec(name="f", description=text),)),
        ask(user(text), leading_prompt=text),
    ]
    assert all(1.9 * estimate < estimated_tokens(each) < 2.1 * estimate for each in longer)


def test_even_an_empty_prompt_has_a_token() -> None:
    assert estimated_tokens(ask()) >= 1


async def test_the_pool_sends_conversations_back_and_spreads_them() -> None:
    launcher = FakeLauncher()
    async with running(model(replicas=2), launcher=launcher, policy="prefix_affinity") as pool:
        await pool.settled()
        for text in random.Random(0).sample([f"conversation {i}" for i in range(10)] * 3, k=30):
            await answer_of(pool, text)
    texts = [set(worker.asked) for worker in launcher.workers]
    assert not texts[0] & texts[1]
    assert min(len(each) for each in texts) >= 3


async def test_the_pool_forgets_what_a_worker_that_died_had_read() -> None:
    launcher = FakeLauncher()
    async with running(model(replicas=2), launcher=launcher, policy="prefix_affinity") as pool:
        await pool.settled()
        await answer_of(pool, "a long story")
        first = next(worker for worker in launcher.workers if worker.asked)
        first.die()
        await until(lambda: len(launcher.workers) == 3 and pool.find("m").states == ("ready", "ready"))
        await answer_of(pool, "a long story")
    assert [worker.asked for worker in launcher.workers if worker is not first] == [["a long story"], []]


# Prompts without messages


def test_a_raw_prompt_that_goes_on_has_the_blocks_of_its_beginning() -> None:
    rng = random.Random(0)
    for _ in range(50):
        beginning = random_text(rng) + random_text(rng)
        shorter, longer = (raw(RawPrompt(text=text)) for text in (beginning, beginning + random_text(rng)))
        whole_blocks = len(beginning.encode()) // BLOCK_BYTES
        assert common_length(prefix_blocks(shorter), prefix_blocks(longer)) >= whole_blocks


def test_raw_prompts_that_differ_have_other_blocks() -> None:
    prompts = [
        RawPrompt(text="a" * 2000),
        RawPrompt(text="b" * 2000),
        RawPrompt(token_ids=(1,) * 1000),
        RawPrompt(token_ids=(2,) * 1000),
    ]
    firsts = [prefix_blocks(raw(prompt))[0] for prompt in prompts]
    assert len(set(firsts)) == len(prompts)
    assert prefix_blocks(raw(RawPrompt(text="a", suffix="b"))) != prefix_blocks(raw(RawPrompt(text="a")))


def test_the_tokens_of_a_raw_prompt_are_estimated_or_counted() -> None:
    assert estimated_tokens(raw(RawPrompt(text="a" * 4000))) == 1001
    assert estimated_tokens(raw(RawPrompt(text="a" * 4000, suffix="b" * 400))) == 1101
    assert estimated_tokens(raw(RawPrompt(token_ids=(50_000,) * 1000))) == 1000
    assert estimated_tokens(raw(RawPrompt(token_ids=(50_000,) * 1000, suffix="b" * 400))) == 1100
