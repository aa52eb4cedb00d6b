"""Personal data is found, look-alikes are left, and what stands in its place is valid and keyed."""

from __future__ import annotations

import datetime
import ipaddress
import json
import re
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import phonenumbers
import pytest

from qcore.data import Anonymizer
from qcore.data.anonymize import KINDS, key_of_file, list_of_file
from qcore.data.anonymize.audit import REVIEW_LINES
from qcore.data.anonymize.checksums import iban_holds, luhn_holds
from qcore.data.anonymize.national import is_national
from qcore.data.rows import RowReader
from qcore.errors import ArgumentError, QcoreError

KEY = bytes(range(32))

# Published test numbers, documentation values and numbers made for these tests.
PERSONAL = {
    "email": ["jane.doe@acme.co.uk", "j_d+7@mail-host.de", "Müller@firma.de", "a@b.io"],
    "iban": ["DE89370400440532013000", "GB82 WEST 1234 5698 7654 32", "NO93-8601-1117-947"],
    "card": ["4111111111111111", "5500 0000 0000 0004", "3782-822463-10005", "6011000990139424"],
    "phone": [
        "(408) 247-8880",
        "408.247.8880",
        "+44 20 7946 0958",
        "+49 30 901820",
        "1-212-736-5000",
    ],
    "ip": ["8.8.4.4", "10.12.0.7", "2a00:1450:4001:81b::200e", "00:1B:44:11:3A:B7"],
    "url": [
        "https://bob:hunter2@shop.acme.com/x",
        "https://acme.com/reset?token=a8F3kk29dkQ0sl2&lang=en",
        "https://acme.com/u/99120384/orders",
    ],
    "key": [
        "sk-abcdefghijklmnop1234",
        "ghp_16C7e42F292c6912E7710c838347Ae178B4a",
        "AKIAIOSFODNN7EXAMPLE",
        "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.dozjgNryP4J3jVmNHl0w5N",
        "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
        "-----BEGIN PRIVATE KEY-----\nMIIEvQIBADANBgkqhkiG9w0BAQ\n-----END PRIVATE KEY-----",
    ],
    "national": ["078-05-1120", "529.982.247-25", "12345678Z", "X-1234567-L", "NHS 943 476 5919"],
    "birth": [
        "born 1984-03-12",
        "born on 12.03.1984",
        "DOB 3/12/84",
        "birthday March 5th, 1980",
        "born the 5 of March 1980",
    ],
    "digits": [
        "order 3348917502",
        "account number is 12345678",
        "reference AB-1234567",
        "123456789012",
    ],
}
CASES = [(kind, text) for kind, texts in PERSONAL.items() for text in texts]

INNOCENT = [
    "Lunch on 2019-11-06 or 06.11.2019 or 11/06/2019 at 18:30, 12:30:45 sharp.",
    "It costs $1,234,567.89 or 1234567 EUR plus 19.99, rated 4.5 by 12345678 people.",
    "Version 1.2.3.4 listens on 127.0.0.1 and 0.0.0.0, mask 255.255.255.0.",
    "Write to user@example.org, see https://example.com/faq and https://acme.com/returns/policy.",
    "The password is incorrect. Your token is invalid.",
    "std::vector<int> and a::b, C++20, utf8mb4_general_ci, this_is_a_long_identifier_name_2",
    "Flight BA 2490 from gate 22, room 1204, zip 75227-1234, 3 adults, 2 children.",
    "pi is 3.14159265358979 and 2**31 is 2147483648",
    "@home at 5 p.m., me@work, a@b",
]


def changed(text: str, **options: Any) -> str:
    return Anonymizer(key=KEY, **options).texts([text])[0]


@pytest.mark.parametrize(("kind", "text"), CASES, ids=[f"{k}: {t[:24]}" for k, t in CASES])
def test_personal_data_is_found_in_a_sentence(kind: str, text: str) -> None:
    anonymizer = Anonymizer(key=KEY)
    (result,) = anonymizer.texts([f"Well, it is {text}, thank you."])
    assert anonymizer.audit.found == {kind: 1}
    assert result.startswith("Well, it is ")
    assert result.endswith(", thank you.")
    value = text.split()[-1] if kind in ("digits", "national") else text
    assert value not in result
    assert len(result.split()) == len(f"Well, it is {text}, thank you.".split())


@pytest.mark.parametrize("text", INNOCENT)
def test_look_alikes_stay(text: str) -> None:
    assert changed(text) == text


