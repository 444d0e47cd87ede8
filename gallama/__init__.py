"""gallama, the guided agentic llama: any local model as if it were OpenAI, with guarantees."""

__version__ = "0.1.0"
