"""Families of real-looking tools: weather, calculator, time, search and others.

Knows: for each family several names, parameters, ways to ask, and what the tool returns.
Refuses to know: how a schema or a call is written; `toolcalls.py` does that.

A family is data. `{slot}` in a request names a parameter; the words for the function and its parameters vary, so
that the model must read them from the offered schema.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from random import Random

from tools.tiny_oss import words
from tools.tiny_oss.words import maybe, pick

Value = str | int | float | bool | list[str]
Result = Callable[[Random, Mapping[str, Value]], tuple[dict[str, Value], str]]


@dataclass(frozen=True)
class Slot:
    """One parameter: the names it may have, its JSON type, its descriptions and its values."""

    names: Sequence[str]
    kind: str
    about: Sequence[str]
    values: Callable[[Random], Value]
    choices: Sequence[str] = ()


@dataclass(frozen=True)
class Family:
    """One kind of tool; `asks` are requests with `{slot}` placeholders, `vague` ones lack what is required."""

    names: Sequence[str]
    about: Sequence[str]
    slots: Mapping[str, Slot]
    asks: Sequence[str]
    result: Result
    thought: str


def _pool(values: Sequence[str]) -> Callable[[Random], Value]:
    return lambda rng: pick(rng, values)


def _between(low: int, high: int) -> Callable[[Random], Value]:
    return lambda rng: rng.randint(low, high)


def _expression(rng: Random) -> Value:
    top = pick(rng, (10, 100, 1000, 10000))
    text = f"{rng.randint(0, top)} {pick(rng, '+-*/')} {rng.randint(1, top)}"
    if maybe(rng, 0.2):
        text += f" {pick(rng, '+-*')} {rng.randint(1, top)}"
    return text.replace(" ", "") if maybe(rng, 0.3) else text


def _topic(rng: Random) -> Value:
    return pick(
        rng,
        (
            pick(rng, words.THINGS),
            f"{pick(rng, words.ADJECTIVES)} {pick(rng, words.PLURALS)}",
            f"{pick(rng, words.NOUNS)} {pick(rng, words.NOUNS)}",
            f"{pick(rng, words.THINGS)} in {pick(rng, words.CITIES)}",
            words.pseudo_word(rng),
            f"{words.pseudo_word(rng)} {pick(rng, words.NOUNS)}",
        ),
    )


def _message(rng: Random) -> Value:
    return pick(
        rng,
        (
            f"the {pick(rng, words.THINGS)} is {pick(rng, words.ADJECTIVES)}",
            f"see you on {pick(rng, words.DAYS)}",
            f"bring the {pick(rng, words.THINGS)}",
            f"buy {pick(rng, words.FOODS)}",
            f"call {pick(rng, words.NAMES)}",
            f"water the {pick(rng, ('flowers', 'garden', 'tree'))}",
            "hello",
            "good morning",
            f"we need {rng.randint(2, 99)} {pick(rng, words.PLURALS)}",
        ),
    )


def _mail(rng: Random) -> Value:
    return f"{pick(rng, words.NAMES).lower()}@{pick(rng, ('example.com', 'mail.com', 'hlaunch.dev', 'test.org'))}"


def _symbol(rng: Random) -> Value:
    return "".join(pick(rng, "ABCDEFGHIJKLMNOPQRSTUVWXYZ") for _ in range(rng.randint(3, 4)))


def _path(rng: Random) -> Value:
    stem = pick(rng, (pick(rng, words.THINGS), pick(rng, words.NOUNS), words.pseudo_word(rng)))
    return f"{stem}.{pick(rng, ('txt', 'md', 'json', 'py', 'csv', 'yml'))}"


def _other_city(rng: Random) -> str:
    return pick(rng, (words.pseudo_word(rng).capitalize(), pick(rng, words.FOREIGN),
                      f"{pick(rng, words.CITIES)}, {pick(rng, tuple(words.CAPITALS))}"))  # fmt: skip


CITY = Slot(
    ("location", "city", "place", "town", "where"), "string",
    ("The city", "City name", "Name of the city", "The city and state, e.g. San Francisco, CA", "Where to look", ""),
    lambda rng: pick(rng, words.CITIES) if maybe(rng, 0.75) else _other_city(rng),
)  # fmt: skip
UNIT = Slot(("unit", "format", "units", "scale"), "string", ("The unit", "Temperature unit", ""),
            _pool(("celsius", "fahrenheit")), ("celsius", "fahrenheit"))  # fmt: skip
DAY = Slot(("day", "date", "when"), "string", ("The day", "Day of the week", "When", ""), _pool(words.DAYS))
PERSON = Slot(("to", "recipient", "person", "name", "contact"), "string", ("Who to reach", "The person", "Name", ""),
              _pool(words.NAMES))  # fmt: skip
TEXT = Slot(
    ("text", "message", "body", "content"),
    "string",
    ("The text", "What to say", "Message body", ""),
    _message,
)
MINUTES = Slot(("minutes", "duration", "length", "duration_minutes"), "integer",
               ("Duration in minutes", "Number of minutes", "How long", ""), _between(1, 120))  # fmt: skip
QUERY = Slot(("query", "q", "search_query", "term", "keywords"), "string",
             ("The search query", "What to search for", "Search terms", ""), _topic)  # fmt: skip
AMOUNT = Slot(("amount", "value", "quantity", "number"), "number", ("The amount", "How much", ""), _between(1, 5000))
FROM_CURRENCY = Slot(("from_currency", "source", "from", "base"), "string", ("Currency to convert from", ""),
                     _pool(words.CURRENCIES))  # fmt: skip
TO_CURRENCY = Slot(("to_currency", "target", "to", "quote"), "string", ("Currency to convert to", ""),
                   _pool(words.CURRENCIES))  # fmt: skip
CLOCK = Slot(("time", "at", "start_time", "when"), "string", ("The time, HH:MM", "When", ""), words.clock_time)


def _weather(rng: Random, args: Mapping[str, Value]) -> tuple[dict[str, Value], str]:
    degrees, sky = (
        rng.randint(-10, 38),
        pick(rng, ("sunny", "cloudy", "rainy", "windy", "snowy", "foggy", "clear")),
    )
    unit = str(args.get("unit", "celsius"))
    result: dict[str, Value] = {
        pick(rng, ("temperature", "temp")): degrees,
        pick(rng, ("condition", "sky", "conditions")): sky,
    }
    if maybe(rng, 0.4):
        result["unit"] = unit
        return result, f"It is {degrees} degrees {unit} and {sky} in {args['city']}."
    return result, f"It is {degrees} degrees and {sky} in {args['city']}."


def _number(rng: Random, args: Mapping[str, Value]) -> tuple[dict[str, Value], str]:
    number = rng.randint(-999, 99999)
    return {pick(rng, ("result", "value", "answer")): number}, f"The result is {number}."


def _clock(rng: Random, args: Mapping[str, Value]) -> tuple[dict[str, Value], str]:
    now = f"{rng.randint(0, 23):02d}:{rng.randint(0, 59):02d}"
    where = f" in {args['city']}" if "city" in args else ""
    return {pick(rng, ("time", "now", "current_time")): now}, f"It is {now}{where}."


def _found(rng: Random, args: Mapping[str, Value]) -> tuple[dict[str, Value], str]:
    title = f"{pick(rng, words.ADJECTIVES)} {pick(rng, words.THINGS)}".capitalize()
    return {pick(rng, ("title", "result", "top_result", "name")): title}, f"I found this: {title}."


def _done(rng: Random, args: Mapping[str, Value]) -> tuple[dict[str, Value], str]:
    result: Mapping[str, Value] = pick(
        rng, ({"status": "ok"}, {"ok": True}, {"success": True}, {"status": "done"}, {"status": "sent"})
    )
    return dict(result), "Done."


def _converted(rng: Random, args: Mapping[str, Value]) -> tuple[dict[str, Value], str]:
    number = rng.randint(1, 9999)
    return (
        {pick(rng, ("result", "amount", "converted")): number},
        f"{args['amount']} {args['source']} is {number} {args['target']}.",
    )


def _translated(rng: Random, args: Mapping[str, Value]) -> tuple[dict[str, Value], str]:
    text = f"{words.pseudo_word(rng)} {words.pseudo_word(rng)}"
    return {pick(rng, ("translation", "text", "result")): text}, f"In {args['language']} it is: {text}."


def _price(rng: Random, args: Mapping[str, Value]) -> tuple[dict[str, Value], str]:
    price = rng.randint(1, 999)
    return {pick(rng, ("price", "last", "close")): price}, f"The price of {args['symbol']} is {price}."


def _rolled(rng: Random, args: Mapping[str, Value]) -> tuple[dict[str, Value], str]:
    number = rng.randint(1, 20)
    return {pick(rng, ("number", "result", "value")): number}, f"The number is {number}."


def _booked(rng: Random, args: Mapping[str, Value]) -> tuple[dict[str, Value], str]:
    code = "".join(pick(rng, "ABCDEFGHJKLMNPQRSTUVWXYZ23456789") for _ in range(5))
    return {pick(rng, ("booking", "code", "confirmation")): code}, f"It is booked. The code is {code}."


def _content(rng: Random, args: Mapping[str, Value]) -> tuple[dict[str, Value], str]:
    text = f"{pick(rng, words.ADJECTIVES)} {pick(rng, words.THINGS)}"
    return {pick(rng, ("content", "text", "data")): text}, f"It says: {text}."


FAMILIES: tuple[Family, ...] = (
    Family(
        ("get_weather", "weather", "get_current_weather", "fetch_weather", "current_weather", "lookup_weather",
         "getWeather", "weather_report", "get_forecast", "check_weather"),
        ("Get the weather", "Get the current weather for a city", "Gets the weather in a location.",
         "Returns the current weather", "Get current temperature for a given location.", "Weather lookup"),
        {"city": CITY, "unit": UNIT, "day": DAY},
        ("What is the weather in {city}?", "What's the weather in {city}?", "How is the weather in {city}?",
         "Weather in {city}?", "What is the weather like in {city}?", "What's the weather like in {city} today?",
         "Is it raining in {city}?", "How warm is it in {city}?", "Tell me the weather for {city}.",
         "What is the temperature in {city}?", "Get the weather in {city}", "weather {city}",
         "What is the weather in {city} in {unit}?", "How warm is it in {city} in {unit}?",
         "Give me the weather in {city} on {day}.", "Will it rain in {city} on {day}?",
         "Do I need an umbrella in {city}?", "Check the weather in {city} please.", "Is it cold in {city} today?"),
        _weather, "We need the weather in {city}.",
    ),
    Family(
        ("calculate", "calculator", "calc", "evaluate", "compute", "math", "eval_expression", "do_math"),
        ("Calculate an expression", "Evaluates a mathematical expression.", "Do arithmetic", "A calculator",
         "Compute the value of an expression"),
        {"expression": Slot(("expression", "expr", "input", "formula", "query"), "string",
                            ("The expression", "Expression to evaluate, e.g. 2 + 2", "Math expression", ""),
                            _expression)},
        ("What is {expression}?", "Calculate {expression}.", "Compute {expression}", "How much is {expression}?",
         "Use the calculator for {expression}.", "What's {expression}?", "Evaluate {expression}", "{expression}",
         "Please calculate {expression}", "Can you work out {expression}?"),
        _number, "We need to calculate {expression}.",
    ),
    Family(
        ("get_time", "time", "current_time", "get_current_time", "now", "clock", "getTime", "time_in_city"),
        ("Get the current time", "Returns the time in a city.", "Current time in a place", "Tells the time"),
        {"city": CITY},
        ("What time is it in {city}?", "What is the time in {city}?", "Tell me the time in {city}.", "Time in {city}?",
         "Current time in {city}?", "What's the time in {city} now?", "How late is it in {city}?"),
        _clock, "We need the time in {city}.",
    ),
    Family(
        ("get_time", "now", "current_time", "get_current_time", "clock", "what_time"),
        ("Get the current time", "Returns the current time.", "Tells the time"),
        {},
        ("What time is it?", "What is the time?", "Tell me the time.", "Time?", "What's the time now?",
         "Do you have the time?"),
        _clock, "We need the time.",
    ),
    Family(
        ("search", "web_search", "search_web", "google", "find", "lookup", "search_internet", "internet_search"),
        ("Search the web", "Searches the internet.", "Web search", "Find pages about something"),
        {"query": QUERY,
         "limit": Slot(("limit", "count", "max_results", "n"), "integer", ("Number of results", ""), _between(1, 20))},
        ("Search for {query}.", "Search the web for {query}", "Find {query}", "Look up {query}.", "Google {query}",
         "Find {limit} pages about {query}.", "Search for {query} and give me {limit} results.",
         "Can you search for {query}?", "What does the web say about {query}?", "Find information about {query}."),
        _found, "We need to search for {query}.",
    ),
    Family(
        ("send_email", "email", "send_mail", "mail", "sendEmail", "compose_email"),
        ("Send an email", "Sends an email to someone.", "Send a mail"),
        {"to": Slot(("to", "recipient", "address", "email"), "string", ("Email address", "Who gets it", ""), _mail),
         "text": TEXT},
        ("Send an email to {to} saying {text}.", "Email {to}: {text}", "Write an email to {to} with the text {text}",
         "Mail {to} that {text}"),
        _done, "We send an email to {to}.",
    ),
    Family(
        ("send_message", "message", "text", "send_sms", "notify", "sms", "sendMessage"),
        ("Send a message to a person", "Sends a text message.", "Message someone"),
        {"person": PERSON, "text": TEXT},
        ("Tell {person} that {text}.", "Send {person} the message {text}", "Text {person}: {text}",
         "Message {person} that {text}", "Send a message to {person}: {text}"),
        _done, "We send a message to {person}.",
    ),
    Family(
        ("set_timer", "timer", "start_timer", "countdown", "setTimer"),
        ("Set a timer", "Starts a timer.", "Start a countdown"),
        {"minutes": MINUTES},
        ("Set a timer for {minutes} minutes.", "Start a {minutes} minute timer.", "Timer for {minutes} minutes",
         "Wake me in {minutes} minutes.", "{minutes} minutes timer please"),
        _done, "We set a timer of {minutes} minutes.",
    ),
    Family(
        ("create_reminder", "remind", "add_reminder", "reminder", "remind_me", "set_reminder"),
        ("Create a reminder", "Reminds the user of something.", "Add a reminder"),
        {"text": TEXT, "time": CLOCK},
        ("Remind me at {time}: {text}", "Set a reminder at {time}: {text}", "At {time} remind me of this: {text}",
         "Remind me: {text}", "Create a reminder: {text}"),
        _done, "We create a reminder.",
    ),
    Family(
        ("convert_currency", "currency", "exchange", "convert", "exchange_rate", "convertCurrency"),
        ("Convert money", "Converts an amount between currencies.", "Currency conversion"),
        {"amount": AMOUNT, "source": FROM_CURRENCY, "target": TO_CURRENCY},
        ("Convert {amount} {source} to {target}.", "How much is {amount} {source} in {target}?",
         "What is {amount} {source} in {target}?", "Change {amount} {source} to {target}",
         "{amount} {source} in {target}"),
        _converted, "We convert {amount} {source} to {target}.",
    ),
    Family(
        ("translate", "translate_text", "translator", "translation"),
        ("Translate text", "Translates text to a language.", "Translation"),
        {"text": TEXT,
         "language": Slot(("language", "to", "target_language", "lang"), "string", ("Target language", ""),
                          _pool(words.LANGUAGES))},
        ("Translate {text} to {language}.", "How do you say {text} in {language}?", "Translate to {language}: {text}",
         'Translate "{text}" into {language}', "What is {text} in {language}?"),
        _translated, "We translate to {language}.",
    ),
    Family(
        ("get_stock_price", "stock_price", "stock", "quote", "get_quote", "ticker"),
        ("Get a stock price", "Returns the price of a stock.", "Stock quote"),
        {"symbol": Slot(("symbol", "ticker", "stock", "code"), "string", ("Ticker symbol", "Stock symbol", ""),
                        _symbol)},
        ("What is the price of {symbol}?", "Stock price of {symbol}?", "How is {symbol} doing?", "Quote {symbol}",
         "What does {symbol} cost?", "Get the stock price for {symbol}."),
        _price, "We need the price of {symbol}.",
    ),
    Family(
        ("set_light", "light", "switch_light", "toggle_light", "lights", "control_light"),
        ("Switch a light", "Turns a light on or off.", "Control the lights"),
        {"room": Slot(("room", "where", "light", "location"), "string", ("Which room", "The room", ""),
                      _pool(("kitchen", "bedroom", "hall", "garden", "bathroom", "office", "living room", "garage"))),
         "state": Slot(("state", "mode", "power"), "string", ("on or off", "New state", ""), _pool(("on", "off")),
                       ("on", "off"))},
        ("Turn {state} the light in the {room}.", "Switch the {room} light {state}.", "Light {state} in the {room}",
         "Turn the {room} light {state} please", "{room} light {state}"),
        _done, "We switch the light in the {room} {state}.",
    ),
    Family(
        ("play_music", "play", "play_song", "music", "play_track"),
        ("Play music", "Plays a song.", "Start music"),
        {"song": Slot(("song", "title", "track", "query", "name"), "string", ("The song", "Title", ""), _topic)},
        ("Play {song}.", "Play the song {song}", "I want to hear {song}.", "Put on {song}", "Can you play {song}?"),
        _done, "We play {song}.",
    ),
    Family(
        ("roll_dice", "roll", "dice", "random_number", "rollDice"),
        ("Roll dice", "Rolls a die.", "Random number"),
        {"sides": Slot(("sides", "faces", "max", "n"), "integer", ("Number of sides", ""), _between(4, 100))},
        ("Roll a die with {sides} sides.", "Roll a {sides} sided die", "Roll the dice with {sides} sides.",
         "Throw a die with {sides} sides"),
        _rolled, "We roll a die with {sides} sides.",
    ),
    Family(
        ("book_flight", "flight", "find_flight", "search_flights", "reserve_flight", "bookFlight"),
        ("Book a flight", "Finds a flight between two cities.", "Flights"),
        {"origin": Slot(("origin", "from", "from_city", "departure"), "string", ("Where it starts", ""),
                        _pool(words.CITIES)),
         "target": Slot(("destination", "to", "to_city", "arrival"), "string", ("Where it goes", ""),
                        _pool(words.CITIES)),
         "day": DAY},
        ("Book a flight from {origin} to {target}.", "I need a flight from {origin} to {target} on {day}.",
         "Find a flight from {origin} to {target} on {day}", "Fly me from {origin} to {target}"),
        _booked, "We need a flight from {origin} to {target}.",
    ),
    Family(
        ("book_table", "reserve_table", "restaurant", "book_restaurant", "reservation"),
        ("Book a table", "Reserves a table in a restaurant.", "Restaurant booking"),
        {"people": Slot(("people", "guests", "party_size", "persons"), "integer", ("Number of people", ""),
                        _between(1, 12)),
         "time": CLOCK, "city": CITY},
        ("Book a table for {people} at {time}.", "Reserve a table for {people} people at {time} in {city}.",
         "I need a table for {people} in {city} at {time}", "Table for {people} at {time} please"),
        _booked, "We book a table for {people}.",
    ),
    Family(
        ("read_file", "open_file", "cat", "get_file", "load_file", "readFile"),
        ("Read a file", "Reads a file and returns its text.", "Open a file"),
        {"path": Slot(("path", "file", "filename", "file_path"), "string", ("Path of the file", "File name", ""),
                      _path)},
        ("Read {path}.", "Open the file {path}", "What is in {path}?", "Show me {path}.", "Read the file {path} please",
         "Print {path}"),
        _content, "We need to read {path}.",
    ),
    Family(
        ("add_event", "create_event", "calendar", "schedule", "add_to_calendar", "schedule_meeting"),
        ("Add an event to the calendar", "Creates a calendar event.", "Schedule a meeting"),
        {"person": PERSON, "day": DAY, "time": CLOCK},
        ("Plan a meeting with {person} on {day} at {time}.", "Schedule a call with {person} on {day} at {time}",
         "Meet {person} on {day} at {time}, put it in my calendar.", "Add a meeting with {person} on {day} at {time}"),
        _done, "We add a meeting with {person}.",
    ),
    Family(
        ("add_todo", "create_task", "add_task", "todo", "new_task", "add_item"),
        ("Add a task to the list", "Creates a todo item.", "Add to the todo list"),
        {"text": Slot(("title", "task", "text", "item"), "string", ("The task", "What to do", ""), _message),
         "urgent": Slot(("urgent", "important", "priority"), "boolean", ("Whether it is urgent", ""),
                        lambda rng: True)},
        ("Add {text} to my list.", "Add a task: {text}", "New todo: {text}", "Put this on my list: {text}",
         "Add an urgent task: {text}"),
        _done, "We add a task.",
    ),
)  # fmt: skip
URGENT_ASK = "Add an urgent task: {text}"
"""The only request that sets a boolean by its wording rather than by a placeholder."""