def test_numbers_that_fail_their_checksum_are_counted_not_taken_for_what_they_are_not() -> None:
    text = "Card 4111111111111112 and IBAN DE89370400440532013001."
    anonymizer = Anonymizer(["card", "iban"], key=KEY)
    assert anonymizer.texts([text]) == [text]
    assert anonymizer.audit.rejected == {"card": 1, "iban": 1}


def surrogates_of(kind: str, text: str, n: int = 40) -> list[str]:
    """Surrogates under many keys."""
    found = []
    for number in range(n):
        (result,) = Anonymizer(key=bytes([number] * 32)).texts([f"Well, it is {text}, thank you."])
        found.append(result.removeprefix("Well, it is ").removesuffix(", thank you."))
    return found


@pytest.mark.parametrize("value", PERSONAL["card"])
def test_cards_keep_prefix_groups_and_luhn(value: str) -> None:
    for surrogate in surrogates_of("card", value):
        assert luhn_holds(re.sub(r"\D", "", surrogate))
        assert surrogate[0] == value[0]
        assert re.sub(r"\d", "9", surrogate) == re.sub(r"\d", "9", value)


@pytest.mark.parametrize("value", PERSONAL["iban"])
def test_ibans_keep_country_groups_and_check_digits(value: str) -> None:
    for surrogate in surrogates_of("iban", value):
        assert iban_holds(re.sub(r"[ -]", "", surrogate))
        assert surrogate[:2] == value[:2]
        assert re.sub(r"\d", "9", re.sub("[A-Z]", "A", surrogate)) == re.sub(
            r"\d", "9", re.sub("[A-Z]", "A", value)
        )


@pytest.mark.parametrize("value", PERSONAL["phone"])
def test_phones_keep_groups_and_stay_valid(value: str) -> None:
    for surrogate in surrogates_of("phone", value):
        assert re.sub(r"\d", "9", surrogate) == re.sub(r"\d", "9", value)
        assert phonenumbers.is_valid_number(phonenumbers.parse(surrogate, "US"))


@pytest.mark.parametrize("value", PERSONAL["ip"][:3])
def test_addresses_come_from_documentation_ranges(value: str) -> None:
    ranges = ("192.0.2.0/24", "198.51.100.0/24", "203.0.113.0/24", "2001:db8::/32")
    networks = [ipaddress.ip_network(text) for text in ranges]
    for surrogate in surrogates_of("ip", value):
        address = ipaddress.ip_address(surrogate)
        assert any(address in n for n in networks if n.version == address.version)


@pytest.mark.parametrize("value", ["078-05-1120", "529.982.247-25", "12345678Z", "X1234567L"])
def test_national_numbers_keep_form_and_check_digits(value: str) -> None:
    for surrogate in surrogates_of("national", value):
        assert is_national(surrogate)
        assert re.sub(r"\d", "9", surrogate)[1:8] == re.sub(r"\d", "9", value)[1:8]


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ("1984-03-12", "%Y-%m-%d"),
        ("12.03.1984", "%d.%m.%Y"),
        ("03/12/1984", "%m/%d/%Y"),
        ("25/12/1984", "%d/%m/%Y"),
        ("03/12/84", "%m/%d/%y"),
        ("March 05, 1984", "%B %d, %Y"),
        ("05 Mar 1984", "%d %b %Y"),
    ],
)
def test_dates_of_birth_move_and_keep_their_form(text: str, form: str) -> None:
    born = datetime.datetime.strptime(text, form)
    for surrogate in surrogates_of("birth", f"born {text}"):
        moved = datetime.datetime.strptime(surrogate.removeprefix("born "), form)
        assert 1 <= abs((moved - born).days) <= 1_000


def test_other_dates_and_dates_that_are_none_stay() -> None:
    for text in ("Due 1984-03-12.", "born 1984-13-32", "born 99/99/1984", "born at 18:30"):
        assert changed(text) == text
    asked = Anonymizer(key=KEY)
    asked.texts(["Your date of birth?", "03/12/1984"])
    assert asked.audit.found == {"birth": 1}


def test_mac_addresses_are_locally_administered() -> None:
    for surrogate in surrogates_of("ip", "00:1B:44:11:3A:B7"):
        assert int(surrogate[:2], 16) & 0b11 == 0b10
        assert surrogate == surrogate.upper()


