"""One chat request to a stream of chat events: prepare, generate, read, check.

Knows conversations and tokens, and is the only place that knows both.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from functools import partial

import msgspec

from gallama.config import ModelSpec
from gallama.constraints import ToolsSpec
from gallama.constraints.answer_grammar import seam_after_block
from gallama.constraints.thinking import ThinkingReader
from gallama.conversation import Accepted, ChatEvent, ChatRequest, Completed, Explained, Usage
from gallama.dialects import Splitter, visible_control_tokens
from gallama.dialects.dialect import control_token_pattern
from gallama.errors import NotSupported
from gallama.generation import Engine, GenerationRequest
from gallama.interleave import interleaved
from gallama.tokenization import DetokenizeRequest, TokenizedText, TokenizeRequest
from gallama.wire import UnaryReply, UnaryRequest
from gallama.worker.answer_parser import AnswerParser
from gallama.worker.choice import Choice
from gallama.worker.preparation import ChatPreparer, PreparedChat
from gallama.worker.raw_prompts import with_echo
from gallama.worker.stop_words import StopWords
from gallama.worker.text_logprobs import TextLogprobs
from gallama.worker.tokens import detokenize, to_tokenized_text, tokenize


class ChatRunner:
    """Answers chat requests with one engine."""

    def __init__(self, engine: Engine, spec: ModelSpec) -> None:
        self._engine = engine
        self._sampling_defaults = spec.default_sampling.to_settings()
        self._guesses_ahead = spec.speculation != "off"
        self._preparer = ChatPreparer(engine, spec)

    async def run(self, request: ChatRequest) -> AsyncGenerator[ChatEvent, None]:
        """The events of the answer: first `Accepted`, last `Completed`. Closing it ends the generation.

        Raises:
            GallamaError: before `Accepted`, the request is refused; after it, the generation broke.
        """
        prepared = await self._preparer.prepare(request)
        yield Accepted(prompt_tokens=len(prepared.prompt_token_ids))
        if request.dry_run:
            yield Explained(self._preparer.explain(prepared))
            yield Completed(usage=Usage(prompt_tokens=len(prepared.prompt_token_ids), completion_tokens=0))
            return
        choices = [self._choice(request, prepared, index) for index in range(request.choices)]
        streams = [self._events(request, prepared, choice, i) for i, choice in enumerate(choices)]
        async with aclosing(interleaved(streams)) as events:
            async for event in events:
                yield event
        yield Completed(usage=self._usage(prepared, choices))

    async def reply(self, request: UnaryRequest) -> UnaryReply:
        """What a model that makes text can tell at once: its tokens.

        Raises:
            GallamaError: the request is refused.
        """
        match request:
            case TokenizeRequest():
                return await asyncio.to_thread(self._tokenize, request)
            case DetokenizeRequest():
                return detokenize(self._engine, request.token_ids)
        raise NotSupported(f"{request.model} makes text; it does not embed.")

    def _tokenize(self, request: TokenizeRequest) -> TokenizedText:
        if request.chat is not None:
            token_ids = self._preparer.prompt_token_ids(request.chat)
        else:
            special = request.add_special_tokens
            token_ids = tokenize(self._engine, request.text, add_special_tokens=special)
        return to_tokenized_text(self._engine, token_ids)

    def _usage(self, prepared: PreparedChat, choices: Sequence[Choice]) -> Usage:
        accepted = sum(choice.accepted_draft_tokens for choice in choices)
        rejected = sum(choice.drafted_tokens for choice in choices) - accepted
        return Usage(
            prompt_tokens=len(prepared.prompt_token_ids),
            completion_tokens=sum(choice.generated_tokens for choice in choices),
            cached_tokens=choices[0].cached_prompt_tokens,
            reasoning_tokens=sum(choice.reasoning_tokens for choice in choices),
            accepted_draft_tokens=accepted if self._guesses_ahead else None,
            rejected_draft_tokens=rejected if self._guesses_ahead else None,
        )

    def _events(
        self, request: ChatRequest, prepared: PreparedChat, choice: Choice, index: int
    ) -> AsyncGenerator[ChatEvent, None]:
        if prepared.raw is None or request.prompt is None or not request.prompt.echo:
            return choice.events()
        return with_echo(choice, index, prepared.raw, self._engine.vocabulary)

    def _choice(self, request: ChatRequest, prepared: PreparedChat, index: int) -> Choice:
        sampling = request.sampling.with_defaults(self._sampling_defaults)
        if sampling.seed is not None:
            sampling = msgspec.structs.replace(sampling, seed=sampling.seed + index)
        generation = GenerationRequest(
            prompt_token_ids=prepared.prompt_token_ids,
            max_tokens=prepared.max_tokens,
            sampling=sampling,
            logprobs=request.logprobs,
            prompt_logprobs=request.prompt is not None
            and request.prompt.echo
            and request.logprobs is not None,
            visible_control_tokens=self._visible_tokens(prepared),
        )
        return Choice(
            self._engine,
            generation,
            index=index,
            spec=prepared.spec,
            grammar=prepared.grammar,
            checks=prepared.checks,
            start_state=partial(self._preparer.start_state, request, prepared),
            new_parser=partial(self._parser, request, prepared, index),
            may_be_invalid=request.on_unsupported == "weaken",
            explains=request.explain,
        )

    def _visible_tokens(self, prepared: PreparedChat) -> frozenset[int]:
        """The control tokens that an `AnswerParser` must see."""
        control_tokens = self._engine.vocabulary.control_tokens
        names = visible_control_tokens(prepared.dialect, control_tokens)
        if prepared.template is not None:
            names |= set(control_token_pattern(control_tokens).findall(prepared.template.text))
        return frozenset(control_tokens[name] for name in names)

    def _parser(self, request: ChatRequest, prepared: PreparedChat, index: int) -> AnswerParser:
        dialect, control_tokens = prepared.dialect, self._engine.vocabulary.control_tokens
        body = None if prepared.spec is None else prepared.spec.body
        tools = body.tools if isinstance(body, ToolsSpec) else ()
        thinking = None
        if prepared.spec is not None and prepared.spec.template is not None:
            seam = seam_after_block(prepared.spec)
            thinking = ThinkingReader(prepared.spec.template.template, separator=seam)
        splitter = Splitter(
            dialect,
            tools=tools,
            control_tokens=control_tokens,
            # A block stands instead of the model's own reasoning, or inside of it, and ends with it.
            reasoning="none" if thinking else prepared.prompt.reasoning,
            text_is_bound=isinstance(body, ToolsSpec) and body.text is not None,
            follows_grammar=prepared.spec is not None,
        )
        text_begin = dialect.envelope.text_begin if tools or dialect.envelope.text_always_begins_so else ""
        hidden_text = control_token_pattern(control_tokens).sub("", text_begin)
        return AnswerParser(
            choice=index,
            thinking=thinking,
            splitter=splitter,
            stop_words=StopWords(request.stop, keep_word=request.return_stop_word),
            logprobs=TextLogprobs(
                self._engine.vocabulary.tokens,
                hidden_bytes=len(hidden_text.encode()),
                control_names={token_id: name for name, token_id in control_tokens.items()},
            ),
            new_call_id=dialect.new_call_id,
            demands_call=isinstance(body, ToolsSpec) and not body.text_allowed,
        )
