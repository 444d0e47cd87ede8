"""What it saves to send a conversation back to where it was: python -m benchmarks.routing [--json FILE]

Two instances of SmolLM2-135M, and CONVERSATIONS that take TURNS turns each in a random order, AT_ONCE at a
time. Each instance keeps a little more than half of all they say. Counts the prompt tokens that the instances
have to compute, those that usage does not tell as cached, with each conversation sent to the instance that
has read it (prefix_affinity), and with the instances taking turns (round_robin). Ends with an error when the
first is more than MOST_COMPUTED of the second.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from benchmarks.load import new_client
from benchmarks.servers import MODEL, serving_gallama
from gallama.engines.llama_cpp.context import IDLE_TOKENS_BESIDE_WORK

CONVERSATIONS, TURNS, AT_ONCE = 20, 8, 4
CONVERSATION_TOKENS, KEPT_PART = 410, 0.62
"""What a conversation comes to, and how much of all of them one instance keeps."""
FIRST_WORDS, MORE_WORDS, ANSWER_TOKENS = 160, 12, 4
MOST_COMPUTED = 0.5
WORDS = (
    "llama",
    "mountain",
    "grass",
    "wool",
    "river",
    "stone",
    "cloud",
    "winter",
    "shepherd",
    "village",
    "bread",
)


@dataclass(slots=True)
class Conversation:
    rng: random.Random
    turns_left: int
    messages: list[dict[str, str]] = field(default_factory=list)
    is_busy: bool = False

    def next_words(self) -> str:
        """What the user says next: at first long, as a text to talk about is, then short."""
        return " ".join(self.rng.choices(WORDS, k=MORE_WORDS if self.messages else FIRST_WORDS)) + "?"


@dataclass(frozen=True, slots=True)
class Read:
    """What the instances had to do for all conversations."""

    prompt_tokens: int
    computed_tokens: int


async def take_turn(client: httpx.AsyncClient, base_url: str, conversation: Conversation) -> tuple[int, int]:
    """Let a conversation go on; the tokens of its prompt, and how many of them were cached."""
    conversation.messages.append({"role": "user", "content": conversation.next_words()})
    conversation.turns_left -= 1
    body = {"model": "model", "messages": conversation.messages}
    limits = {"max_tokens": ANSWER_TOKENS, "temperature": 0}
    response = await client.post(f"{base_url}/chat/completions", json=body | limits)
    response.raise_for_status()
    answer = response.json()
    content = answer["choices"][0]["message"]["content"] or ""
    conversation.messages.append({"role": "assistant", "content": content})
    usage = answer["usage"]
    return usage["prompt_tokens"], usage["prompt_tokens_details"]["cached_tokens"]


async def converse(base_url: str, count: int, at_once: int) -> Read:
    """Let so many conversations take their turns, the same ones and in the same order each time."""
    rng = random.Random(0)
    conversations = [Conversation(random.Random(number), TURNS) for number in range(count)]
    prompts: list[tuple[int, int]] = []

    async def go_on(client: httpx.AsyncClient) -> None:
        while idle := [each for each in conversations if each.turns_left and not each.is_busy]:
            taken = rng.choice(idle)
            taken.is_busy = True
            prompts.append(await take_turn(client, base_url, taken))
            taken.is_busy = False

    async with new_client() as client:
        await asyncio.gather(*(go_on(client) for _ in range(at_once)))
    return Read(sum(all_ for all_, _ in prompts), sum(all_ - cached for all_, cached in prompts))


def read_under(policy: str, count: int, at_once: int) -> Read:
    sizes = {"max_seq_len": 512, "cache_size": 512 * (at_once + 1)}  # for those at work, and the idle beside
    kept_tokens = int(KEPT_PART * count * CONVERSATION_TOKENS)
    shelf = {"shelf_tokens": kept_tokens - IDLE_TOKENS_BESIDE_WORK}
    spec = {"model_id": MODEL, "replicas": 2, "backend_extra_args": shelf} | sizes
    with serving_gallama({"model": spec}, server={"policy": policy}) as server:
        return asyncio.run(converse(server.base_url, count, at_once))


def compare(count: int, at_once: int) -> dict[str, Any]:
    """The tokens that both policies let compute for so many conversations, and their ratio."""
    affinity, in_turn = (read_under(policy, count, at_once) for policy in ("prefix_affinity", "round_robin"))
    return {
        "conversations": count,
        "prompt_tokens": affinity.prompt_tokens,
        "computed_with_affinity": affinity.computed_tokens,
        "computed_in_turn": in_turn.computed_tokens,
        "ratio": affinity.computed_tokens / in_turn.computed_tokens,
        "target": MOST_COMPUTED,
    }


def report(row: dict[str, Any]) -> Iterable[str]:
    yield f"{row['conversations']} conversations of {TURNS} turns, {row['prompt_tokens']} prompt tokens"
    yield f"computed with prefix_affinity {row['computed_with_affinity']:8d}"
    yield f"computed with round_robin     {row['computed_in_turn']:8d}"
    verdict = "met" if row["ratio"] <= MOST_COMPUTED else "MISSED"
    yield f"ratio {row['ratio']:.3f}, target {MOST_COMPUTED}: {verdict}"


def main() -> int:
    parser = argparse.ArgumentParser(description="What it saves to send a conversation back to where it was.")
    parser.add_argument("--json", type=Path, help="write the figures to this file, too")
    parser.add_argument("--conversations", type=int, default=CONVERSATIONS, help="default: %(default)s")
    options = parser.parse_args()
    row = compare(options.conversations, AT_ONCE)
    print("\n".join(report(row)))
    if options.json:
        options.json.write_text(json.dumps(row, indent=2) + "\n")
    return int(row["ratio"] > MOST_COMPUTED)


if __name__ == "__main__":
    sys.exit(main())