@pytest.mark.parametrize("value", PERSONAL["email"])
def test_mail_goes_to_domains_nobody_can_own(value: str) -> None:
    for surrogate in surrogates_of("email", value):
        local, _, domain = surrogate.partition("@")
        assert domain in ("example.com", "example.net", "example.org")
        assert len(local) == len(value.partition("@")[0])


def test_urls_lose_host_user_and_tokens_and_keep_the_rest() -> None:
    made = changed("https://bob:hunter2@shop.acme.com:8443/reset?token=a8F3kk29dkQ0sl2&lang=en")
    assert re.fullmatch(
        r"https://[a-z]{3}:[a-z]{6}\d@[a-z]{3}\.example\.(com|net|org):8443/reset\?token=\w{15}&lang=en",
        made,
    )
    kept = changed("https://acme.com/reset?token=a8F3kk29dkQ0sl2", hosts=["acme.com"])
    assert kept.startswith("https://acme.com/reset?token=")
    assert "a8F3kk29dkQ0sl2" not in kept


def test_a_value_has_one_surrogate_however_it_is_written() -> None:
    texts = [
        "(977) 625-2661 or +1 977 625 2661, call 977.625.2661",
        "4111 1111 1111 1111, 4111111111111111",
        "Jane.Doe7@acme.com and jane.doe7@ACME.com, user jane.doe7",
    ]
    phones, cards, mails = Anonymizer(key=KEY).texts(texts)
    assert (
        len({re.sub(r"\D", "", p)[-10:] for p in re.findall(r"[\d()+][\d()+ .-]{9,}\d", phones)})
        == 1
    )
    first, second = cards.split(", ")
    assert first.replace(" ", "") == second
    handle = mails.partition("@")[0]
    assert mails.lower().count(handle.lower()) == 3
    assert "doe" not in mails.lower()


def test_the_handle_of_an_address_is_found_in_other_turns() -> None:
    texts = ["my user is cminh730", "cminh730@email.com", "thanks CMINH730"]
    made = Anonymizer(key=KEY).texts(texts)
    handle = made[1].partition("@")[0]
    assert made[0] == f"my user is {handle}"
    assert made[2] == f"thanks {handle.upper()}"


def test_the_key_decides_and_nothing_else() -> None:
    text = " ".join(text for texts in PERSONAL.values() for text in texts)
    once, again = changed(text), changed(text)
    other = Anonymizer(key=bytes(32)).texts([text])[0]
    forgotten = [Anonymizer().texts([text])[0] for _ in range(2)]
    assert once == again
    assert len({once, other, *forgotten}) == 4


def test_surrogates_of_a_conversation_differ_from_each_other_and_from_its_values() -> None:
    # 300 of the 762 addresses set aside for examples: some draws must collide.
    texts = [f"10.0.{i // 100}.{i % 100 + 1}" for i in range(300)]
    made = Anonymizer(key=KEY).texts(texts)
    assert len(set(made)) == 300
    numbers = [f"order {i}" for i in range(1_000_000, 1_000_400)]
    replaced = Anonymizer(key=KEY).texts(numbers)
    assert len(set(replaced)) == 400
    assert not set(replaced) & set(numbers)


def test_what_was_asked_before_tells_what_a_number_is() -> None:
    ask_order = Anonymizer(key=KEY)
    ask_order.texts(["What is your order id?", "7916676427"])
    assert ask_order.audit.found == {"digits": 1}
    ask_phone = Anonymizer(key=KEY)
    ask_phone.texts(["Which phone number can I reach you at?", "2127365000"])
    assert ask_phone.audit.found == {"phone": 1}
    assert changed("7916676427") == "7916676427"


def test_regions_name_numbers_without_a_country_code() -> None:
    text = "Ring 07911 123456 later."
    assert changed(text) == text or "07911 123456" not in changed(text)
    made = changed(text, regions=["GB"])
    assert re.fullmatch(r"Ring 079\d\d \d{6} later\.", made)
    assert made != text


def test_a_list_of_terms_is_replaced_by_names_of_as_many_words() -> None:
    text = "I am Crystal  Minh of Acme, not crystal minhs."
    made = changed(text, terms=["crystal minh", "Acme"], names=["Ada Lovelace", "Initech"])
    assert made == "I am Ada Lovelace of Initech, not crystal minhs."
    spoken = changed(text, terms=["Crystal Minh"])
    assert re.fullmatch(r"I am [A-Z][a-z]{6}  [A-Z][a-z]{3} of Acme, not crystal minhs\.", spoken)
    cyrillic = changed("Это Анна.", terms=["Анна"])
    assert re.fullmatch("Это [А-Я][а-я]{3}.", cyrillic)
    assert cyrillic != "Это Анна."


