"""Precision and recall of the search for personal data, on real dialogues with labelled values.

    python -m benchmarks.personal_data --abcd sample.json --sgd evaluation.jsonl [--labelled OUT.jsonl]

The file is made like this, from one seed:

- every dialogue of ABCD (asappresearch/abcd, data/abcd_sample.json) and of SGD (schema-guided dialogue, `turns` of
  [speaker, text]) is a conversation;
- *natural* labels: e-mail, phone, order id and user name of ABCD come from the conversation's `scenario`; in SGD the
  telephone numbers, by patterns (NATURAL) made from every shape of number that the files have;
- *planted* labels: 9 of 10 SGD dialogues get up to three values, made by the generators below, which share no code with
  the recognizers; a value stands in a sentence that a customer would write, or is the bare answer to a question;
- 2 of 3 SGD dialogues get a look-alike that is nobody's data: prices, dates, times, versions, book numbers.

A value is found if no letter or digit of it is outside what would be replaced. Precision of a kind is the share of its
findings that touch a label. A conversation is falsely touched if a finding in it touches no label.
"""

from __future__ import annotations

import argparse
import calendar
import json
import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from qcore.data import Anonymizer

SEED = 6
LETTERS = "abcdefghijklmnopqrstuvwxyz"
NATURAL = re.compile(
    r"(?:\+?1 )?\d{3}-\d{3}-\d{4}|\+\d{2} \d{1,3} \d{2,4} \d{2,4}(?: \d{2}){0,2}|\+\d{2} \d\d \d{4}-\d{4}"
    r"|\d{2} \d{4}[ -]\d{4}|\(\d{3}\) \d{3}-\d{4}|\+\d{2} \d-\d{4} \d{4}"
    r"|(?<!\d)0\d{9,10}(?!\d)|\+\d{3} \d{3} \d{6}"
)
FIRST = ("anna", "li", "omar", "jose", "mary", "ivan", "chen", "aisha", "tom", "eva", "raj", "noor")
LAST = ("smith", "garcia", "okafor", "kim", "novak", "silva", "mueller", "tanaka", "brown", "rossi")
DOMAINS = (
    "gmail.com",
    "yahoo.co.uk",
    "acme-corp.com",
    "uni-bonn.de",
    "mail.ru",
    "startup.io",
    "tele2.se",
)
AREAS = ("206", "305", "408", "512", "617", "718", "919", "650", "415", "213")

Random = random.Random


def digits(rng: Random, count: int) -> str:
    """So many digits, the first not zero."""
    return str(rng.randrange(10 ** (count - 1), 10**count))


def email(rng: Random) -> str:
    first, last = rng.choice(FIRST), rng.choice(LAST)
    local = rng.choice(
        [f"{first}.{last}", f"{first[0]}{last}{rng.randrange(999)}", f"{first}_{last}+shop"]
    )
    made = f"{local}@{rng.choice(DOMAINS)}"
    return made.title() if rng.random() < 0.1 else made


def phone(rng: Random) -> str:
    area, mid, end = rng.choice(AREAS), rng.randrange(200, 999), rng.randrange(10_000)
    american = [
        f"({area}) {mid}-{end:04}", f"{area}-{mid}-{end:04}", f"{area}.{mid}.{end:04}",
        f"{area} {mid} {end:04}", f"+1 {area} {mid} {end:04}", f"1-{area}-{mid}-{end:04}", f"{area}{mid}{end:04}",
    ]  # fmt: skip
    abroad = [
        f"+44 20 7{digits(rng, 3)} {digits(rng, 4)}", f"+447{digits(rng, 9)}", f"+49 30 {digits(rng, 6)}",
        f"+33 6 {' '.join(digits(rng, 2) for _ in range(4))}", f"+91 98{digits(rng, 3)} {digits(rng, 5)}",
    ]  # fmt: skip
    return rng.choice([*american, *abroad])


