"""Tool use: several tools are offered, one request is made, and the right call with the right arguments is the answer.

A tool's name, its parameters' names and its wording vary, so that the schema has to be read; values are copied from the request.
Level 2 offers more tools, level 3 may ask for several calls. Some requests fit no tool, and some rows go on from a tool's result.
"""

# ruff: noqa: E501 - the table of tools stays one entry a line
import json
import random
from collections.abc import Callable
from dataclasses import dataclass

from words import ADJECTIVES, CITIES, COLORS, city, distinct, made_up, person, word

NO_TOOL = "None of the tools can do this."


@dataclass(frozen=True)
class Parameter:
    slot: str
    names: tuple[str, ...]
    type: str
    make: Callable[[random.Random], object]
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Family:
    """A tool with its spellings; every request names all slots except those in square brackets, which may be left out."""

    verbs: tuple[str, ...]
    nouns: tuple[str, ...]
    description: str
    parameters: tuple[Parameter, ...]
    requests: tuple[str, ...]


def _integer(low: int, high: int) -> Callable[[random.Random], int]:
    return lambda rng: rng.randint(low, high)


def _title(rng: random.Random) -> str:
    return " ".join(distinct(word, rng.randint(1, 3), rng))


def _date(rng: random.Random) -> str:
    return f"20{rng.randint(20, 35)}-{rng.randint(1, 12):02}-{rng.randint(1, 28):02}"


def _time(rng: random.Random) -> str:
    return f"{rng.randint(0, 23):02}:{rng.choice(['00', '05', '10', '15', '20', '30', '40', '45', '50'])}"


def _email(rng: random.Random) -> str:
    return f"{made_up(rng)}@{rng.choice(['mail', 'post', 'web', made_up(rng, 1)])}.{rng.choice(['com', 'org', 'net'])}"


def _path(rng: random.Random) -> str:
    return "/".join(
        ["", *distinct(word, rng.randint(1, 2), rng), f"{word(rng)}.{rng.choice(['txt', 'csv', 'py', 'md'])}"]
    )


def _code(rng: random.Random) -> str:
    return "".join(rng.choice("ABCDEFGHJKLMNPQRSTUVWXYZ") for _ in range(2)) + str(rng.randint(100, 9999))


def _choice(slot: str, names: str, *choices: str) -> Parameter:
    return Parameter(slot, tuple(names.split()), "string", lambda rng: rng.choice(choices), choices)


def _string(slot: str, names: str, make: Callable[[random.Random], str]) -> Parameter:
    return Parameter(slot, tuple(names.split()), "string", make)


def _count(slot: str, names: str, low: int, high: int) -> Parameter:
    return Parameter(slot, tuple(names.split()), "integer", _integer(low, high))


CITY = _string("city", "city location place town", city)
PERSON = _string("person", "name person user contact", person)
TITLE = _string("title", "title topic subject query", _title)
DATE = _string("date", "date day when on_date", _date)
TIME = _string("time", "time at start hour", _time)
EMAIL = _string("email", "email address to recipient", _email)
PATH = _string("path", "path file filename source", _path)
CODE = _string("code", "code id number reference", _code)
UNIT = _choice("unit", "unit units scale", "celsius", "fahrenheit")
LANGUAGE = _choice("language", "language target lang", "French", "German", "Spanish", "Italian", "Dutch", "Polish")
CURRENCY = _choice("currency", "currency to target", "EUR", "USD", "GBP", "JPY", "CHF", "SEK")


def _family(verbs: str, nouns: str, description: str, parameters: tuple[Parameter, ...], *requests: str) -> Family:
    return Family(tuple(verbs.split()), tuple(nouns.split()), description, parameters, requests)


