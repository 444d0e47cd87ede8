"""What a client wants to know of texts: their vectors, or how well they answer a query.

Nothing here knows HTTP. The gateway reads this module, and never loads numpy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, Protocol

from msgspec import Struct

from gallama.generation import EngineStatus

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class EmbedRequest(Struct, frozen=True, kw_only=True, tag=True):
    request_id: str
    model: str
    inputs: tuple[str | tuple[int, ...], ...]
    """Texts; each as it is, or as token ids of the model's own vocabulary, special ones included."""
    dimensions: int | None = None
    """Of each vector; None: as many as the model's."""


class Embeddings(Struct, frozen=True, kw_only=True, tag=True):
    vectors: tuple[bytes, ...]
    """One for each input, in their order: float32, little end first, of length 1."""
    prompt_tokens: int


class RerankRequest(Struct, frozen=True, kw_only=True, tag=True):
    request_id: str
    model: str
    query: str
    documents: tuple[str, ...]


class Relevances(Struct, frozen=True, kw_only=True, tag=True):
    scores: tuple[float, ...]
    """How well each document answers the query, 0 to 1, in the order of the documents."""
    prompt_tokens: int


class EmbeddedTexts(Struct, frozen=True, kw_only=True):
    """What an engine makes of texts."""

    vectors: NDArray[np.float32]
    """Shape (texts, dimensions), each row of length 1."""
    tokens: int
    """Of all texts together, special ones included."""


class RankedTexts(Struct, frozen=True, kw_only=True):
    """What an engine makes of a query and documents."""

    scores: Sequence[float]
    """Of each document, 0 to 1."""
    tokens: int
    """Of all pairs together: the query counts once for each document."""


class Embedder(Protocol):
    """One loaded model that makes vectors of texts, or ranks them. Its methods may run many at a time: they
    share its batches."""

    context_length: int
    """Tokens that one text may have, special ones included; of a query and a document together."""
    dimensions: int
    """Of its vectors; 0 where it only ranks."""
    shorter_dimensions: Literal["any"] | tuple[int, ...]
    """The numbers of dimensions to which its vectors may be cut (Matryoshka representation learning);
    () where they may not be."""

    def tokenize(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """The model's tokens of a text."""
        ...

    def token_texts(self, token_ids: Sequence[int]) -> list[bytes]:
        """The text of each token, b"" where it has none.

        Raises:
            InvalidRequest: the model has no such token.
        """
        ...

    async def embed(self, inputs: Sequence[str | Sequence[int]]) -> EmbeddedTexts:
        """
        Args:
            inputs: texts, or their token ids, special ones included.

        Raises:
            ContextLengthExceeded: one is too long; nothing is ever cut.
            InvalidRequest: the model has no such token, or an input has none.
            UnsupportedValue: the model only ranks.
        """
        ...

    async def rerank(self, query: str, documents: Sequence[str]) -> RankedTexts:
        """
        Raises:
            ContextLengthExceeded: the query and one of the documents are too long together.
            UnsupportedValue: the model does not rank.
        """
        ...

    def status(self) -> EngineStatus:
        """`steps` counts forward passes, `busy_slots` the calls that are being worked on."""
        ...

    async def probe(self) -> None:
        """As `generation.Engine.probe`, with a forward pass."""
        ...

    async def close(self) -> None: ...
