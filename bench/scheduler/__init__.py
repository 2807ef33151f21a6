"""What the scheduler costs: alone (`core`), and as a process among simulated workers and clients (`cluster`)."""
