"""OpenAI-compatible HTTP, built on the client.

A request passes `guard`, its body is read and checked (`body`, the schemas), and `completion`, `chat` or `responses`
asks the client and makes OpenAI's answer of what it gives, whole or as events (`generation`, `sse`).
"""
