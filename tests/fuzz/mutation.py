"""Ways to damage bytes, JSON and short texts, by a random generator: equal seeds, equal damage."""

import json
import random
from collections.abc import Callable, Sequence
from typing import Any


class Raw(str):
    """JSON that is written as it is."""


class Pairs(list):
    """A mapping as a list of [key, value], so that a key may be there twice."""


TOKENS = [
    *("null", "true", "false", "0", "-0", "1", "-1", "2", "7", "0.5", "-1.5", "1e400", "1E5"),
    *("32.0", "NaN", "Infinity", "-Infinity", "1e-400", "2147483648", "9223372036854775807"),
    *("18446744073709551616", "-9223372036854775809", "9" * 400, "9" * 5000, "1.", "+1", "0x1"),
    *('""', '"x"', '"5"', '"-1"', '"0-999999999999"', '"0-400000000"', '"nan"', '"1e999"'),
    *('"../x"', '"/etc/passwd"', '"a/b"', '".."', '"\\u0000"', '"\\ud800"', '"\\u001b[2J"'),
    *('"false"', '"true"', '"' + "y" * 3000 + '"', '"\u202e"', '"F32"', '"F8_E4M3"', '"I64"'),
    *("[]", "{}", "[[]]", '[""]', "[0]", "[1, 2]", "[null]", '{"a": 1}', '{"": {}}', "[NaN]"),
    *("[" * 90 + "]" * 90, "[" * 100_000, '{"a":' * 5000 + "1" + "}" * 5000),
]


def pairs(document: Any) -> Any:
    """The same with every mapping as :class:`Pairs`."""
    if isinstance(document, dict):
        return Pairs([key, pairs(value)] for key, value in document.items())
    return [pairs(part) for part in document] if isinstance(document, list) else document


def written(document: Any) -> str:
    """JSON of what :func:`pairs` gives."""
    if isinstance(document, Raw):
        return document
    if isinstance(document, Pairs):
        return "{" + ", ".join(f"{json.dumps(k)}: {written(v)}" for k, v in document) + "}"
    if isinstance(document, list):
        return "[" + ", ".join(map(written, document)) + "]"
    return json.dumps(document)


def _slots(document: Any) -> list[tuple[Any, Any]]:
    """(list, position) of every value in a document."""
    found: list[tuple[Any, Any]] = []
    waiting = [document]
    while waiting:
        node = waiting.pop()
        if isinstance(node, Pairs):
            found += [(pair, 1) for pair in node]
            waiting += [pair[1] for pair in node]
        elif isinstance(node, list):
            found += [(node, n) for n in range(len(node))]
            waiting += node
    return found


def _replace(rng: random.Random, holder: Any, at: int) -> None:
    holder[at] = Raw(rng.choice(TOKENS))


def _shift(rng: random.Random, holder: Any, at: int) -> None:
    """Another number, text, or type of the same value."""
    value = holder[at]
    if isinstance(value, bool) or value is None:
        holder[at] = Raw(rng.choice(('"true"', "0", "1", "[true]", "null")))
    elif isinstance(value, int | float):
        near = (value + 1, value - 1, -value, value * 2, value * 1000, float(value), str(value))
        holder[at] = rng.choice((*near, [value], bool(value)))
    elif isinstance(value, str) and not isinstance(value, Raw):
        holder[at] = mutate_text(rng, value)
    else:
        holder[at] = rng.choice((Raw(written(value) * 2), [value], Raw("null"), Raw("{}")))


def _drop(rng: random.Random, holder: Any, at: int) -> None:
    inside = holder[at]
    if isinstance(inside, list) and inside:
        del inside[rng.randrange(len(inside))]
    else:
        _replace(rng, holder, at)


def _repeat(rng: random.Random, holder: Any, at: int) -> None:
    """A key, or an element, once more; or another key."""
    inside = holder[at]
    if isinstance(inside, list) and inside:
        again = rng.choice(inside)
        if isinstance(inside, Pairs) and rng.random() < 0.5:
            again = [mutate_text(rng, again[0]), again[1]]
        inside.insert(rng.randrange(len(inside) + 1), again)
    else:
        _shift(rng, holder, at)


def _swap(rng: random.Random, holder: Any, at: int) -> None:
    inside = holder[at]
    if isinstance(inside, list) and len(inside) > 1 and not isinstance(inside, Pairs):
        rng.shuffle(inside)
    else:
        _replace(rng, holder, at)


WAYS: tuple[Callable[[random.Random, Any, int], None], ...] = (
    *(_replace, _replace, _shift, _shift),
    *(_drop, _repeat, _swap),
)


def mutate_json(rng: random.Random, document: Any) -> str:
    """A document with one to three places changed; now and then its text instead."""
    if rng.random() < 0.1:
        return mutate_bytes(rng, json.dumps(document).encode()).decode(errors="surrogateescape")
    top = [pairs(document)]
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        slots = [*_slots(top)]
        deep = [slot for slot in slots if slot[0] is not top] or slots
        rng.choice(WAYS)(rng, *rng.choice(deep if rng.random() < 0.95 else slots))
    return written(top[0])


def as_bytes(text: str) -> bytes:
    return text.encode(errors="surrogateescape")


def mutate_bytes(rng: random.Random, data: bytes) -> bytes:
    """A few bytes changed, cut, repeated or inserted."""
    found = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        at = rng.randrange(len(found) + 1)
        end = min(len(found), at + rng.choice((1, 1, 2, 4, 8, 64, 1024)))
        way = rng.randrange(6)
        if way == 0 and at < len(found):
            found[at] ^= 1 << rng.randrange(8)
        elif way == 1:
            found[at:end] = rng.randbytes(end - at)
        elif way == 2:
            del found[at:end]
        elif way == 3:
            found[at:at] = found[at:end] * rng.choice((1, 2, 50))
        elif way == 4:
            found[at:at] = rng.choice(
                (
                    b"\0",
                    b"\xff",
                    b"\xff" * 8,
                    b"{",
                    b"[" * 3000,
                    b'"',
                    b"\r\n",
                    b"\x1b[2J",
                    b"9" * 30,
                )
            )
        elif rng.random() < 0.2:
            del found[at:]
    return bytes(found)


PIECES = [
    *("", "0", "1", "-1", "9" * 25, "9" * 400, "9" * 5000, "1e30", "1e400", "nan", "inf", "0.5"),
    *("٣", "½", "K", "ſ", "\0", "\ud800", "\n", "\x1b[2J", " ", ",", ":", "=", "@", "x", ".", "-"),
    *("GiB", "TB", "B", "k", "device=", "host=", "params=", "latency=", "../", "/", "~", "," * 300),
    *(
        "c4",
        "wikitext2:3",
        "ptb:",
        "true",
        "None",
        "0x10",
        "1_000",
        "+1",
        "--",
        "é" * 300,
        "[" * 50,
    ),
]


def mutate_text(rng: random.Random, text: str) -> str:
    """A short text with pieces cut, doubled or put in."""
    for _ in range(rng.choice((1, 1, 2, 3))):
        at, end = sorted((rng.randrange(len(text) + 1), rng.randrange(len(text) + 1)))
        text = rng.choice(
            (
                text[:at] + rng.choice(PIECES) + text[at:],
                text[:at] + rng.choice(PIECES) + text[end:],
                text[:at] + text[end:],
                text[:end] + text[at:],
                rng.choice(PIECES),
            )
        )
    return text


def pick(rng: random.Random, seeds: Sequence[Any]) -> Any:
    return seeds[rng.randrange(len(seeds))]
