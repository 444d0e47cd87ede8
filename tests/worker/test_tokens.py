"""The tokens of a model that makes text, told to whoever asks."""

from __future__ import annotations

from pathlib import Path

import pytest

from gallama.config import ModelSpec
from gallama.conversation import ChatRequest, Message
from gallama.embedding import EmbedRequest
from gallama.engines import ENGINES
from gallama.errors import InvalidRequest, NotSupported
from gallama.tokenization import DetokenizedText, DetokenizeRequest, TokenizedText, TokenizeRequest
from gallama.worker.chat import ChatRunner


def runner() -> ChatRunner:
    spec = ModelSpec(model_id="m", backend="scripted")
    return ChatRunner(ENGINES["scripted"](spec, Path("m")), spec)


async def tokens_of(text: str = "", chat: ChatRequest | None = None) -> TokenizedText:
    reply = await runner().reply(TokenizeRequest(request_id="r", model="m", text=text, chat=chat))
    assert isinstance(reply, TokenizedText)
    return reply


async def test_a_text_is_told_in_tokens() -> None:
    tokens = await tokens_of("hé")
    assert tokens.token_ids == (104, 0xC3, 0xA9)
    assert tokens.token_texts == ("h", "\ufffd", "\ufffd")
    assert tokens.context_length == 4096


async def test_control_tokens_in_a_text_are_recognised() -> None:
    tokens = await tokens_of("<|im_start|>a")
    assert tokens.token_texts == ("<|im_start|>", "a")


async def test_the_tokens_of_a_conversation_are_those_of_its_prompt() -> None:
    chat = ChatRequest(request_id="r", model="m", messages=(Message(role="user", content="hi"),))
    tokens = await tokens_of(chat=chat)
    assert "".join(tokens.token_texts) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


async def test_tokens_are_read_as_the_text_they_came_of() -> None:
    reply = await runner().reply(
        DetokenizeRequest(request_id="r", model="m", token_ids=(104, 0xC3, 0xA9, 257))
    )
    assert reply == DetokenizedText(text="hé<|im_end|>")


@pytest.mark.parametrize("token_id", [-1, 259, 2**40])
async def test_a_token_that_is_none_is_refused(token_id: int) -> None:
    with pytest.raises(
        InvalidRequest, match=r"`tokens\[1\]` is .*; this model has the tokens 0 to 258"
    ) as error:
        await runner().reply(DetokenizeRequest(request_id="r", model="m", token_ids=(1, token_id)))
    assert error.value.param == "tokens"


async def test_a_model_of_text_does_not_embed() -> None:
    with pytest.raises(NotSupported):
        await runner().reply(EmbedRequest(request_id="r", model="m", inputs=("hi",)))
