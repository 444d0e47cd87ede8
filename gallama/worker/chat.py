"""One chat request to a stream of chat events: render, admit, constrain, generate, split.

Knows conversations and tokens, and is the only place that knows both.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass

import msgspec

from gallama.config import ModelSpec
from gallama.constraints import (
    Compiled,
    ConstraintSpec,
    GrammarCache,
    LLGuidanceBackend,
    admit_constraint,
    admit_tools,
)
from gallama.conversation import (
    Accepted,
    AnswerText,
    ChatEvent,
    ChatRequest,
    Completed,
    Finished,
    FinishReason,
    Guarantee,
    ToolArguments,
    ToolCallStarted,
    Usage,
)
from gallama.dialects import (
    ArgumentsPiece,
    CallStarted,
    ChatTemplate,
    Piece,
    Splitter,
    TextPiece,
    choose_dialect,
    render_prompt,
    visible_control_tokens,
)
from gallama.errors import ContextLengthExceeded, InvalidRequest
from gallama.generation import (
    EndReason,
    Engine,
    GeneratedChunk,
    GenerationRequest,
    SamplingSettings,
)
from gallama.worker.interleave import interleaved
from gallama.worker.stop_words import StopWords
from gallama.worker.text_logprobs import TextLogprobs


@dataclass(frozen=True, slots=True, kw_only=True)
class _PreparedChat:
    """A request that will be generated: everything in it has been checked."""

    prompt_token_ids: Sequence[int]
    max_tokens: int
    offers_tools: bool
    spec: ConstraintSpec | None
    grammar: Compiled | None


class ChatRunner:
    """Answers chat requests with one engine."""

    def __init__(self, engine: Engine, spec: ModelSpec) -> None:
        vocabulary = engine.vocabulary
        names = {token_id: name for name, token_id in vocabulary.control_tokens.items()}
        self._engine = engine
        self._sampling_defaults = spec.default_sampling.to_settings()
        self._dialect = choose_dialect(spec.prompt_template, engine.chat_template)
        self._template = ChatTemplate(
            engine.chat_template,
            bos_token="" if vocabulary.start_token_id is None else names[vocabulary.start_token_id],
            eos_token=names.get(vocabulary.end_token_id, ""),
        )
        self._grammars = GrammarCache(LLGuidanceBackend(vocabulary))
        self._visible = frozenset(
            vocabulary.control_tokens[name]
            for name in visible_control_tokens(self._dialect, vocabulary.control_tokens)
        )

    async def run(self, request: ChatRequest) -> AsyncGenerator[ChatEvent, None]:
        """The events of the answer: first `Accepted`, last `Completed`. Closing it ends the generation.

        Raises:
            GallamaError: before `Accepted`, the request is refused; after it, the generation broke.
        """
        # In a thread: templates and schemas come from outside, and others' answers go on meanwhile.
        prepared = await asyncio.to_thread(self._prepare, request)
        yield Accepted(prompt_tokens=len(prepared.prompt_token_ids))
        choices = [self._choice(request, prepared, index) for index in range(request.choices)]
        async with aclosing(interleaved([choice.events() for choice in choices])) as events:
            async for event in events:
                yield event
        yield Completed(
            usage=Usage(
                prompt_tokens=len(prepared.prompt_token_ids),
                completion_tokens=sum(choice.generated_tokens for choice in choices),
                cached_tokens=choices[0].cached_prompt_tokens,
            )
        )

    def _prepare(self, request: ChatRequest) -> _PreparedChat:
        control_tokens = self._engine.vocabulary.control_tokens
        self._refuse_foreign_biases(request.sampling)
        # Before the prompt: what shows the tools in it relies on their schemas.
        spec = self._constraint(request)
        prompt = render_prompt(self._template, self._dialect, request, control_tokens=control_tokens)
        token_ids = [token for segment in prompt.segments for token in self._engine.tokenize(segment)]
        start = self._engine.vocabulary.start_token_id
        if start is not None and token_ids[:1] != [start]:
            token_ids.insert(0, start)
        max_tokens = self._answer_room(request, len(token_ids))
        return _PreparedChat(
            prompt_token_ids=token_ids,
            max_tokens=max_tokens,
            offers_tools=prompt.offers_tools,
            spec=spec,
            grammar=None if spec is None else self._grammars.compile(spec),
        )

    def _constraint(self, request: ChatRequest) -> ConstraintSpec | None:
        if request.tools and request.tool_choice.mode != "none":
            return admit_tools(
                request.tools,
                request.tool_choice,
                parallel=request.parallel_tool_calls,
                envelope=self._dialect.envelope,
            )
        return None if request.constraint is None else admit_constraint(request.constraint)

    def _answer_room(self, request: ChatRequest, prompt_tokens: int) -> int:
        """How many tokens the answer may have."""
        context_length = self._engine.context_length
        wanted = request.max_tokens or 1
        if prompt_tokens + wanted > context_length:
            raise ContextLengthExceeded(
                f"The prompt has {prompt_tokens} tokens and the answer may have {wanted}; together that is"
                f" more than the model's context of {context_length}.",
                param="messages" if prompt_tokens >= context_length else "max_tokens",
            )
        return request.max_tokens or context_length - prompt_tokens

    def _refuse_foreign_biases(self, sampling: SamplingSettings) -> None:
        size = len(self._engine.vocabulary.tokens)
        for token_id in sampling.logit_bias:
            if not 0 <= token_id < size:
                raise InvalidRequest(
                    f"`logit_bias` names token {token_id}; this model has the tokens 0 to {size - 1}.",
                    param="logit_bias",
                )

    def _choice(self, request: ChatRequest, prepared: _PreparedChat, index: int) -> _Choice:
        sampling = request.sampling.with_defaults(self._sampling_defaults)
        if sampling.seed is not None:
            sampling = msgspec.structs.replace(sampling, seed=sampling.seed + index)
        state = None if prepared.grammar is None else prepared.grammar.start()
        chunks = self._engine.generate(
            GenerationRequest(
                prompt_token_ids=prepared.prompt_token_ids,
                max_tokens=prepared.max_tokens,
                sampling=sampling,
                state=state,
                logprobs=request.logprobs,
                visible_control_tokens=self._visible if prepared.offers_tools else frozenset(),
            )
        )
        splitter = Splitter(
            self._dialect,
            tools_offered=prepared.offers_tools,
            control_tokens=self._engine.vocabulary.control_tokens,
        )
        hidden_bytes = len(self._dialect.envelope.text_begin.encode()) if prepared.offers_tools else 0
        return _Choice(
            index=index,
            chunks=chunks,
            splitter=splitter,
            stop_words=StopWords(request.stop, keep_word=request.return_stop_word),
            new_call_id=self._dialect.new_call_id,
            logprobs=TextLogprobs(self._engine.vocabulary.tokens, hidden_bytes=hidden_bytes),
            prepared=prepared,
        )


class _Choice:
    """One of a request's answers: its chunks become events."""

    def __init__(
        self,
        *,
        index: int,
        chunks: AsyncGenerator[GeneratedChunk, None],
        splitter: Splitter,
        stop_words: StopWords,
        new_call_id: Callable[[], str],
        logprobs: TextLogprobs,
        prepared: _PreparedChat,
    ) -> None:
        self._index = index
        self._chunks = chunks
        self._splitter = splitter
        self._stop_words = stop_words
        self._logprobs = logprobs
        self._new_call_id = new_call_id
        self._prepared = prepared
        self._has_calls = False
        self._sampled_tokens = 0
        self._forced_tokens = 0
        self.cached_prompt_tokens = 0

    @property
    def generated_tokens(self) -> int:
        return self._sampled_tokens + self._forced_tokens

    async def events(self) -> AsyncGenerator[ChatEvent, None]:
        end: EndReason = "stop"
        async with aclosing(self._chunks) as chunks:
            async for chunk in chunks:
                self._count(chunk)
                for event in self._to_events(self._split(chunk)):
                    yield event
                if self._stop_words.found:
                    break  # closes the generation
                end = chunk.end or end
        for event in self._last_events():
            yield event
        yield Finished(self._index, reason=self._finish_reason(end), guarantee=self._guarantee(end))

    def _count(self, chunk: GeneratedChunk) -> None:
        self._sampled_tokens += chunk.sampled_tokens
        self._forced_tokens += chunk.forced_tokens
        self.cached_prompt_tokens += chunk.cached_prompt_tokens
        self._logprobs.hold(chunk.logprobs)

    def _split(self, chunk: GeneratedChunk) -> list[Piece]:
        if chunk.control_token is not None:
            return self._splitter.feed_control_token(chunk.control_token)
        return self._splitter.feed(chunk.text)

    def _to_events(self, pieces: Sequence[Piece]) -> Iterator[ChatEvent]:
        for piece in pieces:
            if self._stop_words.found:
                return
            match piece:
                case TextPiece():
                    yield from self._text_events(self._stop_words.feed(piece.text))
                case CallStarted():
                    self._has_calls = True
                    yield from self._text_events(self._stop_words.finish())
                    self._logprobs.drop()
                    yield ToolCallStarted(self._index, piece.call_index, self._new_call_id(), piece.name)
                case ArgumentsPiece():
                    self._logprobs.drop()
                    yield ToolArguments(self._index, piece.call_index, piece.text)

    def _text_events(self, text: str) -> Iterator[ChatEvent]:
        if text:
            yield AnswerText(self._index, text, self._logprobs.take(text))

    def _last_events(self) -> Iterator[ChatEvent]:
        """What was held back, unless a stop word has ended the answer before it."""
        if not self._stop_words.found:
            yield from self._to_events(self._splitter.finish())
            yield from self._text_events(self._stop_words.finish())

    def _finish_reason(self, end: EndReason) -> FinishReason:
        if end == "stop" and self._has_calls:
            return "tool_calls"
        return end

    def _guarantee(self, end: EndReason) -> Guarantee | None:
        if self._prepared.spec is None or self._prepared.grammar is None:
            return None
        return Guarantee(
            kind=self._prepared.spec.kind,
            engine=self._prepared.grammar.backend,
            complete=end == "stop" and not self._stop_words.found,
            sampled_tokens=self._sampled_tokens,
            forced_tokens=self._forced_tokens,
        )