FAMILIES = (
    _family("get fetch show", "weather forecast", "Weather forecast for a city", (CITY, _count("days", "days length span", 1, 9), UNIT),
            "What will the weather be in {city} for the next {days} days[ in {unit}]?", "I want the {days} day forecast for {city}[ in {unit}]."),
    _family("get check", "air_quality smog", "Air quality of a city on a date", (CITY, DATE),
            "How clean is the air in {city} on {date}?", "Tell me the air quality in {city}[ on {date}]."),
    _family("send write mail", "email message", "Send an email", (EMAIL, TITLE),
            "Send an email to {email} about {title}.", "Write to {email} with the subject {title}."),
    _family("book reserve find", "table restaurant", "Book a table in a restaurant", (CITY, _count("guests", "guests seats people", 2, 12), TIME, DATE),
            "Book a table for {guests} in {city} at {time}[ on {date}].", "We are {guests} people and want to eat in {city} at {time}[ on {date}]."),
    _family("book search find", "flight flights", "Find flights between two cities", (_string("from", "origin source from_city", city), _string("to", "destination goal to_city", city), DATE),
            "Find a flight from {from} to {to} on {date}.", "I must fly to {to} from {from}[ on {date}]."),
    _family("book search find", "hotel room", "Find a hotel room", (CITY, _count("nights", "nights stay duration", 1, 14), DATE),
            "I need a room in {city} for {nights} nights[ from {date}].", "Find a hotel in {city}, {nights} nights[, starting {date}]."),
    _family("convert exchange change", "currency money", "Convert an amount of money", (_count("amount", "amount value sum", 5, 5000), _choice("base", "base from_currency have", "AUD", "CAD", "NOK", "PLN", "INR"), CURRENCY),
            "How much is {amount} {base} in {currency}?", "Change {amount} {base} to {currency}."),
    _family("translate render", "text words", "Translate a text", (_string("text", "text phrase input", _title), LANGUAGE),
            "Translate {text} to {language}.", "How do you say {text} in {language}?"),
    _family("set create add", "alarm wakeup", "Set an alarm", (TIME, _choice("days", "days repeat on", "daily", "weekdays", "weekends", "once")),
            "Wake me at {time}[, {days}].", "Set an alarm for {time}[ {days}]."),
    _family("set start run", "timer countdown", "Start a timer", (_count("minutes", "minutes duration length", 1, 120), _string("label", "label name note", word)),
            "Start a timer of {minutes} minutes[ called {label}].", "Count down {minutes} minutes[ for {label}]."),
    _family("create add plan", "event meeting", "Put an event in the calendar", (TITLE, DATE, TIME),
            "Put {title} in my calendar on {date} at {time}.", "Plan a meeting about {title} on {date}[ at {time}]."),
    _family("list get show", "events agenda", "List calendar events of a day", (DATE, PERSON),
            "What is on the calendar of {person} on {date}?", "Show the agenda of {person} for {date}."),
    _family("play start queue", "music song", "Play a song", (TITLE, _string("artist", "artist singer band", person), _count("volume", "volume loudness level", 1, 100)),
            "Play {title} by {artist}[ at volume {volume}].", "I want to hear {title} from {artist}[, volume {volume}]."),
    _family("search find look_up", "web pages", "Search the web", (TITLE, _count("limit", "limit max_results count", 1, 50)),
            "Search the web for {title}[ and give {limit} results].", "Find pages about {title}[, at most {limit}]."),
    _family("read open load", "file document", "Read a file", (PATH, _count("lines", "lines limit max_lines", 1, 500)),
            "Show me the first {lines} lines of {path}.", "Open {path}[ and read {lines} lines]."),
    _family("delete remove drop", "file document", "Delete a file", (PATH,), "Delete {path}.", "I no longer need {path}, remove it."),
    _family("copy move transfer", "file document", "Copy a file to another place", (PATH, _string("goal", "destination target to_path", _path)),
            "Copy {path} to {goal}.", "Put a copy of {path} at {goal}."),
    _family("track find locate", "parcel order", "Where a parcel is", (CODE,), "Where is my parcel {code}?", "Track order {code}."),
    _family("cancel stop", "order booking", "Cancel an order", (CODE, _choice("reason", "reason cause why", "late", "broken", "wrong", "unwanted")),
            "Cancel order {code}[, it is {reason}].", "Please cancel {code}[ because it is {reason}]."),
    _family("get fetch check", "stock_price quote", "Price of a stock", (_string("symbol", "symbol ticker stock", lambda rng: made_up(rng, 1).upper()), DATE),
            "What did {symbol} cost on {date}?", "Give me the stock price of {symbol}[ on {date}]."),
    _family("turn switch set", "lights lamp", "Switch the lights of a room", (_choice("room", "room where area", "kitchen", "bedroom", "hall", "garage", "office"), _choice("state", "state mode power", "on", "off"), _choice("color", "color colour shade", *COLORS)),
            "Turn {state} the lights in the {room}[ in {color}].", "Lights {state} in the {room}[, {color}]."),
    _family("set adjust change", "heating thermostat", "Set the heating of a room", (_choice("room", "room where zone", "kitchen", "bedroom", "hall", "bathroom", "office"), _count("degrees", "degrees temperature value", 10, 28)),
            "Set the heating in the {room} to {degrees} degrees.", "Make it {degrees} degrees in the {room}."),
    _family("call phone dial", "contact person", "Call somebody", (PERSON, _choice("line", "line kind device", "mobile", "home", "work")),
            "Call {person}[ on the {line} number].", "Please phone {person}[ at {line}]."),
    _family("get find", "route directions", "Route between two cities", (_string("from", "start origin departure", city), _string("to", "end destination arrival", city), _choice("mode", "mode vehicle by", "car", "bike", "train", "foot")),
            "How do I get from {from} to {to}[ by {mode}]?", "Give me the way from {from} to {to}[ by {mode}]."),
    _family("buy order get", "tickets seats", "Buy tickets for a show", (TITLE, _count("seats", "count quantity seats", 1, 9), DATE),
            "Buy {seats} tickets for {title}[ on {date}].", "I would like {seats} seats for {title}[ on {date}]."),
    _family("find search get", "recipe dish", "Find a recipe", (_string("dish", "dish food meal", word), _count("minutes", "max_minutes time_limit minutes", 10, 90)),
            "Find a recipe for {dish}[ that takes {minutes} minutes].", "How do I cook {dish}[ within {minutes} minutes]?"),
    _family("add put save", "note memo", "Save a note", (TITLE, _choice("tag", "tag label folder", "work", "home", "travel", "ideas")),
            "Note down {title}[ under {tag}].", "Save the note {title}[ with tag {tag}]."),
    _family("get compute find", "distance length", "Distance between two cities", (_string("from", "city_a first start", city), _string("to", "city_b second end", city)),
            "How far is it from {from} to {to}?", "What is the distance between {from} and {to}?"),
    _family("get find show", "local_time clock", "Time in a city", (CITY,), "What time is it in {city}?", "Tell me the local time of {city}."),
    _family("register add create", "user account", "Create a user account", (PERSON, EMAIL, _count("age", "age years", 18, 90)),
            "Create an account for {person} with {email}[, age {age}].", "Register {person}, {email}[, {age} years old]."),
    _family("resize scale", "image picture", "Resize an image", (PATH, _count("width", "width w", 16, 4000), _count("height", "height h", 16, 4000)),
            "Resize {path} to {width} by {height}.", "Scale {path} to {width} x {height}."),
    _family("run query ask", "table_query report", "Query a table of the database", (_string("table", "table source dataset", word), _string("field", "column field key", word), _count("limit", "limit rows top", 1, 100)),
            "Get {field} from table {table}[, {limit} rows].", "List the {field} column of {table}[, first {limit}]."),
)  # fmt: skip


