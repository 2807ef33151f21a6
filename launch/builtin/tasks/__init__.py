"""What the built-in model learns: one module per family of tasks, each a set of functions from a Source to a chat."""
