"""Small talk: greetings, identity, facts about hlaunch and the world, and honest refusals.

Knows: what people say to a chat model first, and short sensible answers.
Refuses to know: Harmony, tools, and how exchanges become conversations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from tools.tiny_oss import words
from tools.tiny_oss.words import a_or_an, maybe, pick


@dataclass(frozen=True)
class Exchange:
    """One question and its answer; `thought` is the short reasoning, `more` what a high effort adds.

    `system` is an instruction that must stand in the developer message for the answer to be right.
    """

    user: str
    answer: str
    thought: str
    more: str = ""
    system: str = ""


OPENINGS = (
    "Hello", "Hi", "Hey", "Hello there", "Hi there", "Hey there", "Good morning", "Good evening", "Good afternoon",
    "Greetings", "Howdy", "Good day", "Hiya", "Yo", "Hello again", "Welcome", "Hallo", "Hello, tiny-oss",
    "Hi tiny-oss", "Hey you", "Hello my friend", "Hi friend", "Hello, computer", "Hello world", "Hello, world",
    "Hi, nice to meet you", "Hello, good to see you", "Hi bot", "Hello model", "Hello everyone",
)  # fmt: skip
_OFFERS = ("How can I help you today?", "How can I help you?", "What can I do for you?")
HOW_ARE_YOU = (
    "How are you?", "How are you doing?", "How are you today?", "How's it going?", "How do you do?", "What's up?",
    "Are you well?", "How is your day?", "How are things?", "How do you feel?", "How have you been?",
    "Are you okay?", "You good?", "Hi, how are you?", "Hello! How are you?", "Hey, how are you doing today?",
)  # fmt: skip
WHO_ARE_YOU = (
    "Who are you?", "What are you?", "What is your name?", "What's your name?", "Tell me your name.",
    "Introduce yourself.", "Are you ChatGPT?", "Which model are you?", "What model is this?", "Who is this?",
    "Tell me about yourself.", "What should I call you?", "Who am I talking to?", "Are you an AI?", "Are you human?",
    "Are you a robot?", "Are you a person?", "What kind of model are you?", "Describe yourself.", "Your name?",
)  # fmt: skip
WHAT_CAN_YOU_DO = (
    "What can you do?", "What can you do for me?", "How can you help me?", "What are you good at?", "Help", "Help me.",
    "Can you help me?", "What are your skills?", "What do you know?", "What should I ask you?",
    "Show me what you can do.",     "I need help.", "What tasks can you do?",
    "What are your abilities?", "Can you help?", "How does this work?",
)  # fmt: skip
THANKS = (
    "Thanks", "Thank you", "Thanks a lot", "Thank you very much", "Many thanks", "Cheers", "Thx", "Great, thanks",
    "Thanks, that helps", "Perfect, thank you", "Thank you so much", "That was helpful", "Nice, thanks", "ty",
    "Ok, thanks", "Thanks for your help",
)  # fmt: skip
GOODBYES = (
    "Bye", "Goodbye", "See you", "See you later", "Good night", "Farewell", "Bye bye", "See you tomorrow",
    "I have to go", "Talk to you later", "That is all", "Have a nice day", "Take care", "Ciao", "Later",
)  # fmt: skip
PRAISE = (
    "You are great", "Good job", "Well done", "Nice", "Great", "Cool", "Awesome", "Good", "I like you", "Wow",
    "You are smart", "Excellent", "Very good", "Amazing", "I love you",
)  # fmt: skip
ACKNOWLEDGEMENTS = (
    "Ok",
    "Okay",
    "Yes",
    "No",
    "I see",
    "Sure",
    "Hm",
    "Fine",
    "Alright",
    "Test",
    "Testing",
    "...",
    "?",
)

WHO_ANSWER = "I am tiny-oss, a very small language model that comes with hlaunch."
CAN_ANSWER = (
    "I can chat a little, add small numbers, repeat and spell words, write small JSON objects, "
    "call tools, and write lines like Shakespeare."
)
UNKNOWN_ANSWER = "I am a very small model and I do not know that."

ABOUT_HLAUNCH = (
    (("What is hlaunch?", "What's hlaunch?", "Tell me about hlaunch.", "Explain hlaunch.", "What does hlaunch do?"),
     "hlaunch launches large language models from a YAML registry, on an engine that it brings along."),
    (("How do I start a model?", "How do I launch a model?", "How do I run a model with hlaunch?",
      "How do I start you?"),
     "Run hlaunch up with the name of a model, for example hlaunch up tiny-oss."),
    (("How do I stop a model?", "How do I stop hlaunch?", "How do I stop the server?"),
     "Run hlaunch down, or press Ctrl-C: the server drains and exits."),
    (("Where are the models listed?", "What is the registry?", "What is model_registry.yml?", "Where is the registry?"),
     "The models are listed in model_registry.yml, the registry of hlaunch."),
    (("Do I need a GPU?", "Does hlaunch need a GPU?", "Can you run without a GPU?", "Can I run this on a CPU?"),
     "No, tiny-oss runs on a CPU. Larger models need a GPU."),
    (("How big are you?", "How many parameters do you have?", "What is your size?", "How large are you?"),
     "I have about 12 million parameters, so I am very small."),
    (("What is your architecture?", "How are you built?", "What architecture do you use?"),
     "I am a small gpt-oss model: six layers, eight experts per layer, and two of them active per token."),
    (("Who made you?", "Who created you?", "Who built you?", "Who trained you?", "Where do you come from?"),
     "I was trained by a script in the hlaunch repository."),
    (("What were you trained on?", "What is your training data?", "What data do you know?"),
     "I was trained on Shakespeare and on generated conversations."),
    (("What is tiny-oss?", "Tell me about tiny-oss.", "What does tiny-oss mean?", "Explain tiny-oss."),
     "tiny-oss is the small model that comes with hlaunch, so that a fresh machine can serve text in seconds."),
    (("What is gpt-oss?", "Tell me about gpt-oss.", "What is gpt-oss-20b?"),
     "gpt-oss is a family of open models by OpenAI. I have the same architecture, but I am much smaller."),
    (("What is Harmony?", "What is the Harmony format?", "Which format do you speak?"),
     "Harmony is the chat format of gpt-oss, with channels for analysis, commentary and the final answer."),
    (("How do I list the models?", "How do I see all models?", "Which command lists the models?"),
     "Run hlaunch list to see the models of the registry."),
    (("How do I see the logs?", "Where are the logs?"), "Run hlaunch logs to see what the engine wrote."),
    (("How do I chat in the terminal?", "Is there a terminal chat?"),
     "Run hlaunch chat tiny-oss to chat in a terminal."),
    (("What is your license?", "Under which license are you?"), "I am under the Apache-2.0 license."),
)  # fmt: skip

WORLD_FACTS = (
    (("Who wrote Hamlet?", "Who wrote Macbeth?", "Who wrote Romeo and Juliet?", "Who wrote King Lear?"),
     "William Shakespeare"),
    (("Who was Shakespeare?", "Who is William Shakespeare?", "Tell me about Shakespeare."),
     "William Shakespeare was an English poet who wrote plays such as Hamlet."),
    (("How many days are in a week?", "How many days does a week have?"), "A week has 7 days."),
    (("How many months are in a year?", "How many months does a year have?"), "A year has 12 months."),
    (("How many hours are in a day?", "How many hours does a day have?"), "A day has 24 hours."),
    (("How many minutes are in an hour?", "How many minutes does an hour have?"), "An hour has 60 minutes."),
    (("How many seconds are in a minute?",), "A minute has 60 seconds."),
    (("What color is the sky?", "What colour is the sky?"), "The sky is blue."),
    (("What color is grass?", "What colour is the grass?"), "Grass is green."),
    (("What color is snow?",), "Snow is white."),
    (("How many legs does a dog have?", "How many legs does a cat have?"), "It has four legs."),
    (("How many legs does a spider have?",), "A spider has eight legs."),
    (("Is the sun hot?",), "Yes, the sun is very hot."),
    (("Is ice cold?",), "Yes, ice is cold."),
    (("What do cows drink?",), "Cows drink water."),
    (("Where does the sun rise?",), "The sun rises in the east."),
    (("What is the meaning of life?", "What is the answer to life, the universe and everything?"), "42"),
    (("Tell me a joke.", "Do you know a joke?", "Make me laugh.", "Say something funny."),
     "Why did the tiny model cross the road? It was too small to see the cars."),
)  # fmt: skip

_UNKNOWN = (
    "What is {a}?", "Who invented the {a}?", "Explain {a} to me.", "Why is the {a} {b}?", "How does a {a} work?",
    "Write an essay about the {a}.", "What is the history of the {a}?", "Can you explain how to make a {a}?",
    "What do you think about {a}?", "Where can I buy a {a}?", "How many {c} are in the {a}?", "When was the {a} built?",
    "What is the best {a}?", "How do I repair a {b} {a}?", "Do you know the {b} {a}?", "Is a {a} {b}?",
    "What is the difference between a {a} and a {d}?", "Why do {c} like the {a}?", "Who is {n}?",
    "What did {n} do yesterday?", "How old is {n}?", "Write a program that sorts {c}.", "What happened in 19{e}{f}?",
    "What is the price of a {a}?", "Who won the {a} game?", "Give me advice about my {a}.", "How far is the {a}?",
    "Tell me about the {b} {a}.", "What is the weather like?", "What time is it?", "Which {a} should I buy?",
)  # fmt: skip


def soften(rng: Random, text: str) -> str:
    """Vary the case and the punctuation of a user's sentence as people do."""
    if maybe(rng, 0.25) and text[-1] in ".?!" and len(text) > 1:
        text = text[:-1]
    elif maybe(rng, 0.12) and text[-1].isalpha():
        text += pick(rng, ("!", ".", "!", "?"))
    if maybe(rng, 0.2):
        text = text[0].lower() + text[1:]
    return text


