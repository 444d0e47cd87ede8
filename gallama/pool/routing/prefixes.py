"""Which prompts have the same beginning, as far as one can know without a tokenizer.

A prompt is cut into blocks, and each block is named by a digest of all that stands up to its end:

    tools | system message | the user's first words | (answer) | the user's next words | ...
      b1       b2  b3               b4                                b5

So two prompts with n blocks in common have the same beginning. A block ends with its message, so that the
next turn of a conversation has every block of the turn before. What the assistant said is part of the
digests, but makes no blocks: whoever has the prompt in front of it has written it.
"""

from __future__ import annotations

import hashlib
import math
from collections import OrderedDict
from collections.abc import Iterator, Sequence

import msgspec

from gallama.conversation import ChatRequest, Message, RawPrompt

BYTES_PER_TOKEN = 4
"""What English text takes, with vocabularies of 50,000 to 250,000 tokens; code and JSON take about 3."""
BLOCK_BYTES = 512
MAX_PROMPT_BYTES = 2**20
"""As much of a prompt is looked at: about 260,000 tokens, or 2,048 blocks."""
COMMON_WAYS = 4
"""A beginning from which prompts went on in so many ways is no conversation's own. Less would take one away
whose client asks for a title and other things beside it."""

_DIGEST_BYTES = 8
_TOKENS_OF_A_MESSAGE = 4
"""What a chat template puts around it, about."""
_DEFAULT_CACHE_TOKENS = 32_768
_MIN_BLOCKS = 256


def prefix_blocks(request: ChatRequest) -> tuple[bytes, ...]:
    """The names of the blocks of a request's prompt, in order; what is behind `MAX_PROMPT_BYTES` has none."""
    blocks: list[bytes] = []
    digest, room = b"", MAX_PROMPT_BYTES
    for words, is_answer in _parts(request):
        read = words[:room].encode(errors="surrogatepass")[:room]
        if is_answer:
            digest = _digest(digest, read)
        else:
            for start in range(0, len(read), BLOCK_BYTES):
                digest = _digest(digest, read[start : start + BLOCK_BYTES])
                blocks.append(digest)
        room -= math.ceil(len(read) / BLOCK_BYTES) * BLOCK_BYTES
        if room <= 0:
            break
    return tuple(blocks)


def estimated_tokens(request: ChatRequest) -> int:
    """About how many tokens a request's prompt has, by its bytes; see `BYTES_PER_TOKEN`. At least 1."""
    if request.prompt is not None and request.prompt.token_ids:
        return len(request.prompt.token_ids) + len((request.prompt.suffix or "").encode()) // BYTES_PER_TOKEN
    size = sum(len(words.encode(errors="surrogatepass")) for words, _ in _parts(request))
    return 1 + size // BYTES_PER_TOKEN + _TOKENS_OF_A_MESSAGE * len(request.messages)


def _parts(request: ChatRequest) -> Iterator[tuple[str, bool]]:
    """The words of a prompt, in the order in which templates show them, and whether they are an answer."""
    if request.prompt is not None:
        yield from ((words, False) for words in _raw_parts(request.prompt))
    if request.tools and request.tool_choice.mode != "none":
        yield msgspec.json.encode(request.tools).decode(), False
    for message in request.messages:
        yield _words(message), message.role == "assistant"
    if request.leading_prompt:
        yield request.leading_prompt, False


def _raw_parts(prompt: RawPrompt) -> Iterator[str]:
    yield " ".join(map(str, prompt.token_ids)) if prompt.token_ids else prompt.text
    if prompt.suffix is not None:
        yield prompt.suffix


def _words(message: Message) -> str:
    """Without what some templates or clients leave out: thoughts, and the ids of calls."""
    calls = (f"\0{call.name}\0{call.arguments}" for call in message.tool_calls)
    return f"{message.role}\0{message.name or ''}\0{message.content}{''.join(calls)}"


def _digest(before: bytes, words: bytes) -> bytes:
    return hashlib.blake2b(before + words, digest_size=_DIGEST_BYTES).digest()


class PrefixIndex:
    """What one instance was given to read and may still have in its cache: about as much as that holds.

    Blocks go in the order in which they were used last, and never before those that stand behind them.
    """

    def __init__(self, cache_tokens: int | None) -> None:
        """`cache_tokens`: of the instance, which keeps as many again on its shelf; None: as many as usual."""
        tokens_of_a_block = BLOCK_BYTES // BYTES_PER_TOKEN
        blocks = 2 * (cache_tokens or _DEFAULT_CACHE_TOKENS) // tokens_of_a_block
        self._max_blocks = max(blocks, _MIN_BLOCKS)
        self._ways: OrderedDict[bytes, int] = OrderedDict()
        """Of each block: in how many ways prompts went on from it."""

    def __len__(self) -> int:
        return len(self._ways)

    def matched(self, blocks: Sequence[bytes]) -> int:
        """How many blocks, from the first one on, it knows; 0 where that is but a common beginning."""
        known, ways = 0, 0
        for block in blocks:
            if block not in self._ways:
                break
            known, ways = known + 1, self._ways[block]
        return known if ways < COMMON_WAYS else 0

    def remember(self, blocks: Sequence[bytes]) -> None:
        """Take note of a prompt that the instance is given to read."""
        kept = blocks[: self._max_blocks]
        for before, block in zip((None, *kept), kept, strict=False):
            if block not in self._ways:
                self._ways[block] = 0
                if before is not None:
                    self._ways[before] += 1
        for block in reversed(kept):
            self._ways.move_to_end(block)
        while len(self._ways) > self._max_blocks:
            self._ways.popitem(last=False)

    def forget(self) -> None:
        """Its process has ended, and its cache with it."""
        self._ways.clear()