def with_luhn(body: str) -> str:
    """The number completed to a sum of ten, by trying: the other way round from the recognizer."""
    for last in "0123456789":
        doubled = [int(d) * 2 if i % 2 else int(d) for i, d in enumerate(reversed(body + last))]
        if sum(d - 9 if d > 9 else d for d in doubled) % 10 == 0:
            return body + last
    raise AssertionError


def card(rng: Random) -> str:
    head, length = rng.choice(
        [("4", 16), ("53", 16), ("2411", 16), ("37", 15), ("6011", 16), ("3566", 16)]
    )
    number = with_luhn(head + digits(rng, length - len(head) - 1))
    return grouped(number, rng.choice(["", " ", "-"]))


def grouped(number: str, sign: str) -> str:
    return sign.join(number[i : i + 4] for i in range(0, len(number), 4))


def iban(rng: Random) -> str:
    country, body = rng.choice(
        [
            ("DE", digits(rng, 18)), ("GB", f"NWBK{digits(rng, 14)}"), ("FR", digits(rng, 23)),
            ("NL", f"ABNA{digits(rng, 10)}"), ("ES", digits(rng, 20)), ("CH", digits(rng, 17)), ("NO", digits(rng, 11)),
        ]
    )  # fmt: skip
    as_digits = "".join(str(ord(c) - 55) if c.isalpha() else c for c in f"{body}{country}")
    check = next(n for n in range(2, 99) if int(f"{as_digits}{n:02}") % 97 == 1)
    return grouped(f"{country}{check:02}{body}", rng.choice(["", " "]))


def address(rng: Random) -> str:
    four = ".".join(str(rng.randrange(1, 254)) for _ in range(4))
    six = ":".join(f"{rng.randrange(1, 65_535):x}" for _ in range(8))
    mac = ":".join(f"{rng.randrange(256):02X}" for _ in range(6))
    return rng.choice(
        [f"5{four[-1]}.{four.split('.', 1)[1]}", f"10.{four.split('.', 1)[1]}", f"2a{six[2:]}", mac]
    )


def secret(rng: Random, count: int, letters: str = LETTERS + LETTERS.upper() + "0123456789") -> str:
    return "".join(rng.choice(letters) for _ in range(count))


def url(rng: Random) -> str:
    return rng.choice(
        [
            f"https://shop.acme.com/reset?token={secret(rng, 24)}&lang=en",
            f"https://{rng.choice(LAST)}:{secret(rng, 8)}@ftp.acme.com/files",
            f"https://acme.com/account/{digits(rng, 9)}/orders",
            f"http://track.acme.io/u?email={email(rng).lower().replace('@', '%40')}",
        ]
    )


def key(rng: Random) -> str:
    return rng.choice(
        [
            f"sk-{secret(rng, 40)}", f"ghp_{secret(rng, 36)}", f"AKIA{secret(rng, 16, LETTERS.upper() + '234567')}",
            secret(rng, 40, "0123456789abcdef"), f"eyJ{secret(rng, 30)}.{secret(rng, 60)}.{secret(rng, 43)}",
            f"xoxb-{digits(rng, 12)}-{secret(rng, 24)}",
            f"{secret(rng, 8)}-{secret(rng, 4)}-4{secret(rng, 3)}-{secret(rng, 12)}",
        ]
    )  # fmt: skip


def citizen(rng: Random) -> str:
    ssn = f"{rng.randrange(1, 665):03}-{rng.randrange(1, 99):02}-{rng.randrange(1, 9_999):04}"
    dni = rng.randrange(10_000_000, 99_999_999)
    body = [rng.randrange(10) for _ in range(9)]
    for _ in range(2):
        rest = sum(d * w for d, w in zip(reversed(body), range(2, 12), strict=False)) % 11
        body.append(0 if rest < 2 else 11 - rest)
    cpf = "".join(map(str, body))
    return rng.choice(
        [
            ssn,
            f"{dni}{'TRWAGMYFPDXBNJZSQVHLCKE'[dni % 23]}",
            f"{cpf[:3]}.{cpf[3:6]}.{cpf[6:9]}-{cpf[9:]}",
        ]
    )