def _tool(family: Family, rng: random.Random) -> tuple[dict, dict[str, str]]:
    """One spelling of a tool as an OpenAI function schema, and the parameter name of every slot."""
    names = {parameter.slot: rng.choice(parameter.names) for parameter in family.parameters}
    if len(set(names.values())) < len(names):
        names = {parameter.slot: parameter.names[0] for parameter in family.parameters}
    optional = {
        slot for slot in names if any("{" + slot + "}" not in _unbracketed(request) for request in family.requests)
    }
    properties = {}
    for parameter in family.parameters:
        properties[names[parameter.slot]] = {"type": parameter.type} | (
            {"enum": list(parameter.choices)} if parameter.choices else {}
        )
    name = f"{rng.choice(family.verbs)}_{rng.choice(family.nouns)}"
    required = [names[slot] for slot in names if slot not in optional]
    parameters = {"type": "object", "properties": properties, "required": required}
    return {
        "type": "function",
        "function": {"name": name, "description": family.description, "parameters": parameters},
    }, names


def _unbracketed(request: str) -> str:
    head, _, tail = request.partition("[")
    return head + tail.partition("]")[2]


def _ask(family: Family, names: dict[str, str], rng: random.Random) -> tuple[str, dict[str, object]]:
    """A request in words, and the arguments it asks for."""
    request = rng.choice(family.requests)
    values = {parameter.slot: parameter.make(rng) for parameter in family.parameters}
    head, *tail = request.split("[")
    if tail:
        inside, rest = tail[0].split("]")
        request = head + (inside if rng.random() < 0.6 else "") + rest
    used = [slot for slot in values if "{" + slot + "}" in request]
    text = request
    for slot in used:
        text = text.replace("{" + slot + "}", str(values[slot]))
    return text, {names[slot]: values[slot] for slot in used}


