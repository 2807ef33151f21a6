"""Structured output: which tokens a grammar allows next. Nothing here imports torch."""
