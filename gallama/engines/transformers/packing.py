"""Pieces of several texts in one forward pass, without padding.

The tokens stand in one row; all but attention treats each token alone. In attention each text has its turn,
over its own cache:

    pieces     [a4 a5 a6] [b9] [c0 c1]       one row of six tokens, with their positions in their own texts
    attention  a4..a6 over a0..a6,   b9 over b0..b9,   c0 c1 over c0 c1

That goes for models whose attention is looked up by name, and which hand on what they do not know; see
`can_pack`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AttentionInterface, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

NAME = "gallama_packed"
_KNOWN_LAYERS = {"full_attention", "sliding_attention"}


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens that go on with a text."""

    cache: DynamicCache
    """What was computed of the text before; takes in this piece."""
    token_ids: Sequence[int]
    rows: int
    """How many of the last tokens need logits."""


@dataclass(frozen=True, slots=True)
class _Row:
    """What attention must know of the row that is computed."""

    caches: Sequence[DynamicCache]
    lengths: Sequence[int]
    masks: dict[tuple[int, int, int | None], torch.Tensor | None]
    """Those of this row, by queries, keys and window: most layers need the same."""


def can_pack(model: Any) -> bool:
    """Whether a model looks up its attention, and has no other kinds of it than are known here."""
    config = model.config.get_text_config()
    layers = set(getattr(config, "layer_types", None) or ())
    return (
        bool(getattr(model, "_supports_attention_backend", False))
        and config._attn_implementation == "sdpa"
        and layers <= _KNOWN_LAYERS
        and getattr(config, "is_causal", True)
    )


def forward_packed(model: Any, pieces: Sequence[Piece], device: torch.device) -> list[torch.Tensor]:
    """The logits of each piece's last tokens, shape (rows, logits of the model).

    Args:
        model: its attention is the one of `NAME`.
        device: where its input goes.
    """
    row = _Row([piece.cache for piece in pieces], [len(piece.token_ids) for piece in pieces], {})
    positions = [torch.arange(len(piece.token_ids)) + piece.cache.get_seq_length() for piece in pieces]
    places: list[int] = []
    ends = 0
    for piece in pieces:
        ends += len(piece.token_ids)
        places += range(ends - piece.rows, ends)
    if not places:
        places = [ends - 1]  # a model computes some logits in any case
    output = model(
        input_ids=torch.tensor([[token for piece in pieces for token in piece.token_ids]], device=device),
        position_ids=torch.cat(positions)[None].to(device),
        use_cache=False,
        logits_to_keep=torch.tensor(places, device=device),
        packed_row=row,
    )
    counts = [piece.rows for piece in pieces]
    return list(output.logits[0][: sum(counts)].split(counts))


def attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    packed_row: _Row,
    **settings: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of one layer: each text's tokens over its own cache.

    Args:
        query: shape (1, heads, tokens of all texts, head size); key and value with their own heads.

    Returns:
        Shape (1, tokens, heads, head size), and no weights.
    """
    assert attention_mask is None, "there is no mask for a row of several texts"
    settings.pop("position_ids", None)
    attended = []
    lengths = list(packed_row.lengths)
    parts = (query.split(lengths, dim=2), key.split(lengths, dim=2), value.split(lengths, dim=2))
    for cache, own_query, own_key, own_value in zip(packed_row.caches, *parts, strict=True):
        keys, values = cache.update(own_key, own_value, module.layer_idx)
        window = getattr(cache.layers[module.layer_idx], "sliding_window", None)
        shape = (own_query.shape[2], keys.shape[2], window)
        if shape not in packed_row.masks:
            packed_row.masks[shape] = _causal_mask(*shape, query.device)
        mask = packed_row.masks[shape]
        if mask is not None:
            mask = mask.to(query.device)  # layers may lie on several
        attended.append(sdpa_attention_forward(module, own_query, keys, values, mask, **settings)[0])
    return torch.cat(attended, dim=1), None


def _causal_mask(queries: int, keys: int, window: int | None, device: torch.device) -> torch.Tensor | None:
    """Which keys each of the last `queries` tokens looks at, shape (1, 1, queries, keys); None: as usual."""
    if queries == 1 or (queries == keys and (window is None or queries <= window)):
        return None
    asking = torch.arange(keys - queries, keys, device=device)[:, None]
    distance = asking - torch.arange(keys, device=device)
    allowed = distance >= 0 if window is None else (distance >= 0) & (distance < window)
    return allowed[None, None]


AttentionInterface.register(NAME, attend)
