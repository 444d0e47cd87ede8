"""The only code that runs the model: pieces of texts in, logits out. Used by one thread."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Sequence
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from gallama.engines.transformers.packing import NAME, Piece, can_pack, forward_packed
from gallama.errors import ModelLoadFailed

logger = logging.getLogger(__name__)

# What two ways to compute the same may differ by, as a part of the logits' range.
_TOLERANCE = {torch.float32: 1e-3}
_COARSE_TOLERANCE = 0.05
# What the same computation may differ by when it is done again.
_REPEATED_TOLERANCE = 0.01


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
        parameters = inspect.signature(model.forward).parameters
        self._keeps_logits = "logits_to_keep" in parameters
        self._takes_positions = "position_ids" in parameters
        layers = [type(layer) for layer in self.new_cache().layers]
        self.reads_in_pieces = set(layers) <= {DynamicLayer, DynamicSlidingWindowLayer}
        """Whether a text may be computed in pieces: where a layer sums up what it has read, many models
        forget that when several tokens come at once."""
        self.can_fork = set(layers) == {DynamicLayer}
        """Whether a text may begin with a part of what was computed of another."""
        self._packs = False

    def new_cache(self) -> DynamicCache:
        return DynamicCache(config=self._model.config)

    def check(self, token_id: int) -> None:
        """Compute a token, and see that the model works as this engine needs it.

        Raises:
            ModelLoadFailed: it computes no numbers, does not keep what it has computed, keeps it where the
                next text finds it, or has too few logits.
        """
        text = [token_id, 1, 2]
        try:
            whole, forgotten = self._alone(text), self._alone(text[-1:])
            logits = self._in_pieces(text)
            interrupted = self._in_pieces(text, meanwhile=[5, 4, 3])
        except (TypeError, ValueError, AttributeError, NotImplementedError) as error:
            raise ModelLoadFailed(
                f"The model's code cannot be run with a cache of transformers: {error}"
            ) from error
        if not torch.isfinite(whole.max()):
            raise ModelLoadFailed(
                f"The model computes no numbers in {whole.dtype}; set another `backend_extra_args.dtype`,"
                " as in `float32`."
            )
        # Rounding moves logits, too; what was forgotten moves them far more.
        if (logits - whole).norm() > (forgotten - whole).norm() / 2:
            raise ModelLoadFailed(
                "The model does not keep what it has computed of a text: its code has no use for a cache of"
                " transformers, so each token would take as long as all of the text."
            )
        if not _are_alike(logits, interrupted, _REPEATED_TOLERANCE):
            raise ModelLoadFailed(
                "The model's code keeps in itself what it has read of a text, and not in a cache, so texts"
                " that are computed at the same time would change each other."
            )
        if logits.shape[-1] < self._vocabulary_size:
            raise ModelLoadFailed(
                f"The tokenizer has {self._vocabulary_size} tokens, and the model knows only"
                f" {logits.shape[-1]}: they do not belong together."
            )
        self.logits_device = logits.device
        self._packs = self.reads_in_pieces and can_pack(self._model) and self._packs_right(token_id)
        logger.info("Texts are computed %s.", "side by side" if self._packs else "one after the other")

    def compute(self, pieces: Sequence[Piece]) -> list[torch.Tensor]:
        """The logits of each piece's last tokens, shape (rows, vocabulary size), float32."""
        rows = (
            forward_packed(self._model, pieces, self._input_device)
            if self._packs
            else [self._forward(piece) for piece in pieces]
        )
        return [row[:, : self._vocabulary_size].float() for row in rows]

    def _alone(self, text: Sequence[int]) -> torch.Tensor:
        """The logits behind a text, shape (1, logits of the model)."""
        return self._forward(Piece(self.new_cache(), text, rows=1))

    def _in_pieces(self, text: Sequence[int], meanwhile: Sequence[int] = ()) -> torch.Tensor:
        """As `_alone`, but the last token is computed after the others, with another text between them."""
        cache = self.new_cache()
        self._forward(Piece(cache, text[:-1], rows=0))
        if meanwhile:
            self._alone(meanwhile)
        return self._forward(Piece(cache, text[-1:], rows=1))

    def _packs_right(self, token_id: int) -> bool:
        """Whether texts that are computed side by side come out as they do alone; then it is left so."""
        texts = [[token_id, 1, 2, 3, 4], [token_id, 5, 6], [token_id]]
        alone = [self._alone(text) for text in texts]
        earlier = self._model.config._attn_implementation
        try:
            self._model.set_attn_implementation(NAME)
            together = self._computed_in_two_steps(texts)
        except Exception as error:  # whatever a model's code makes of it: then it is not computed so
            logger.debug("Texts cannot be computed side by side: %s", error)
            together = None
        if together is not None and all(
            _are_alike(one, other, _TOLERANCE.get(one.dtype, _COARSE_TOLERANCE))
            for one, other in zip(alone, together, strict=True)
        ):
            return True
        self._model.set_attn_implementation(earlier)
        return False

    def _computed_in_two_steps(self, texts: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        """The logits behind each text: first all of the last, and all but two tokens of the others."""
        caches = [self.new_cache() for _ in texts]
        *others, whole = [Piece(cache, text, rows=1) for cache, text in zip(caches, texts, strict=True)]
        beginnings = [Piece(piece.cache, piece.token_ids[:-2], rows=0) for piece in others]
        *_, behind_whole = forward_packed(self._model, [*beginnings, whole], self._input_device)
        endings = [Piece(piece.cache, piece.token_ids[-2:], rows=1) for piece in others]
        return [*forward_packed(self._model, endings, self._input_device), behind_whole]

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
        wanted: dict[str, Any] = {"logits_to_keep": max(1, piece.rows)} if self._keeps_logits else {}
        if self._takes_positions:  # not every model counts on from what is in its cache
            start = piece.cache.get_seq_length()
            positions = torch.arange(start, start + len(piece.token_ids), device=self._input_device)
            wanted["position_ids"] = positions[None]
        token_ids = torch.tensor([piece.token_ids], dtype=torch.long, device=self._input_device)
        output = self._model(input_ids=token_ids, past_key_values=piece.cache, use_cache=True, **wanted)
        logits: torch.Tensor = output.logits[0]
        return logits[logits.shape[0] - piece.rows :]


def _are_alike(one: torch.Tensor, other: torch.Tensor, tolerance: float) -> bool:
    """Whether two rows of logits differ by no more than a part of their range."""
    reach = tolerance * float(one.max() - one.min())
    return bool(torch.allclose(one.float(), other.float(), rtol=0, atol=reach))