def birthday(rng: Random) -> str:
    year, month, day = rng.randrange(1935, 2008), rng.randrange(1, 13), rng.randrange(1, 29)
    forms = (f"{year}-{month:02}-{day:02}", f"{month}/{day}/{year}", f"{day:02}.{month:02}.{year}")
    return rng.choice((*forms, f"{calendar.month_name[month]} {day}, {year}"))


def number(rng: Random) -> str:
    return rng.choice(
        [digits(rng, 10), digits(rng, 8), digits(rng, 12), f"AB-{digits(rng, 7)}", digits(rng, 9)]
    )


# kind -> (generator, sentences, questions of an agent that a bare value answers)
PLANTS: dict[str, tuple[Callable[[Random], str], tuple[str, ...], tuple[str, ...]]] = {
    "email": (
        email,
        (
            "You can write to {}.",
            "My email is {}, please confirm there.",
            "it's {}",
            "Username {} should work",
        ),
        ("May I have your email address?", "Where should we send the confirmation?"),
    ),
    "phone": (
        phone,
        ("My number is {}.", "Call me back at {} please.", "You can text {} any time", "phone: {}"),
        ("What's your phone number?", "I'd just need your phone number."),
    ),
    "card": (
        card,
        ("Please charge {}.", "The card is {}, expires 04/27.", "I paid with {} last week"),
        ("Which card would you like to use?", "Could you give me the card number?"),
    ),
    "iban": (
        iban,
        ("Refund it to {} please.", "My IBAN: {}", "Send the money to {}, that is my account"),
        ("What is your IBAN?", "Which account should the refund go to?"),
    ),
    "ip": (
        address,
        (
            "My address on the network is {}.",
            "It says {} cannot be reached",
            "I was logged in from {}, not me!",
        ),
        ("Which IP do you see?",),
    ),
    "url": (
        url,
        ("The link {} does not open.", "I got this: {}", "see {} please"),
        ("Which link did you get?",),
    ),
    "key": (
        key,
        ("My API key is {}.", "I use {} and get an error", "token {}"),
        ("What key are you using?",),
    ),
    "national": (
        citizen,
        ("My number is {}.", "It says {} on my papers", "{} if you need it"),
        ("Your social security or tax number?", "Which document do you have?"),
    ),
    "birth": (
        birthday,
        ("I was born on {}.", "My date of birth is {}", "dob {}"),
        ("What is your date of birth?", "May I have your birthday?"),
    ),
    "digits": (
        number,
        (
            "My order number is {}.",
            "Order ID: {}",
            "The account {} is mine.",
            "confirmation {} is what it says",
        ),
        ("Can I have the order ID?", "What is your account number?", "Your member ID, please?"),
    ),
}
INNOCENT: tuple[Callable[[Random], str], ...] = (
    lambda rng: (
        f"The total was ${rng.randrange(9_999):,}.{rng.randrange(100):02}, not {rng.randrange(99)}.50."
    ),
    lambda rng: (
        f"I ordered on {rng.randrange(2015, 2026)}-{rng.randrange(1, 13):02}-{rng.randrange(1, 29):02} at 18:30:05."
    ),
    lambda rng: (
        f"That was {rng.randrange(1, 13)}/{rng.randrange(1, 29)}/{rng.randrange(2015, 2026)}, room {rng.randrange(99)}."
    ),
    lambda rng: (
        f"My app is version {rng.randrange(20)}.{rng.randrange(9)}.{rng.randrange(9)}.{rng.randrange(999)} on 14."
    ),
    lambda rng: (
        f"Flight BA {rng.randrange(9_999)} leaves from gate {rng.randrange(60)}, seat {rng.randrange(40)}C."
    ),
    lambda rng: "I looked at https://www.acme.com/help/returns-and-refunds and found nothing.",
    lambda rng: (
        f"It has {rng.randrange(1_000_000, 99_999_999)} views and {rng.random():.9f} stars."
    ),
    lambda rng: (
        f"The code was SAVE{rng.randrange(99)} for {rng.randrange(10, 90)}% off {rng.randrange(2, 9)} items."
    ),
    lambda rng: (
        f"ZIP {rng.randrange(10_000, 99_999)}, size {rng.randrange(30, 50)}, model X-{rng.randrange(999)}."
    ),
    lambda rng: "The password is incorrect and the token is invalid, it says.",
    lambda rng: (
        f"ISBN 978-0-{rng.randrange(100, 999)}-{rng.randrange(10_000, 99_999)}-{rng.randrange(10)} is the book."
    ),
)


