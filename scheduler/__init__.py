"""The scheduler process: decides what every step computes. Deals in token ids only; never imports torch, never blocks.

`core` is a pure state machine over `replica` (one worker as the scheduler sees it), `rows`, `blocks` and `queue`;
`service` puts sockets and a clock around it.
"""
