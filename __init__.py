"""Tandem: serves large language models with asynchronous continuous batching."""
