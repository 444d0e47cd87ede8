"""The only code that runs the model: pieces of texts in, logits out. Used by one thread."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from gallama.errors import ModelLoadFailed


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens that go on with a text."""

    cache: DynamicCache
    """What was computed of the text before; takes in this piece."""
    token_ids: Sequence[int]
    rows: int
    """How many of the last tokens need logits."""


class CausalModel:
    """A loaded model that goes on with texts."""

    def __init__(self, model: Any, *, vocabulary_size: int) -> None:
        """
        Args:
            vocabulary_size: tokens that there are; logits beyond are padding.
        """
        self._model: Any = model
        self._vocabulary_size = vocabulary_size
        self._input_device = model.get_input_embeddings().weight.device
        self.logits_device: torch.device = self._input_device
        self._keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters
        layers = [type(layer) for layer in self.new_cache().layers]
        self.reads_in_pieces = set(layers) <= {DynamicLayer, DynamicSlidingWindowLayer}
        """Whether a text may be computed in pieces: where a layer sums up what it has read, many models
        forget that when several tokens come at once."""
        self.can_fork = set(layers) == {DynamicLayer}
        """Whether a text may begin with a part of what was computed of another."""

    def new_cache(self) -> DynamicCache:
        return DynamicCache(config=self._model.config)

    def check(self, token_id: int) -> None:
        """Compute a token, and see that the model works as this engine needs it.

        Raises:
            ModelLoadFailed: it does not keep what it has computed, or has too few logits.
        """
        cache = self.new_cache()
        try:
            logits = self._forward(Piece(cache, [token_id], rows=1))
        except (TypeError, ValueError, AttributeError, NotImplementedError) as error:
            raise ModelLoadFailed(
                f"The model's code cannot be run with a cache of transformers: {error}"
            ) from error
        if cache.get_seq_length() != 1:
            raise ModelLoadFailed(
                "The model does not keep what it has computed of a text (it has no cache of its own kind in"
                " transformers), so each token would take as long as all of the text."
            )
        if logits.shape[-1] < self._vocabulary_size:
            raise ModelLoadFailed(
                f"The tokenizer has {self._vocabulary_size} tokens, and the model knows only"
                f" {logits.shape[-1]}: they do not belong together."
            )
        self.logits_device = logits.device

    def compute(self, pieces: Sequence[Piece]) -> list[torch.Tensor]:
        """The logits of each piece's last tokens, shape (rows, vocabulary size), float32."""
        return [self._forward(piece)[:, : self._vocabulary_size].float() for piece in pieces]

    def fork(self, cache: DynamicCache, length: int) -> DynamicCache:
        """A cache of a text's first tokens. It shares their memory; what is added to either is its own."""
        assert self.can_fork
        forked = self.new_cache()
        for new, old in zip(forked.layers, cache.layers, strict=True):
            new.lazy_initialization(old.keys, old.values)
            new.keys, new.values = old.keys[..., :length, :], old.values[..., :length, :]
        return forked

    def close(self) -> None:
        """Let go of the model; nothing can be computed any more."""
        self._model = None

    def _forward(self, piece: Piece) -> torch.Tensor:
        """Shape (rows, logits of the model)."""
        wanted = {"logits_to_keep": max(1, piece.rows)} if self._keeps_logits else {}
        token_ids = torch.tensor([piece.token_ids], dtype=torch.long, device=self._input_device)
        output = self._model(input_ids=token_ids, past_key_values=piece.cache, use_cache=True, **wanted)
        logits: torch.Tensor = output.logits[0]
        return logits[logits.shape[0] - piece.rows :]
