"""Anthropic's Messages API: POST /v1/messages and /v1/messages/count_tokens.

| module | holds |
|---|---|
| `blocks` | system, messages, tools and choices in Anthropic's JSON → a conversation |
| `request` | the body → a plan |
| `answer` | pieces of the reply → content blocks, as a stream of named events or as one message |
"""
