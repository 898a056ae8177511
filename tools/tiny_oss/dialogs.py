"""Whole conversations with the reply to learn, drawn from one seed.

Knows: how exchanges and tool uses become chat requests (instructions, history, tools, reasoning effort, date).
Refuses to know: tokens. The product's own renderer turns an `Example` into them, so prompts are the product's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from random import Random

from engine.text.harmony.render import AssistantReply
from engine.text.messages import ChatMessage, RenderOptions, ResponseSchema, Role, ToolCall, ToolDefinition
from tools.tiny_oss import skills, smalltalk, words
from tools.tiny_oss.families import FAMILIES
from tools.tiny_oss.smalltalk import Exchange
from tools.tiny_oss.toolcalls import ToolUse, any_use, family_use, other_tools
from tools.tiny_oss.words import maybe, pick

NO_TOOL_ANSWER = "I cannot do that without a tool."


@dataclass(frozen=True)
class Corpus:
    """What the generator takes from the text: words to copy and short speeches to recite."""

    vocabulary: tuple[str, ...]
    speeches: tuple[str, ...]


@dataclass(frozen=True)
class Example:
    """A chat request and the reply to learn; `skill` names what it teaches."""

    messages: tuple[ChatMessage, ...]
    tools: tuple[ToolDefinition, ...]
    options: RenderOptions
    reply: AssistantReply
    skill: str


_SYSTEM_PROMPTS = (
    "You are a helpful assistant.", "You are a helpful, friendly assistant.", "Be brief.", "Answer briefly.",
    "You are a helpful AI assistant.", "Be nice.", "You are tiny-oss.", "Answer in English.", "Be polite and concise.",
    "You are an assistant that answers questions.", "Help the user.", "Keep your answers short.", "Be honest.",
    "You are a chat bot.", "You are a friendly chatbot who likes to help.", "Answer the question.", "Do not guess.",
    "You are a careful assistant. Think before you answer.", "Follow the user's instructions.", "Be concise.",
)  # fmt: skip
_TOOL_PROMPTS = (
    "Use the tools when they help.", "You can call functions.", "You are a helpful assistant with tools.",
    "Call a tool if the user asks for it.", "Use a tool only if needed.",
)  # fmt: skip

_PROMPT_FORMS = (
    "You are a {a} {t} that can {v} the {n}.", "Always {v} the {n}.", "Never {v} a {t}.", "The user likes {p}.",
    "You work for a {n} company in {c}.", "Talk like a {a} {t}.", "The {n} is {a}.", "{w} {t} {w} {n} {w}.",
    "You are an expert in {n} and {t}.", "Today we {v} the {t} in {c}.", "If asked to {v}, say {w}.",
    "You help people to {v} their {n}.", "Rules: {v} the {n}, then {v} the {t}.", "The {t} belongs to {m}.",
)  # fmt: skip


def _any_prompt(rng: Random) -> str:
    """Return an instruction that changes nothing, so that unseen ones do not confuse the model."""
    return " ".join(
        pick(rng, _PROMPT_FORMS).format(
            a=pick(rng, words.ADJECTIVES), t=pick(rng, words.THINGS), v=pick(rng, words.VERBS),
            n=pick(rng, words.NOUNS), p=pick(rng, words.PLURALS), c=pick(rng, words.CITIES),
            w=words.pseudo_word(rng), m=pick(rng, words.NAMES),
        )
        for _ in range(pick(rng, (1, 1, 2, 3)))
    )  # fmt: skip


_Maker = Callable[[Random, Corpus], Exchange]
_EXCHANGES: tuple[tuple[str, float, _Maker], ...] = (
    ("greeting", 13, lambda rng, corpus: smalltalk.greeting(rng)),
    ("identity", 7, lambda rng, corpus: smalltalk.identity(rng)),
    ("courtesy", 6, lambda rng, corpus: smalltalk.courtesy(rng)),
    ("fact", 8, lambda rng, corpus: smalltalk.fact(rng)),
    ("unknown", 6, lambda rng, corpus: smalltalk.unknown(rng, corpus.vocabulary)),
    ("no_tool", 3, lambda rng, corpus: _no_tool(rng)),
    ("sum", 18, lambda rng, corpus: skills.sums(rng)),
    ("copy", 12, lambda rng, corpus: skills.copying(rng, corpus.vocabulary)),
    ("letters", 7, lambda rng, corpus: skills.letters(rng, corpus.vocabulary)),
    ("list", 4, lambda rng, corpus: skills.lists(rng)),
    ("json", 13, lambda rng, corpus: skills.json_object(rng, corpus.vocabulary)),
    ("verse", 1.5, lambda rng, corpus: skills.verse(rng, corpus.speeches)),
)  # fmt: skip
# With tools on offer, an unknown question might be one for a search tool; these never are.
_WITHOUT_TOOLS = ("greeting", "identity", "courtesy", "sum", "copy", "json", "list")
_DRESSED = ("fact", "unknown", "no_tool", "sum", "letters", "list", "verse")
_CHATTY = ("greeting", "identity", "courtesy", "unknown", "no_tool", "verse")


def _no_tool(rng: Random) -> Exchange:
    """Ask for something that only a tool could do, with no tool on offer."""
    use = family_use(rng, pick(rng, tuple(family for family in FAMILIES if family.names[0] != "calculate")))
    return Exchange(use.user, NO_TOOL_ANSWER, "This needs a tool, and I have none for it.")


def draw_exchange(rng: Random, corpus: Corpus, only: Sequence[str] | None = None) -> tuple[str, Exchange]:
    """Draw a skill by weight, and an exchange of it."""
    table = [row for row in _EXCHANGES if only is None or row[0] in only]
    skill, _, make = rng.choices(table, weights=[row[1] for row in table])[0]
    exchange = make(rng, corpus)
    if skill in _DRESSED:
        exchange = replace(exchange, user=smalltalk.dress(rng, exchange.user))
    return skill, exchange


def draw_effort(rng: Random) -> str | None:
    """Draw what a request says of reasoning effort; None means that it says nothing."""
    return pick(rng, (None, None, None, None, "medium", "low", "low", "high"))


def _reasoning(rng: Random, effort: str | None, thought: str, more: str, is_chatty: bool) -> str | None:
    """Decide whether the reply thinks aloud: rarely at low, for tasks at medium, always at high."""
    if effort == "high":
        return f"{thought} {more}".strip()
    share = 0.04 if effort == "low" else 0.15 if is_chatty else 0.8
    return thought if maybe(rng, share) else None


def _instructions(rng: Random, extra: str, has_tools: bool) -> tuple[ChatMessage, ...]:
    """Return no instruction, a common one, what the exchange needs, or both."""
    parts = [pick(rng, _SYSTEM_PROMPTS)] if maybe(rng, 0.45) else []
    if has_tools and maybe(rng, 0.15):
        parts.append(pick(rng, _TOOL_PROMPTS))
    if maybe(rng, 0.15):
        parts.append(_any_prompt(rng))
    if extra:
        parts.append(extra)
    if not parts:
        return ()
    role: Role = "developer" if maybe(rng, 0.2) else "system"
    return (ChatMessage(role, " ".join(parts)),)


def _history(rng: Random, corpus: Corpus) -> list[ChatMessage]:
    """Return zero to four earlier turns, now and then many."""
    turns = rng.choices((0, 1, 2, 3, 4, rng.randint(5, 24)), weights=(57, 18, 12, 6, 4, 3))[0]
    messages: list[ChatMessage] = []
    for _ in range(turns):
        _, exchange = draw_exchange(rng, corpus)
        if not exchange.system:
            messages += _turn(exchange)
    return messages


def _turn(exchange: Exchange) -> list[ChatMessage]:
    return [ChatMessage("user", exchange.user), ChatMessage("assistant", exchange.answer)]


def _options(rng: Random, effort: str | None, schema: ResponseSchema | None = None) -> RenderOptions:
    return RenderOptions(words.iso_date(rng), effort, schema)


def plain(rng: Random, corpus: Corpus, only: Sequence[str] | None = None) -> Example:
    """Draw a conversation without tools."""
    history = _history(rng, corpus)
    skill, exchange = draw_exchange(rng, corpus, only)
    if only is None and maybe(rng, 0.06):
        first, exchange = smalltalk.memory(rng)
        # What was told may lie some turns back, but not before the history.
        history = _turn(first) + history if maybe(rng, 0.5) else history + _turn(first)
        skill = "memory"
    effort = draw_effort(rng)
    options = _options(rng, effort)
    if only is None and maybe(rng, 0.025):
        question = pick(rng, ("What is the date?", "What is the date today?", "What day is it?", "Today's date?",
                              "Which date is it?", "What's today's date?", "Tell me the date."))  # fmt: skip
        date = options.current_date
        skill, exchange = "date", Exchange(question, f"Today is {date}.", f"The current date is {date}.")
    return _finish(rng, skill, exchange, history, (), options)


def _finish(
    rng: Random,
    skill: str,
    exchange: Exchange,
    history: Sequence[ChatMessage],
    tools: Sequence[ToolDefinition],
    options: RenderOptions,
) -> Example:
    messages = (
        *_instructions(rng, exchange.system, bool(tools)),
        *history,
        ChatMessage("user", exchange.user),
    )
    thought = _reasoning(rng, options.reasoning_effort, exchange.thought, exchange.more, skill in _CHATTY)
    return Example(messages, tuple(tools), options, AssistantReply(thought, final=exchange.answer), skill)


def formatted(rng: Random, corpus: Corpus) -> Example:
    """Draw a conversation with a response schema."""
    exchange, response = skills.structured(rng, corpus.vocabulary)
    options = _options(rng, draw_effort(rng), ResponseSchema(response["name"], response["schema"]))
    return _finish(rng, "schema", exchange, [], (), options)


def offered_but_not_needed(rng: Random, corpus: Corpus) -> Example:
    """Draw a conversation in which tools are on offer and none fits."""
    tools = other_tools(rng, corpus.vocabulary, set(), {"calculate"}, rng.randint(1, 3))
    _, exchange = draw_exchange(rng, corpus, _WITHOUT_TOOLS)
    history = _history(rng, corpus) if maybe(rng, 0.3) else []
    return _finish(rng, "tools_unused", exchange, history, tools, _options(rng, draw_effort(rng)))


def tool_conversation(rng: Random, corpus: Corpus, held_out: bool = False) -> list[Example]:
    """Draw a request for a tool: the call, and often the answer after its result as a second example."""
    use = any_use(rng, corpus.vocabulary, held_out)
    count = pick(rng, (0, 0, 0, 1, 1, 2, 3)) if maybe(rng, 0.97) else rng.randint(4, 9)
    tools = [use.tool, *other_tools(rng, corpus.vocabulary, {use.tool.name}, {use.purpose}, count)]
    rng.shuffle(tools)
    effort = draw_effort(rng)
    options = _options(rng, effort)
    messages = [*_instructions(rng, "", True)]
    if maybe(rng, 0.25):
        messages += _turn(draw_exchange(rng, corpus, _WITHOUT_TOOLS)[1])
    elif maybe(rng, 0.2):
        messages += _past_use(rng, use, corpus)
    messages.append(ChatMessage("user", use.user))
    more = f"The function {use.tool.name} fits."
    thought = _reasoning(rng, effort, use.thought, more, is_chatty=False)
    call = ToolCall("call_now", use.tool.name, use.arguments)
    first = Example(tuple(messages), tuple(tools), options, AssistantReply(thought, tool_calls=(call,)), "tool_call")
    if not maybe(rng, 0.5):
        return [first]
    # Most clients do not send reasoning back with the call.
    sent_back = thought if maybe(rng, 0.25) else None
    messages.append(ChatMessage("assistant", reasoning=sent_back, tool_calls=(call,)))
    messages.append(ChatMessage("tool", use.output, tool_call_id=call.id))
    closing = "The function answered." if effort == "high" or maybe(rng, 0.1) else None
    reply = AssistantReply(closing, final=use.answer)
    return [first, replace(first, messages=tuple(messages), reply=reply, skill="tool_answer")]


def _past_use(rng: Random, use: ToolUse, corpus: Corpus) -> list[ChatMessage]:
    """Return an earlier, finished use of another request for a tool."""
    earlier = any_use(rng, corpus.vocabulary)
    call = ToolCall("call_before", earlier.tool.name, earlier.arguments)
    return [
        ChatMessage("user", earlier.user),
        ChatMessage("assistant", tool_calls=(call,)),
        ChatMessage("tool", earlier.output, tool_call_id=call.id),
        ChatMessage("assistant", earlier.answer),
    ]


def draw_examples(rng: Random, corpus: Corpus) -> list[Example]:
    """Draw one conversation of any kind, as one or two examples."""
    kind = rng.random()
    if kind < 0.56:
        return [plain(rng, corpus)]
    if kind < 0.60:
        return [formatted(rng, corpus)]
    if kind < 0.68:
        return [offered_but_not_needed(rng, corpus)]
    return tool_conversation(rng, corpus)
