"""From a chat request to what will be generated: admitted, rendered, counted, compiled."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import msgspec

from gallama.config import ModelSpec
from gallama.constraints import (
    AUTO,
    DEFAULT,
    AnswerSpec,
    Compiled,
    ConstraintEngines,
    ReasoningSpec,
    SchemaSpec,
    TemplateSpec,
    TextSpec,
    ToolsSpec,
    admit_constraints,
    admit_tools,
)
from gallama.constraints.forced_close import BudgetedThinking, RepetitionGuard, minimum_tokens
from gallama.constraints.thinking import ThinkingTemplate, parse_template
from gallama.conversation import ChatRequest, Explanation, RawPrompt
from gallama.dialects import ChatTemplate, Dialect, RenderedPrompt, choose_dialect, render_prompt
from gallama.dialects.thinking_prompt import with_thinking_instruction
from gallama.errors import ContextLengthExceeded, InvalidRequest, UnsupportedConstraint, UnsupportedValue
from gallama.generation import Engine, SamplingSettings, State
from gallama.worker.raw_prompts import PLAIN, RawTokens, raw_tokens
from gallama.worker.value_checks import ValueChecks

# The default engine takes two seconds for a hostile grammar, the others up to fifteen. So those have threads
# of their own.
COMPILING_THREADS = 2

# Of the tokens that an answer may have, what is left for it behind a template's block: a quarter.
_SHARE_OF_ANSWER = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedChat:
    """A request that will be generated: everything in it has been checked."""

    prompt: RenderedPrompt
    dialect: Dialect
    """How its answer is read."""
    raw: RawTokens | None = None
    """Of a prompt without a template."""
    prompt_token_ids: Sequence[int]
    max_tokens: int
    """Of the whole answer, thinking included."""
    thinking_tokens: int | None
    """Of the block of a thinking template, if there is one."""
    spec: AnswerSpec | None
    grammar: Compiled | None = None
    checks: ValueChecks | None = None
    """Where the grammar does not hold everything."""
    compile_milliseconds: float | None = None

    @property
    def template(self) -> ThinkingTemplate | None:
        return None if self.spec is None or self.spec.template is None else self.spec.template.template


class ChatPreparer:
    """Prepares requests for one model."""

    def __init__(self, engine: Engine, spec: ModelSpec) -> None:
        vocabulary = engine.vocabulary
        names = {token_id: name for name, token_id in vocabulary.control_tokens.items()}
        self._engine = engine
        self.dialect: Dialect = choose_dialect(spec.prompt_template, engine.chat_template)
        self._template = ChatTemplate(
            engine.chat_template,
            bos_token="" if vocabulary.start_token_id is None else names[vocabulary.start_token_id],
            eos_token=names.get(vocabulary.end_token_id, ""),
        )
        # Other marks are words like any others to this model's prompts, such as HTML.
        marks = {mark for mark in vocabulary.marks if mark in self._template.source}
        self._guarded = frozenset({*vocabulary.control_tokens, *marks})
        """What a client's text must not become."""
        longest_token = max(map(len, (*vocabulary.tokens, *vocabulary.control_tokens)))
        self._most_bytes = engine.context_length * longest_token
        """No longer prompt fits, however it is tokenized."""
        self._constraint_engines = ConstraintEngines(vocabulary)
        self._constraint_engines.prepare()
        self._compiling = ThreadPoolExecutor(COMPILING_THREADS, thread_name_prefix="grammars")
        self._compiling_slowly = ThreadPoolExecutor(COMPILING_THREADS, thread_name_prefix="slow-grammars")

    async def prepare(self, request: ChatRequest) -> PreparedChat:
        """
        Raises:
            GallamaError: the request is refused.
        """
        # In threads: templates and schemas come from outside, and others' answers go on meanwhile.
        prepared = await asyncio.to_thread(self._admit, request)
        if prepared.spec is None:
            return prepared
        started = time.perf_counter()
        grammar = await self._compile(prepared.spec, request.constraint_engine)
        milliseconds = round(1000 * (time.perf_counter() - started), 3)
        checks = None
        if grammar.unenforced:
            checks = await asyncio.to_thread(ValueChecks, prepared.spec, grammar)
        return replace(prepared, grammar=grammar, checks=checks, compile_milliseconds=milliseconds)

    def prompt_token_ids(self, request: ChatRequest) -> Sequence[int]:
        """The tokens of the request's prompt.

        Raises:
            GallamaError: the request is refused.
        """
        return self._admit(request).prompt_token_ids

    def start_state(
        self, request: ChatRequest, prepared: PreparedChat, kept_token_ids: Sequence[int]
    ) -> State | None:
        """The grammar behind what is kept of an earlier attempt, with the guards that the request asks for.

        Args:
            kept_token_ids: [], or the beginning of an answer up to a value in it: a block that stands in
                front is complete.
        """
        if prepared.grammar is None:
            return None
        vocabulary = self._engine.vocabulary
        state = prepared.grammar.start()
        taken = state.advance(kept_token_ids)
        assert taken == len(kept_token_ids), "a grammar takes the beginning of what it has made"
        if prepared.template is not None and not kept_token_ids:
            assert prepared.thinking_tokens is not None, "a block has a budget"
            state = BudgetedThinking(
                state, prepared.template, vocabulary, block_budget_tokens=prepared.thinking_tokens
            )
        return RepetitionGuard(state, vocabulary) if request.repetition_guard else state

    def explain(self, prepared: PreparedChat) -> Explanation:
        """What would be done for the request."""
        spec, grammar = prepared.spec, prepared.grammar
        explanation = Explanation(
            prompt=prepared.prompt.text,
            prompt_tokens=len(prepared.prompt_token_ids),
            max_tokens=prepared.max_tokens,
            dialect=prepared.dialect.name,
            kind=None if spec is None else spec.kind,
            thinking_tokens=prepared.thinking_tokens,
        )
        if spec is None or grammar is None:
            return explanation
        return msgspec.structs.replace(
            explanation,
            beside=spec.beside,
            engine=grammar.backend,
            grammar=grammar.text,
            by="grammar+validation" if grammar.unenforced else "grammar",
            validated_keywords=grammar.unenforced,
            compile_milliseconds=prepared.compile_milliseconds,
        )

    async def _compile(self, spec: AnswerSpec, engine: str) -> Compiled:
        """The grammar of a spec; whoever sends the same one again does not wait for others."""
        if engine in (AUTO, DEFAULT) and (cached := self._constraint_engines.cached(spec)):
            return cached
        if engine == AUTO:
            with contextlib.suppress(UnsupportedConstraint):
                grammar = await self._compile_in(self._compiling, spec, DEFAULT)
                if not grammar.unenforced:
                    return grammar
        pool = self._compiling if engine == DEFAULT else self._compiling_slowly
        return await self._compile_in(pool, spec, engine)

    async def _compile_in(self, pool: ThreadPoolExecutor, spec: AnswerSpec, engine: str) -> Compiled:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(pool, self._constraint_engines.compile, spec, engine)

    def _admit(self, request: ChatRequest) -> PreparedChat:
        self._refuse_foreign_biases(request.sampling)
        if request.prompt is not None:
            return self._admit_raw(request, request.prompt)
        template = None if request.thinking_template is None else parse_template(request.thinking_template)
        if template is not None:
            messages = with_thinking_instruction(request.messages, template.text)
            request = msgspec.structs.replace(request, messages=messages)
        # Before the prompt: what shows the tools in it relies on their schemas.
        body = self._body(request)
        prompt = render_prompt(self._template, self.dialect, request, control_tokens=self._guarded)
        self._check_size(prompt.text, "messages")
        token_ids = self._tokenize(prompt)
        max_tokens = self._answer_room(request, len(token_ids))
        spec = self._answer_spec(body, template, prompt)
        if template is None:
            _check_repetition_guard(request, body)
        return PreparedChat(
            prompt=prompt,
            dialect=self.dialect,
            prompt_token_ids=token_ids,
            max_tokens=max_tokens,
            thinking_tokens=None if template is None else self._thinking_room(template, max_tokens),
            spec=spec,
        )

    def _admit_raw(self, request: ChatRequest, prompt: RawPrompt) -> PreparedChat:
        of_a_chat = (request.messages, request.tools, request.thinking_template, request.leading_prompt)
        assert not any(of_a_chat), "a prompt stands instead of messages"
        if prompt.echo and prompt.suffix is not None and request.logprobs is not None:
            raise UnsupportedValue(
                "The log probabilities of a prompt with a suffix are not told; leave out `echo`, `logprobs`"
                " or `suffix`.",
                param="suffix",
            )
        self._check_size(prompt.text + (prompt.suffix or ""), "prompt")
        raw = raw_tokens(self._engine, prompt)
        max_tokens = self._answer_room(request, len(raw.token_ids))
        body = admit_constraints(request.constraints, request.on_unsupported)
        _check_repetition_guard(request, body)
        return PreparedChat(
            prompt=RenderedPrompt(segments=(raw.text,), offers_tools=False, reasoning="none"),
            dialect=PLAIN,
            raw=raw,
            prompt_token_ids=raw.token_ids,
            max_tokens=max_tokens,
            thinking_tokens=None,
            spec=None if body is None else AnswerSpec(body=body),
        )

    def _body(self, request: ChatRequest) -> TextSpec | ToolsSpec | None:
        text = admit_constraints(request.constraints, request.on_unsupported)
        if not request.tools or request.tool_choice.mode == "none":
            return text
        return admit_tools(
            request.tools,
            request.tool_choice,
            parallel=request.parallel_tool_calls,
            envelope=self.dialect.envelope,
            text=text,
            on_unsupported=request.on_unsupported,
        )

    def _answer_spec(
        self, body: TextSpec | ToolsSpec | None, template: ThinkingTemplate | None, prompt: RenderedPrompt
    ) -> AnswerSpec | None:
        if body is None and template is None:
            return None
        form, envelope = self.dialect.reasoning, self.dialect.envelope
        is_open = prompt.reasoning == "open"
        # A template stands instead of the model's own way to think, or, where that has begun already, in it.
        reasons = form is not None and (is_open or (prompt.reasoning == "possible" and template is None))
        return AnswerSpec(
            reasoning=ReasoningSpec(form=form, is_open=is_open) if form and reasons else None,
            template=None if template is None else TemplateSpec(template=template),
            text_begin=envelope.text_begin if envelope.text_always_begins_so else "",
            text_end=envelope.text_end,
            body=body,
        )

    def _tokenize(self, prompt: RenderedPrompt) -> list[int]:
        token_ids = [token for segment in prompt.segments for token in self._engine.tokenize(segment)]
        start = self._engine.vocabulary.start_token_id
        if start is not None and token_ids[:1] != [start]:
            token_ids.insert(0, start)
        return token_ids

    def _check_size(self, text: str, param: str) -> None:
        """Refuse what cannot fit without tokenizing it, which takes seconds for each megabyte.

        Raises:
            ContextLengthExceeded: it has too many bytes.
        """
        size = len(text.encode(errors="surrogatepass"))
        if size > self._most_bytes:
            raise ContextLengthExceeded(
                f"The prompt has {size} bytes, and at most {self._most_bytes} can fit the model's context of"
                f" {self._engine.context_length} tokens.",
                param=param,
            )

    def _answer_room(self, request: ChatRequest, prompt_tokens: int) -> int:
        """How many tokens the answer may have."""
        context_length = self._engine.context_length
        wanted = 1 if request.max_tokens is None else request.max_tokens
        prompt_param = "messages" if request.prompt is None else "prompt"
        if prompt_tokens + wanted > context_length:
            raise ContextLengthExceeded(
                f"The prompt has {prompt_tokens} tokens and the answer may have {wanted}; together that is"
                f" more than the model's context of {context_length}.",
                param=prompt_param if prompt_tokens >= context_length else "max_tokens",
            )
        return context_length - prompt_tokens if request.max_tokens is None else request.max_tokens

    def _thinking_room(self, template: ThinkingTemplate, max_tokens: int) -> int:
        """How many tokens a template's block may have, so that there is room for an answer behind it."""
        least = minimum_tokens(template, self._engine.vocabulary)
        if least >= max_tokens:
            raise InvalidRequest(
                f"`thinking_template` takes at least {least} tokens, and an answer of {max_tokens} tokens has"
                " no room for it. Raise `max_tokens`, or make the template smaller.",
                param="max_tokens",
            )
        return max(least, max_tokens - max_tokens // _SHARE_OF_ANSWER)

    def _refuse_foreign_biases(self, sampling: SamplingSettings) -> None:
        size = len(self._engine.vocabulary.tokens)
        for token_id in sampling.logit_bias:
            if not 0 <= token_id < size:
                raise InvalidRequest(
                    f"`logit_bias` names token {token_id}; this model has the tokens 0 to {size - 1}.",
                    param="logit_bias",
                )


def _check_repetition_guard(request: ChatRequest, body: TextSpec | ToolsSpec | None) -> None:
    """For a request without a thinking template.

    Raises:
        InvalidRequest: it is to guard strings, and there will be none.
    """
    if request.repetition_guard and not isinstance(body, SchemaSpec | ToolsSpec):
        raise InvalidRequest(
            "`repetition_guard` closes strings that repeat themselves, and nothing in the request makes"
            " the answer have strings: no tools, no `response_format`, no `thinking_template`.",
            param="repetition_guard",
        )