def planted(
    turns: list[str], speakers: list[str], rng: Random
) -> tuple[list[str], list[dict[str, Any]]]:
    """The turns of one dialogue with values and look-alikes, and the labels of the values."""
    said = [(text, "") for text in turns]
    values: list[tuple[str, str]] = []
    for kind in rng.sample(sorted(PLANTS), rng.choice([0, 1, 2, 3]) if rng.random() < 0.9 else 0):
        make, sentences, questions = PLANTS[kind]
        value = make(rng)
        values.append((kind, value))
        at = rng.randrange(1, len(said) + 1)
        if rng.random() < 0.5:
            said[at:at] = [(rng.choice(questions), ""), (value, kind)]
        else:
            said.insert(at, (rng.choice(sentences).format(value), kind))
    if rng.random() < 2 / 3:
        said.insert(rng.randrange(1, len(said) + 1), (rng.choice(INNOCENT)(rng), ""))
    labels = []
    for index, (text, _) in enumerate(said):
        labels += [
            {
                "text": index,
                "start": start,
                "end": start + len(value),
                "kind": kind,
                "planted": True,
            }
            for kind, value in values
            if (start := text.find(value)) >= 0
        ]
        labels += [
            {"text": index, "start": m.start(), "end": m.end(), "kind": "phone", "planted": False}
            for m in NATURAL.finditer(text)
            if not any(x["text"] == index and x["start"] <= m.start() < x["end"] for x in labels)
        ]
    return [text for text, _ in said], labels


def abcd_labels(texts: Sequence[str], scenario: dict[str, Any]) -> list[dict[str, Any]]:
    """What the scenario says about the customer, wherever it is said."""
    person, order = scenario.get("personal", {}), scenario.get("order", {})
    known = {"email": person.get("email"), "phone": person.get("phone")}
    known |= {"digits": order.get("order_id"), "handle": person.get("username")}
    return [
        {"text": index, "start": m.start(), "end": m.end(), "kind": kind, "planted": False}
        for kind, value in known.items()
        if value
        for index, text in enumerate(texts)
        for m in re.finditer(re.escape(value), text, re.I)
        if not (kind == "handle" and text[m.end() : m.end() + 1] == "@")
    ]


def labelled(abcd: Path, sgd: Sequence[Path], seed: int = SEED) -> list[dict[str, Any]]:
    """Conversations as {"texts", "labels"}."""
    rows = []
    for conversation in json.loads(abcd.read_text("utf-8")):
        texts = [text for _, text in conversation["original"]]
        rows.append({"texts": texts, "labels": abcd_labels(texts, conversation["scenario"])})
    rng = Random(seed)
    for path in sgd:
        for line in path.read_text("utf-8").splitlines():
            turns = json.loads(line)["turns"]
            texts, labels = planted([t for _, t in turns], [s for s, _ in turns], rng)
            rows.append({"texts": texts, "labels": labels})
    return rows


