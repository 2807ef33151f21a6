"""The launcher: the command line, and systems of processes that are started, watched, started again and ended."""
