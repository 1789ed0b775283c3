"""Write the bundled rows ``data/samples/tickets_*.jsonl``: customer messages and their JSON tickets.

The task needs both copying (order number, customer's name) and inference (product category, intent, urgency). Every
message is composed of phrases from one of the two pools in ``sample_phrases.py``; the labels are known because phrases
are grouped by what they express. The output depends only on the phrases and the seeds below.

    python scripts/generate_samples.py            write the files
    python scripts/generate_samples.py --check    check that the files are this program's output
"""

from __future__ import annotations

import argparse
import json
import random
import re
import string
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from lit_lora.scripts.sample_phrases import HELDOUT, TRAIN, Phrases

__all__ = ["FILES", "SYSTEM", "main", "render"]

SYSTEM = "Turn the customer's message into a JSON ticket: product, intent, urgency, order, customer."
ROOT = Path(__file__).resolve().parent.parent / "data" / "samples"
INTENTS = ("refund", "exchange", "delivery", "cancel", "help")


class SampleFile(NamedTuple):
    """One file to write."""

    phrases: Phrases
    rows: int
    seed: int
    sevenths: bool
    """Whether order numbers are multiples of seven: so the files share no number, and no digit gives it away."""


FILES = {
    "tickets_train.jsonl": SampleFile(TRAIN, 1600, seed=1, sevenths=False),
    "tickets_heldout.jsonl": SampleFile(HELDOUT, 200, seed=2, sevenths=True),
}


class Deck:
    """Deals every phrase of a pool once, in random order, before any phrase is repeated."""

    def __init__(self, random_: random.Random) -> None:
        self.random = random_
        self.rest: dict[Sequence[str], list[str]] = {}

    def draw(self, pool: Sequence[str]) -> str:
        """The next phrase of ``pool``."""
        rest = self.rest.setdefault(tuple(pool), [])
        if not rest:
            rest.extend(pool)
            self.random.shuffle(rest)
        return rest.pop()


def render(file: SampleFile) -> str:
    """The text of one file, one row per line, without repeated messages."""
    random_ = random.Random(file.seed)
    deck = Deck(random_)
    rows: dict[str, str] = {}
    categories = sorted(file.phrases.products)
    while len(rows) < file.rows:
        # Categories and intents cycle with coprime periods, so that all pairs are equally frequent.
        product = categories[len(rows) % len(categories)]
        intent = INTENTS[len(rows) % len(INTENTS)]
        message, ticket = _compose(file, product, intent, random_, deck)
        answer = json.dumps(ticket, ensure_ascii=False, separators=(",", ":"))
        turns = [("system", SYSTEM), ("user", message), ("assistant", answer)]
        messages = [{"role": role, "content": content} for role, content in turns]
        rows.setdefault(message, json.dumps({"messages": messages}, ensure_ascii=False))
    lines = list(rows.values())
    random_.shuffle(lines)
    return "\n".join(lines) + "\n"


def _compose(
    file: SampleFile, product: str, intent: str, random_: random.Random, deck: Deck
) -> tuple[str, dict[str, str | None]]:
    """One message and its ticket."""
    phrases = file.phrases
    urgency = "high" if random_.random() < 0.5 else "low"
    order = _order(file.sevenths, random_) if random_.random() < 0.8 else None
    customer = _name(phrases, random_, deck) if random_.random() < 0.65 else None
    terse = random_.random() < 0.2
    introduced = customer is not None and random_.random() < 0.35

    body = [deck.draw(phrases.terse[intent])] if terse else _body(phrases, intent, random_, deck)
    extras = [deck.draw(phrases.orders)] if order else []
    if urgency == "high":
        extras.append(deck.draw(phrases.urgent))
    elif random_.random() < 0.5:
        extras.append(deck.draw(phrases.relaxed))
    if not terse and random_.random() < 0.5:
        extras.append(deck.draw(phrases.chatter))
    for extra in extras:
        body.insert(random_.randint(0, len(body)), extra)
    if introduced:
        body.insert(0, deck.draw(phrases.introductions))
    if not terse and random_.random() < 0.6:
        body.insert(0, deck.draw(phrases.openings))
    if customer and not introduced:
        body.append(deck.draw(phrases.signatures))
    elif random_.random() < 0.4:
        body.append(deck.draw(phrases.closings))

    word = deck.draw(phrases.products[product])
    slots = {"price": random_.randint(15, 900), "percent": random_.randint(5, 50), **_agreement(word)}
    slots |= {name: deck.draw(words) for name, words in phrases.slots.items()}
    text = _style(" ".join(body), random_)
    message = text.format(product=word.removeprefix("*"), order=order, name=customer, **slots)
    ticket = {"product": product, "intent": intent, "urgency": urgency, "order": order, "customer": customer}
    return message, ticket