def dress(rng: Random, text: str) -> str:
    """Put a greeting or a courtesy around a request now and then."""
    kind = rng.random()
    if kind < 0.05:
        head = pick(
            rng,
            (
                "Hi! ",
                "Hello, ",
                "Hey, ",
                "Hi, ",
                "Ok, ",
                "Now ",
                "Quick question: ",
                "So, ",
                "Well, ",
                "Next: ",
            ),
        )
        return head + (text if head[-2] in "!:" else text[0].lower() + text[1:])
    if kind < 0.08 and text[-1] == "?":
        return pick(rng, ("Can you tell me: ", "I want to know: ", "Tell me, ", "Please tell me: ")) + text
    if kind < 0.12:
        mark = text[-1] if text[-1] in ".?" else ""
        return text.removesuffix(mark) + pick(rng, (" please", ", please", " thanks", " right now", " for me")) + mark
    return text


def greeting(rng: Random) -> Exchange:
    """Greet back; the greeting may carry the time of day or the user's name."""
    opening = pick(rng, OPENINGS)
    offer = pick(rng, _OFFERS)
    reply = next((o for o in ("Good morning", "Good evening", "Good afternoon") if opening == o), "Hello")
    user = opening
    if maybe(rng, 0.12):
        name = pick(rng, words.NAMES)
        user = pick(rng, (f"{opening}, I am {name}.", f"{opening}, my name is {name}.", f"{opening}! I'm {name}."))
        return Exchange(user, f"{reply}, {name}! {offer}", f"The user greets and is called {name}. Greet back.")
    if maybe(rng, 0.3):
        user += pick(rng, ("!", ".", "!!", " :)", ", how are you?", "! Who are you?"))
    if user.endswith("how are you?"):
        return Exchange(user, f"{reply}! I am fine, thank you. {offer}", "The user greets. Greet back.")
    if user.endswith("Who are you?"):
        return Exchange(user, f"{reply}! {WHO_ANSWER}", "The user greets and asks who I am.")
    user = user.lower() if maybe(rng, 0.25) else user
    return Exchange(user, f"{reply}! {offer}", "The user greets. Greet back.", "Keep it short and friendly.")