def test_rows_keep_their_structure() -> None:
    arguments = json.dumps({"mail": "jane.doe@acme.com"})
    call = {"type": "function", "function": {"name": "send", "arguments": arguments}}
    value = {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "I am jane.doe@acme.com"}]},
            {"role": "assistant", "tool_calls": [call]},
            {"role": "tool", "content": "sent", "name": "send"},
        ],
        "tools": [{"name": "send"}],
    }
    (row,) = RowReader([value])
    made = Anonymizer(key=KEY).row(row)
    assert [m["role"] for m in made.messages] == ["user", "assistant", "tool"]
    said = made.messages[0]["content"][0]["text"].removeprefix("I am ")
    called = made.messages[1]["tool_calls"][0]["function"]
    assert json.loads(called["arguments"]) == {"mail": said}
    assert called["name"] == "send"
    assert made.tools == row.tools
    assert made.where == row.where
    assert made.id != row.id
    assert "doe" not in str(made)


def test_rows_without_personal_data_are_the_same_rows() -> None:
    rows = list(RowReader(["prose", {"prompt": "hi", "response": "hello"}]))
    assert list(Anonymizer(key=KEY).rows(rows)) == rows


def test_token_ids_cannot_be_searched() -> None:
    (row,) = RowReader([[1, 2, 3]])
    with pytest.raises(QcoreError, match="row 0 holds token ids") as caught:
        Anonymizer(key=KEY).row(row)
    assert caught.value.code == "CALIB_PII"


def test_a_callback_sees_every_text_at_the_end() -> None:
    seen: list[str] = []

    def redact(text: str) -> str:
        seen.append(text)
        return text.replace("Smith", "Jones")

    anonymizer = Anonymizer(key=KEY, redact=redact)
    made = anonymizer.texts(["Smith", "jane.doe@acme.com"])
    assert made[0] == "Jones"
    assert "acme" not in seen[1]
    assert anonymizer.audit.found == {"callback": 1, "email": 1}
    with pytest.raises(ArgumentError, match="redact returned a NoneType"):
        Anonymizer(redact=lambda text: None).texts(["a"])  # type: ignore[arg-type, return-value]


def test_the_audit_counts_and_shows_what_to_read_but_no_value() -> None:
    anonymizer = Anonymizer(key=KEY)
    for i in range(40):
        anonymizer.texts(
            [f"mail {i}: jane{i}@acme.com, {i} Long Road", "card 4111111111111112"], f"f:{i}"
        )
    anonymizer.texts(["nothing here"], "f:40")
    audit = anonymizer.audit
    counts = audit.counts()
    # Whoever mistyped a card gave a long number nonetheless.
    assert counts["found"] == {"digits": 40, "email": 40}
    assert counts["look_alikes"] == {"card": 40}
    assert (counts["rows"], counts["rows_changed"]) == (41, 40)
    assert len(audit.lines) == REVIEW_LINES
    assert all("⟦" in line and "@example." in line for line in audit.lines)
    told = str(audit) + audit._repr_html_() + json.dumps(audit.to_dict())
    assert "acme" not in told
    assert "names and addresses were not searched" in told


def test_kinds_can_be_chosen_and_unknown_ones_are_refused() -> None:
    text = "jane.doe@acme.com 4111111111111111"
    assert "4111111111111111" in changed(text, kinds=["email"])
    with pytest.raises(ArgumentError, match="'mail' is no kind"):
        Anonymizer(["mail"])
    for regions in (["XX"], []):
        with pytest.raises(ArgumentError, match="no region of telephone"):
            Anonymizer(regions=regions)
    with pytest.raises(ArgumentError, match="32 bytes"):
        Anonymizer(key=b"short")
    assert set(PERSONAL) | {"term"} == set(KINDS)


def test_without_phonenumbers_the_line_to_type_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "phonenumbers", None)
    with pytest.raises(
        QcoreError, match=r'pip install "qcore-quant\[data\]".*--pii-kinds'
    ) as caught:
        Anonymizer()
    assert caught.value.code == "EXTRA_MISSING"
    Anonymizer(["email"])


