"""Check digits of the numbers that carry them: they tell a card from an order number."""

from __future__ import annotations

# Length of an IBAN by country (ISO 13616, the SWIFT registry).
_IBAN_LENGTHS = (
    "AD24 AE23 AL28 AT20 AZ28 BA20 BE16 BG22 BH22 BI27 BR29 BY28 CH21 CR22 CY28 CZ24 DE22 DJ27 "
    "DK18 DO28 EE20 EG29 ES24 FI18 FK18 FO18 FR27 GB22 GE22 GI23 GL18 GR27 GT28 HR21 HU28 IE22 "
    "IL23 IQ23 IS26 IT27 JO30 KW30 KZ20 LB28 LC32 LI21 LT20 LU20 LV21 LY25 MC27 MD24 ME22 MK19 "
    "MN20 MR27 MT31 MU30 NI28 NL18 NO15 OM23 PK24 PL28 PS29 PT25 QA29 RO24 RS22 RU33 SA24 SC31 "
    "SD18 SE24 SI19 SK24 SM27 SO23 ST25 SV28 TL23 TN24 TR26 UA29 VA22 VG24 XK20 YE30"
)
IBAN_LENGTHS = {entry[:2]: int(entry[2:]) for entry in _IBAN_LENGTHS.split()}

# (first digits from, to, lengths) of the payment cards in use.
_CARDS: tuple[tuple[str, str, tuple[int, ...]], ...] = (
    ("4", "4", (13, 16, 19)),
    ("51", "55", (16,)),
    ("2221", "2720", (16,)),
    ("34", "34", (15,)),
    ("37", "37", (15,)),
    ("300", "305", (14,)),
    ("36", "36", (14,)),
    ("38", "39", (14,)),
    ("6011", "6011", (16,)),
    ("644", "649", (16,)),
    ("65", "65", (16,)),
    ("3528", "3589", (16,)),
    ("62", "62", (16, 17, 18, 19)),
)


def card_prefix(digits: str) -> tuple[str, tuple[int, ...]]:
    """The digits that tell whose card it is, and how many such a card has; none for no card."""
    for low, high, lengths in _CARDS:
        prefix = digits[: len(low)]
        if low <= prefix <= high:
            return prefix, lengths
    return "", ()


def luhn_digit(digits: str) -> str:
    """The digit that makes these a valid number when it is put behind them (ISO/IEC 7812-1)."""
    total = 0
    for position, digit in enumerate(reversed(digits)):
        doubled = int(digit) * (2 - position % 2)
        total += doubled - 9 * (doubled > 9)
    return str(-total % 10)


def luhn_holds(digits: str) -> bool:
    """Whether the last digit is the check digit of the others."""
    return luhn_digit(digits[:-1]) == digits[-1]


def iban_check(country: str, account: str) -> str:
    """The two check digits of an IBAN (ISO 7064, mod 97-10)."""
    number = "".join(str(int(character, 36)) for character in f"{account}{country}00")
    return f"{98 - int(number) % 97:02}"


def iban_holds(iban: str) -> bool:
    """Whether an IBAN without spaces, in capitals, has the check digits it should have."""
    return iban_check(iban[:2], iban[4:]) == iban[2:4]
