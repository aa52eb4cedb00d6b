"""Whatever a row holds, it becomes a row, a counted reason or a named error; never a crash."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qcore.data import Anonymizer
from qcore.data.layouts import COLUMNS
from qcore.data.prepare import line_of
from qcore.data.rows import RowReader
from qcore.errors import QcoreError

WORDS = (
    "user",
    "assistant",
    "system",
    "hi",
    "a@b.io",
    "4111111111111111",
    "order 12345678",
    "{}",
    "",
)
LEAVES = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(WORDS) | st.text()
)
KEYS = st.sampled_from(
    (
        *COLUMNS,
        "role",
        "content",
        "from",
        "value",
        "speaker",
        "text",
        "body",
        "choices",
        "message",
        "name",
    )
)
JSON = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=12,
)
TURN = st.dictionaries(
    st.sampled_from(("role", "from", "speaker", "content", "value", "text")), LEAVES, max_size=3
)
ROW = st.dictionaries(KEYS, JSON | st.lists(TURN, max_size=3), max_size=4)
ANONYMIZER = Anonymizer(key=bytes(32))
QUICK = settings(
    max_examples=300, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)


@given(ROW)
@QUICK
def test_any_object_is_a_row_or_a_reason(value: dict[str, Any]) -> None:
    reader = RowReader([value], allow_bad_rows=True)
    rows, code = [], ""
    try:
        rows = list(reader)
    except QcoreError as error:
        code = error.code
    if code:
        assert code in ("TOKEN_OUT_OF_RANGE", "CALIB_UTF8")
        return
    assert len(rows) + reader.counts.n_bad + reader.counts.dropped["empty"] == 1
    for row in rows:
        again = json.loads(line_of(row))
        assert [r.id for r in RowReader([again])] == [row.id]
        if row.shape != "token_ids":
            changed = ANONYMIZER.row(row)
            assert changed.shape == row.shape
            assert [m.get("role") for m in changed.messages] == [
                m.get("role") for m in row.messages
            ]


@given(st.text(), st.text())
@QUICK
def test_any_text_is_searched_and_what_has_nothing_personal_stays(first: str, second: str) -> None:
    made = ANONYMIZER.texts([first, second])
    found = ANONYMIZER.find([first, second])
    for text, changed, findings in zip((first, second), made, found, strict=True):
        assert all(0 <= f.start < f.end <= len(text) for f in findings)
        assert (changed == text) == (not findings)