def score(rows: Sequence[dict[str, Any]], *, show: int = 0) -> dict[str, Any]:
    """Counts by kind over all rows."""
    names = ("labels", "natural", "found", "same_kind", "findings", "right")
    counts = {kind: Counter(dict.fromkeys(names, 0)) for kind in (*PLANTS, "handle")}
    falsely = invalid = shown = 0
    for row in rows:
        anonymizer = Anonymizer(key=bytes(32))
        found = anonymizer.find(row["texts"])
        for label in row["labels"]:
            of = counts[label["kind"]]
            inside = [
                f for f in found[label["text"]] if f.start < label["end"] and label["start"] < f.end
            ]
            covered = {i for f in inside for i in range(f.start, f.end)}
            value = row["texts"][label["text"]][label["start"] : label["end"]]
            whole = all(label["start"] + i in covered for i, c in enumerate(value) if c.isalnum())
            of["labels"] += 1
            of["natural"] += not label["planted"]
            of["found"] += whole
            of["same_kind"] += whole and any(f.kind == label["kind"] for f in inside)
            if not whole and shown < show:
                shown += 1
                print(f"missed {label['kind']}: {row['texts'][label['text']]!r}")
        touched = False
        for index, findings in enumerate(found):
            labels = [x for x in row["labels"] if x["text"] == index]
            for f in findings:
                right = any(f.start < x["end"] and x["start"] < f.end for x in labels)
                counts[f.kind].update(findings=1, right=int(right))
                touched |= not right
                if not right and shown < show:
                    shown += 1
                    print(f"false {f.kind}: {row['texts'][index]!r}")
        falsely += touched
        # A surrogate that is not what it stands for would show as another kind, or as none.
        made = Anonymizer(key=bytes(32)).texts(row["texts"])
        again = [
            f.kind
            for findings in anonymizer.find(made)
            for f in findings
            if f.kind in ("card", "iban")
        ]
        before = [f.kind for findings in found for f in findings if f.kind in ("card", "iban")]
        if Counter(again) != Counter(before):
            invalid += 1
            if show:
                print(
                    f"surrogates {before} became {again}: {[m for m in made if m not in row['texts']]}"
                )
    return {
        "rows": len(rows),
        "rows_falsely_touched": falsely,
        "rows_with_invalid_surrogates": invalid,
        "kinds": {kind: dict(found) for kind, found in counts.items()},
    }


def table(result: dict[str, Any]) -> list[str]:
    """The result as a Markdown table."""
    lines = [
        "| kind | labels | of them natural | recall | as this kind | findings | precision |",
        "|---|---|---|---|---|---|---|",
    ]
    for kind, n in result["kinds"].items():
        share = [f"{a / b:.3f}" if b else "–" for a, b in
                 ((n["found"], n["labels"]), (n["same_kind"], n["labels"]), (n["right"], n["findings"]))]  # fmt: skip
        lines.append(
            f"| `{kind}` | {n['labels']} | {n['natural']} | {share[0]} | {share[1]} | {n['findings']} | {share[2]} |"
        )
    touched, rows = result["rows_falsely_touched"], result["rows"]
    return [
        *lines,
        "",
        f"{rows:,} conversations; {touched} ({touched / rows:.1%}) with a finding that touches no label; "
        f"{result['rows_with_invalid_surrogates']} with a surrogate that fails its checksum.",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--abcd", type=Path, required=True, help="data/abcd_sample.json of asappresearch/abcd"
    )
    parser.add_argument(
        "--sgd", type=Path, required=True, action="append", help="JSONL with `turns`; repeat"
    )
    parser.add_argument("--labelled", type=Path, help="write the labelled file here")
    parser.add_argument("--seed", type=int, default=SEED, help="of what is planted")
    parser.add_argument("--show", type=int, default=0, metavar="N", help="print so many mistakes")
    options = parser.parse_args()
    rows = labelled(options.abcd, options.sgd, options.seed)
    if options.labelled:
        lines = (json.dumps(row, ensure_ascii=False) for row in rows)
        options.labelled.write_text("\n".join(lines) + "\n", "utf-8")
    print("\n".join(table(score(rows, show=options.show))))


if __name__ == "__main__":
    main()
