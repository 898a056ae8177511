"""OpenAI's Responses API: POST /v1/responses and /v1/responses/input_tokens. Stateless: nothing is stored.

| module | holds |
|---|---|
| `items` | instructions and input items in OpenAI's JSON → messages |
| `request` | the body → a plan |
| `output` | pieces of the reply → output items and the events that build them |
| `answer` | the response object, as a numbered stream of events or whole |
"""
