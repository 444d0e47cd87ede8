"""What a request has an instance do, as far as it can be known without a tokenizer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from gallama.conversation import ChatRequest
from gallama.embedding import EmbedRequest, RerankRequest
from gallama.pool.routing import estimated_tokens, prefix_blocks
from gallama.pool.routing.prefixes import BYTES_PER_TOKEN
from gallama.tokenization import DetokenizeRequest, TokenizeRequest
from gallama.wire import UnaryRequest


@dataclass(frozen=True, slots=True)
class Work:
    blocks: Sequence[bytes]
    """The names of its prompt's blocks; () where nothing is gained from a beginning that was read before."""
    tokens: int
    """To be read, as estimated."""


def work_of(request: ChatRequest | UnaryRequest) -> Work:
    match request:
        case ChatRequest():
            return Work(prefix_blocks(request), estimated_tokens(request))
        case EmbedRequest(inputs=inputs):
            return Work((), _tokens(inputs))
        case RerankRequest(query=query, documents=documents):
            return Work((), _tokens(documents) + len(documents) * _tokens([query]))
        case TokenizeRequest() | DetokenizeRequest():
            return Work((), 0)  # nothing is computed


def _tokens(inputs: Iterable[str | Sequence[int]]) -> int:
    return sum(
        1 + len(each.encode(errors="surrogatepass")) // BYTES_PER_TOKEN
        if isinstance(each, str)
        else len(each)
        for each in inputs
    )
