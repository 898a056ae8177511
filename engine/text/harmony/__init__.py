"""The Harmony format of gpt-oss and tiny-oss: control tokens, rendering, streaming parse.

| module | holds |
|---|---|
| `ids` | `HarmonyIds`: the control tokens by name, from the model's tokenizer |
| `typescript` | function tools as declarations |
| `render` | conversation → prompt ids; reply → completion ids (training data) |
| `header` | message headers, well-formed or not, to a route |
| `parse` | `HarmonyParser`: reply ids → chat events |
"""

from __future__ import annotations

from engine.text.harmony.ids import HarmonyIds
from engine.text.harmony.parse import HarmonyParser
from engine.text.harmony.render import AssistantReply, HarmonyRenderer, map_reasoning_effort

__all__ = ["AssistantReply", "HarmonyIds", "HarmonyParser", "HarmonyRenderer", "map_reasoning_effort"]
