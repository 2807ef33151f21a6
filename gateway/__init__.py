"""OpenAI-compatible HTTP, built on the client."""