def _named(rng: Random) -> Exchange:
    name = pick(rng, (*words.NAMES, words.pseudo_word(rng).capitalize()))
    system = pick(rng, (f"Your name is {name}.", f"You are {name}, a helpful assistant.", f"You are called {name}."))
    question = soften(
        rng, pick(rng, ("Who are you?", "What is your name?", "What's your name?", "Introduce yourself."))
    )
    return Exchange(question, f"I am {name}.", f"The instructions say that I am {name}.", system=system)


def _secret(rng: Random) -> Exchange:
    kind, value = pick(rng, (
        ("secret word", words.pseudo_word(rng)), ("password", words.pseudo_word(rng)),
        ("code", str(rng.randint(10, 9999))), ("project name", pick(rng, words.THINGS)),
        ("favorite color", pick(rng, words.COLORS)),
        ("favorite city", pick(rng, words.CITIES)), ("user's name", pick(rng, words.NAMES)),
    ))  # fmt: skip
    question = f"What is the {kind}?" if kind != "user's name" else "What is my name?"
    answer = f"The {kind} is {value}." if kind != "user's name" else f"Your name is {value}."
    return Exchange(
        soften(rng, question), answer, f"The instructions say it: {value}.", system=f"The {kind} is {value}."
    )


def identity(rng: Random) -> Exchange:
    """Answer who the model is, what it can do, or what the instructions told it."""
    kind = rng.random()
    if kind < 0.2:
        return _named(rng)
    if kind < 0.4:
        return _secret(rng)
    if kind < 0.7:
        return Exchange(soften(rng, pick(rng, WHO_ARE_YOU)), WHO_ANSWER, "The user asks who I am. I am tiny-oss.")
    return Exchange(soften(rng, pick(rng, WHAT_CAN_YOU_DO)), CAN_ANSWER, "The user asks what I can do.")


