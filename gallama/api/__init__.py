"""The HTTP side: OpenAI's formats outside, chat requests and chat events inside."""
