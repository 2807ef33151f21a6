"""Benchmarks: what Tandem does in how much time, measured through the whole system and printed with what it was
measured on."""