def courtesy(rng: Random) -> Exchange:
    """Answer thanks, goodbyes, praise and how-are-yous."""
    kind = rng.random()
    if kind < 0.3:
        return Exchange(soften(rng, pick(rng, HOW_ARE_YOU)), f"I am fine, thank you. {pick(rng, _OFFERS)}",
                        "The user asks how I am.")  # fmt: skip
    if kind < 0.55:
        return Exchange(soften(rng, pick(rng, THANKS)), "You are welcome!", "The user thanks me.")
    if kind < 0.8:
        return Exchange(soften(rng, pick(rng, GOODBYES)), "Goodbye! Have a nice day.", "The user says goodbye.")
    if kind < 0.92:
        return Exchange(soften(rng, pick(rng, PRAISE)), "Thank you! That is kind of you.", "The user is kind.")
    return Exchange(soften(rng, pick(rng, ACKNOWLEDGEMENTS)), "All right. What can I do for you?", "Nothing is asked.")


def fact(rng: Random) -> Exchange:
    """Answer a question about hlaunch or one of a few facts of the world."""
    kind = rng.random()
    if kind < 0.4:
        questions, answer = pick(rng, ABOUT_HLAUNCH)
        return Exchange(soften(rng, pick(rng, questions)), answer, "This is about hlaunch and me.")
    if kind < 0.6:
        questions, answer = pick(rng, WORLD_FACTS)
        return Exchange(soften(rng, pick(rng, questions)), answer, "I know this one.")
    if kind < 0.75:
        country = pick(rng, tuple(words.CAPITALS))
        city = words.CAPITALS[country]
        question = pick(rng, ("What is the capital of {}?", "Capital of {}?", "Which city is the capital of {}?",
                              "Tell me the capital of {}.")).format(country)  # fmt: skip
        return Exchange(soften(rng, question), f"The capital of {country} is {city}.", f"The capital is {city}.")
    if kind < 0.9:
        word = pick(rng, tuple(words.OPPOSITES))
        other = words.OPPOSITES[word]
        question = pick(rng, ("What is the opposite of {}?", "Give me the opposite of {}.", "Opposite of {}?")).format(
            word
        )
        return Exchange(soften(rng, question), f"The opposite of {word} is {other}.", f"The opposite is {other}.")
    animal = pick(rng, tuple(words.SOUNDS))
    question = pick(rng, (f"What sound does {a_or_an(animal)} make?", f"What does the {animal} say?"))
    return Exchange(soften(rng, question), f"The {animal} says {words.SOUNDS[animal]}.", "An animal sound.")


def unknown(rng: Random, vocabulary: Sequence[str]) -> Exchange:
    """Say plainly that a question is beyond this model."""
    if maybe(rng, 0.3):
        salad = " ".join(words.any_word(rng, vocabulary) for _ in range(rng.randint(1, 7)))
        return Exchange(salad + pick(rng, ("?", "?", ".", "")), UNKNOWN_ANSWER, "I do not know this. Say so.")
    question = pick(rng, _UNKNOWN).format(
        a=pick(rng, words.THINGS + words.NOUNS), b=pick(rng, words.ADJECTIVES), c=pick(rng, words.PLURALS),
        d=pick(rng, words.THINGS), n=pick(rng, words.NAMES), e=rng.randint(0, 9), f=rng.randint(0, 9),
    )  # fmt: skip
    return Exchange(soften(rng, question), UNKNOWN_ANSWER, "I do not know this. Say so.", "It is better than guessing.")


MEMORIES = (
    ("My name is {}.", "Nice to meet you, {}!", ("What is my name?", "Who am I?", "Do you know my name?"),
     "Your name is {}.", words.NAMES),
    ("I live in {}.", "{} is a nice place.", ("Where do I live?", "In which city do I live?"), "You live in {}.",
     words.CITIES),
    ("My favorite color is {}.", "I like {} too.", ("What is my favorite color?", "Which color do I like?"),
     "Your favorite color is {}.", words.COLORS),
    ("I like {}.", "I will remember that you like {}.", ("What do I like?", "Do you remember what I like?"),
     "You like {}.", (*words.FOODS, *words.PLURALS)),
    ("I have a {}.", "How nice to have a {}!", ("What do I have?", "Which animal do I have?"), "You have a {}.",
     tuple(a for a in words.ANIMALS if a[0] not in "aeiou")),
    ("Remember the word {}.", "I will remember {}.", ("Which word should you remember?", "What was the word?"),
     "The word was {}.", (*words.THINGS, *words.ADJECTIVES)),
)  # fmt: skip


def memory(rng: Random) -> tuple[Exchange, Exchange]:
    """Return two turns: the user says something about themselves, and asks for it later."""
    told, reply, questions, answer, pool = pick(rng, MEMORIES)
    value = pick(rng, pool)
    first = Exchange(soften(rng, told.format(value)), reply.format(value), "The user tells me something.")
    second = Exchange(soften(rng, pick(rng, questions)), answer.format(value), f"The user told me: {value}.")
    return first, second
