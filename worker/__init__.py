"""The worker process: executes the scheduler's plans on its device, one step queued behind the other.

`process` loads the model and tries it, `session` registers the worker. From then on a plan comes in by `link`;
`pipeline` has `rows` lay it out, writes it to a lane of `staging`, and launches it through `executor`; on the device
`state` applies it, runs `model` and has `sampler` choose the tokens, which go back by `link`.
"""
