"""Attention over the paged KV cache: one small interface (base.py), three backends, and the bridge from transformers'
attention registry.

`flashinfer` serves on CUDA, with kernels of our own for decoding rows; `reference` anywhere; `invariant` on CUDA in
batch-invariant mode.
"""