def presidio(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stands in for Presidio: finds Anna and Berlin."""
    entities = {"Anna": "PERSON", "Berlin": "LOCATION"}

    class AnalyzerEngine:
        def __init__(self, nlp_engine: object, supported_languages: list[str]) -> None:
            assert supported_languages == ["en"]

        def analyze(self, text: str, **options: object) -> list[SimpleNamespace]:
            return [
                SimpleNamespace(start=m.start(), end=m.end(), entity_type=entities[m[0]])
                for m in re.finditer("|".join(entities), text)
            ]

    class NlpEngineProvider:
        def __init__(self, nlp_configuration: dict[str, Any]) -> None:
            assert nlp_configuration["models"] == [{"lang_code": "en", "model_name": "en_stand_in"}]

        def create_engine(self) -> object:
            return object()

    analyzer = ModuleType("presidio_analyzer")
    engine = ModuleType("presidio_analyzer.nlp_engine")
    analyzer.AnalyzerEngine = AnalyzerEngine  # type: ignore[attr-defined]
    engine.NlpEngineProvider = NlpEngineProvider  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "presidio_analyzer", analyzer)
    monkeypatch.setitem(sys.modules, "presidio_analyzer.nlp_engine", engine)
    model = ModuleType("en_stand_in")
    model.__spec__ = SimpleNamespace()  # type: ignore[assignment]
    monkeypatch.setitem(sys.modules, "en_stand_in", model)


def test_names_are_found_by_presidio_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    presidio(monkeypatch)
    anonymizer = Anonymizer(key=KEY, ner="en_stand_in")
    made = anonymizer.texts(["Anna lives in Berlin", "Anna?"])
    assert re.fullmatch(r"[A-Z][a-z]{3} lives in [A-Z][a-z]{5}", made[0])
    assert made[1] == f"{made[0][:4]}?"
    assert anonymizer.audit.found == {"person": 2, "place": 1}
    assert "not searched" not in str(anonymizer.audit)


def test_without_presidio_or_its_model_the_lines_to_type_are_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    presidio(monkeypatch)
    with pytest.raises(QcoreError, match="python -m spacy download en_missing_model"):
        Anonymizer(ner="en_missing_model")
    with pytest.raises(QcoreError, match=r"a\.b is not installed"):
        Anonymizer(ner="a.b")
    monkeypatch.setitem(sys.modules, "presidio_analyzer", None)
    with pytest.raises(QcoreError, match=r'pip install "qcore-quant\[pii\]"') as caught:
        Anonymizer(ner="en_stand_in")
    assert caught.value.code == "EXTRA_MISSING"


def test_a_key_file_is_made_once_and_only_its_owner_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "key"
    key = key_of_file(path)
    assert len(key) == 32
    assert path.stat().st_mode & 0o777 == 0o600
    assert key_of_file(path) == key
    path.write_text("secret")
    with pytest.raises(ArgumentError, match="holds no key"):
        key_of_file(path)
    with pytest.raises(QcoreError) as caught:
        key_of_file(tmp_path / "none" / "key")
    assert caught.value.code == "CANNOT_CREATE"


def test_lists_are_read_line_by_line(tmp_path: Path) -> None:
    path = tmp_path / "names.txt"
    path.write_text("# customers\nCrystal Minh \n\nAlessandro Phoenix\n")
    assert list_of_file(path) == ["Crystal Minh", "Alessandro Phoenix"]
    with pytest.raises(QcoreError, match="Cannot read the list"):
        list_of_file(tmp_path / "none")
    path.write_bytes(b"\xff")
    with pytest.raises(QcoreError, match="not UTF-8"):
        list_of_file(path)


HOSTILE = {
    "letters": "a" * 200_000,
    "mails": "a@" * 100_000,
    "dots": "a.a" * 70_000 + "@",
    "digits": "1" * 200_000,
    "spaced digits": "1 " * 30_000,
    "hyphens": "1-" * 100_000,
    "colons": "a:" * 100_000,
    "keys": "-----BEGIN PRIVATE KEY-----" * 7_000,
    "urls": "https://" * 25_000,
    "parentheses": "(" * 200_000,
    "words": "password " * 20_000,
}


@pytest.mark.parametrize("case", HOSTILE)
def test_no_text_makes_the_search_quadratic(case: str) -> None:
    def seconds(text: str) -> float:
        start = time.process_time()
        Anonymizer(key=KEY).texts([text])
        return time.process_time() - start

    text = HOSTILE[case]
    half, whole = seconds(text[: len(text) // 2]), seconds(text)
    # Twice the text: linear takes twice the time, quadratic four times.
    assert whole <= 3 * half + 0.5
    assert whole <= 5.0
