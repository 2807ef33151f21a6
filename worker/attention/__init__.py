"""Attention over the paged KV cache: one small interface, two backends, and the bridge from transformers' registry."""
