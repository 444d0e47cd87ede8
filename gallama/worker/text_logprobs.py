"""Which tokens' log probabilities go with which piece of an answer's text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from gallama.conversation import LogprobEntry
from gallama.generation import TokenLogprob


class TextLogprobs:
    """Holds the entries of tokens whose text has not been sent yet. OpenAI reports them for text only."""

    def __init__(
        self, tokens: Sequence[bytes], *, hidden_bytes: int, control_names: Mapping[int, str] | None = None
    ) -> None:
        """
        Args:
            tokens: the text of each token.
            hidden_bytes: how much of the answer's beginning is the family's and no part of the text.
            control_names: what to call control tokens, which have no text, where they are alternatives.
        """
        self._tokens = tokens
        self._control_names = control_names or {}
        self._hidden_bytes = hidden_bytes
        self._entries: list[LogprobEntry] = []
        self._bytes_without_entry = 0
        """Of the text sent; below 0 where a token's text was sent in part only."""

    def hold(
        self, logprobs: Iterable[TokenLogprob], *, may_be_hidden: bool = True, thought_bytes: int = 0
    ) -> None:
        """Keep the log probabilities of tokens that were generated.

        Args:
            may_be_hidden: whether the answer has begun, so that its hidden beginning may be what this is.
            thought_bytes: how much of the tokens' beginning belongs to thoughts in front of the answer.
        """
        for logprob in logprobs:
            entry = self._to_entry(logprob)
            size = len(entry.token_bytes)
            of_thoughts = min(thought_bytes, size)
            hidden = min(self._hidden_bytes, size - of_thoughts) if may_be_hidden else 0
            thought_bytes -= of_thoughts
            self._hidden_bytes -= hidden
            if of_thoughts + hidden < size:  # a control token's is that of no text
                self._entries.append(without_beginning(entry, of_thoughts + hidden))

    def take(self, text: str) -> tuple[LogprobEntry, ...]:
        """The entries of the tokens that begin in this text; those of a text held back stay."""
        self._bytes_without_entry += len(text.encode())
        taken = []
        while self._entries and self._bytes_without_entry > 0:
            taken.append(self._entries.pop(0))
            self._bytes_without_entry -= len(taken[-1].token_bytes)
        # More remains only where U+FFFD stands for fewer bytes than it has itself.
        self._bytes_without_entry = min(self._bytes_without_entry, 0)
        return tuple(taken)

    def drop(self) -> None:
        """Forget those of tokens that turned out to be a call's."""
        self._entries.clear()
        self._bytes_without_entry = 0

    def _to_entry(self, logprob: TokenLogprob) -> LogprobEntry:
        text = self._tokens[logprob.token_id]
        top = tuple((*self._text_or_name(token_id), value) for token_id, value in logprob.top)
        return LogprobEntry(text.decode(errors="replace"), text, logprob.logprob, top)

    def _text_or_name(self, token_id: int) -> tuple[str, bytes]:
        text = self._tokens[token_id] or self._control_names.get(token_id, "").encode()
        return text.decode(errors="replace"), text


def without_beginning(entry: LogprobEntry, count: int) -> LogprobEntry:
    """The entry of a token whose first bytes are no part of the text."""
    if count == 0:
        return entry
    rest = entry.token_bytes[count:]
    return LogprobEntry(rest.decode(errors="replace"), rest, entry.logprob, entry.top)