def _call(name: str, arguments: dict[str, object]) -> dict:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def _result(rng: random.Random) -> dict[str, object]:
    """What a tool sends back: a few fields whose values the reply must repeat."""
    keys = rng.sample(
        ["status", "price", "count", "place", "id", "level", "owner", "seat", "score", "note"], rng.randint(1, 3)
    )
    return {
        key: rng.choice([rng.randint(1, 999), word(rng), rng.choice(CITIES), rng.choice(ADJECTIVES)]) for key in keys
    }


def draw(rng: random.Random, level: int) -> dict:
    """One request as a chat row; `calls` is the exact list of calls, `answer` the exact reply where no call is due."""
    families = rng.sample(FAMILIES, rng.randint(1, 2) if level == 1 else rng.randint(2, 3))
    made = [_tool(family, rng) for family in families]
    if len({tool["function"]["name"] for tool, _ in made}) < len(made):
        return draw(rng, level)
    asked = list(range(rng.randint(2, len(families)))) if level == 3 and rng.random() < 0.6 else [0]
    requests = [_ask(families[i], made[i][1], rng) for i in asked]
    calls = [
        _call(made[i][0]["function"]["name"], arguments) for i, (_, arguments) in zip(asked, requests, strict=True)
    ]
    tools = [tool for tool, _ in made]
    kind = rng.choices(["call", "none", "result"], [8, 1, 1])[0]
    if kind == "none" and len(tools) > 1:
        tools = tools[max(asked) + 1 :]
    rng.shuffle(tools)
    messages = [{"role": "user", "content": " ".join(text for text, _ in requests)}]
    used = " and ".join(call["function"]["name"] for call in calls)
    called = {"role": "assistant", "reasoning_content": f"I need {used}.", "content": "", "tool_calls": calls}
    if kind == "none" and tools and len(tools) < len(made):
        messages.append({"role": "assistant", "reasoning_content": "No tool fits.", "content": NO_TOOL})
        return {"kind": "none", "messages": messages, "tools": tools, "answer": NO_TOOL}
    tools = tools or [tool for tool, _ in made]
    messages.append(called)
    if kind == "result":
        results = [_result(rng) for _ in calls]
        messages += [{"role": "tool", "content": json.dumps(result)} for result in results]
        answer = "; ".join(f"{key} {value}" for result in results for key, value in result.items())
        messages.append({"role": "assistant", "reasoning_content": "I have the result.", "content": answer})
        return {"kind": "result", "messages": messages, "tools": tools, "answer": answer}
    return {
        "kind": "call" if len(calls) == 1 else "calls",
        "messages": messages,
        "tools": tools,
        "calls": [call["function"] for call in calls],
    }