def _body(phrases: Phrases, intent: str, random_: random.Random, deck: Deck) -> list[str]:
    """What happened and what the customer wants, usually in this order."""
    faulty = intent in ("refund", "exchange", "help") and random_.random() < 0.6
    fact = deck.draw(phrases.faults if faulty else phrases.facts[intent])
    request = deck.draw(phrases.requests[intent])
    return [request, fact] if random_.random() < 0.15 else [fact, request]


def _order(sevenths: bool, random_: random.Random) -> str:
    """An order number, of five digits as often as of six."""
    low, high = random_.choice(((10_000, 99_999), (100_000, 999_999)))
    while True:
        number = random_.randint(low, high)
        if (number % 7 == 0) is sevenths:
            return str(number)


def _name(phrases: Phrases, random_: random.Random, deck: Deck) -> str:
    """A first name, or first and last name."""
    first = deck.draw(phrases.first_names)
    return f"{first} {deck.draw(phrases.last_names)}" if random_.random() < 0.5 else first


def _agreement(word: str) -> dict[str, str]:
    """The slots that agree with the product's word: singular, or plural where it is marked ``*``."""
    if word.startswith("*"):
        pronouns = {"it": "them", "they": "they", "this": "these", "that": "those", "a": "a few"}
        return pronouns | {"was": "were", "is": "are", "has": "have", "does": "do"}
    article = "an" if word[0] in "aeiouAEIM" else "a"  # M for "an MP3 player"
    pronouns = {"it": "it", "they": "it", "this": "this", "that": "that", "a": article}
    return pronouns | {"was": "was", "is": "is", "has": "has", "does": "does"}


def _style(text: str, random_: random.Random) -> str:
    """How the customer types: properly, in lower case, in lines without punctuation, or with typing errors."""
    style = random_.choices(("proper", "small", "lines", "typos"), (65, 12, 8, 15))[0]
    if style == "small":
        return text.lower()
    if style == "lines":
        return re.sub(r"[.!] |[.!]$", "\n", text).replace(",", "").rstrip("\n")
    if style == "typos":
        words = text.split(" ")
        long_words = [index for index, word in enumerate(words) if len(word) > 4 and word.isalpha()]
        for index in random_.sample(long_words, min(2, len(long_words))):
            words[index] = _typo(words[index], random_)
        return " ".join(words)
    return text


def _typo(word: str, random_: random.Random) -> str:
    """The word with two letters swapped, one left out or one wrong; the first letter stays."""
    place = random_.randrange(1, len(word) - 1)
    kind = random_.choice(("swap", "drop", "wrong"))
    if kind == "swap":
        return word[:place] + word[place + 1] + word[place] + word[place + 2 :]
    if kind == "drop":
        return word[:place] + word[place + 1 :]
    return word[:place] + random_.choice(string.ascii_lowercase) + word[place + 1 :]


def main(argv: Sequence[str] | None = None) -> int:
    """Write the files, or compare them with the output of this program.

    Returns:
        0, or 1 when ``--check`` finds a difference.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a file differs")
    check = parser.parse_args(argv).check
    different = 0
    for name, file in FILES.items():
        text = render(file)
        path = ROOT / name
        if check:
            same = path.is_file() and path.read_bytes() == text.encode()
            different += not same
            print(f"{path}: {'as generated' if same else 'differs from the output of this program'}")
        else:
            path.write_bytes(text.encode())
            print(f"wrote {path}: {file.rows} rows, {len(text.encode()):,} bytes")
    return int(different > 0)


if __name__ == "__main__":
    sys.exit(main())
