"""Detection tells what data is; preparing writes it once, whole, with an account, or not at all."""

from __future__ import annotations

import gzip
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from data_stand_ins import chat_model

import qcore
from qcore.cli import main
from qcore.data import Anonymizer, Calibration, detect, prepare
from qcore.errors import QcoreError

KEY = bytes(32)
ROWS: list[dict[str, Any]] = [
    {"question": "Where is order 3348917502?", "answer": "Write to jane.doe@acme.com."},
    {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]},
    {"text": "prose"},
    {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]},
]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "raw.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def written(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_detection_counts_shapes_by_source_and_keeps_the_reasons(data: Path) -> None:
    bad = data.with_name("bad.jsonl")
    bad.write_text('{"a": 1}\n{"b": 1}\n')
    found = detect([data, bad])
    assert found.sources == {
        "raw.jsonl": {"pair": 1, "messages": 1, "text": 1, "sharegpt": 1},
        "bad.jsonl": {"bad row": 2},
    }
    assert (found.read, found.n_bad, found.accepted) == (6, 2, False)
    assert found.bad_rows == ("bad.jsonl:1: keys a", "bad.jsonl:2: keys b")
    shown = str(found)
    assert "raw.jsonl  4     pair 1, messages 1, text 1, sharegpt 1  0      0" in shown
    assert "refused" in shown
    for text in (found._repr_html_(), json.dumps(found.to_dict())):
        assert "bad.jsonl:2: keys b" in text
    assert detect(data).accepted
    assert detect(data, rows=2).read == 2
    assert detect(ROWS).sources == {"Python iterable": found.sources["raw.jsonl"]}


def test_files_of_one_name_are_told_apart(data: Path) -> None:
    other = data.parent / "more"
    other.mkdir()
    (other / data.name).write_bytes(data.read_bytes())
    assert list(detect([data, other / data.name]).sources) == [str(data), str(other / data.name)]


def test_prepared_rows_are_conversations_with_their_place(data: Path, tmp_path: Path) -> None:
    made = prepare(data, tmp_path / "out.jsonl")
    rows = written(made.out)
    assert [row["source"] for row in rows] == [f"raw.jsonl:{n}" for n in (1, 2, 3, 4)]
    assert rows[0]["messages"][0] == {"role": "user", "content": ROWS[0]["question"]}
    assert rows[1]["messages"] == rows[3]["messages"] == ROWS[1]["messages"]
    assert rows[2]["text"] == "prose"
    account = json.loads(made.audit_path.read_text())
    assert account == made.to_dict()
    assert account["rows"] == {"read": 4, "written": 4, "dropped": {}, "bad": []}
    assert account["sources"][0]["bytes"] == data.stat().st_size
    assert account["personal_data"] is None
    # What was prepared reads like any other data.
    assert detect(made.out).sources == {"out.jsonl": {"messages": 3, "text": 1}}


def test_the_same_data_and_key_give_the_same_bytes(data: Path, tmp_path: Path) -> None:
    def bytes_of(name: str, key: bytes | None) -> bytes:
        made = prepare(data, tmp_path / name, anonymize=Anonymizer(key=key))
        assert made.audit is not None
        assert made.account["personal_data"]["found"] == {"digits": 1, "email": 1}
        assert "jane" not in made.out.read_text() + made.audit_path.read_text() + repr(made)
        assert "Personal data: 2 replaced" in made._repr_html_()
        return made.out.read_bytes()

    assert bytes_of("a.jsonl", KEY) == bytes_of("b.jsonl", KEY)
    assert (
        len({bytes_of("c.jsonl", None), bytes_of("d.jsonl", None), bytes_of("e.jsonl", KEY)}) == 3
    )


def test_a_callback_works_alone_and_with_an_anonymizer(data: Path, tmp_path: Path) -> None:
    alone = prepare(data, tmp_path / "a.jsonl", redact=lambda text: text.replace("hi", "HI"))
    assert "HI" in alone.out.read_text()
    assert "jane.doe" in alone.out.read_text()
    both = prepare(data, tmp_path / "b.jsonl", anonymize=True, redact=str.upper)
    assert "HELLO" in both.out.read_text()
    assert "JANE" not in both.out.read_text()


@pytest.mark.parametrize(
    ("arrange", "code"),
    [
        (lambda out: out.write_text("mine"), "OUTPUT_EXISTS"),
        (lambda out: out.mkdir(), "OUTPUT_EXISTS"),
        (lambda out: out.symlink_to("nowhere"), "OUTPUT_EXISTS"),
    ],
)
def test_an_output_that_is_there_stays(data: Path, tmp_path: Path, arrange: Any, code: str) -> None:
    out = tmp_path / "out.jsonl"
    arrange(out)
    with pytest.raises(QcoreError) as caught:
        prepare(data, out)
    assert caught.value.code == code
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.jsonl", "raw.jsonl"]


def test_an_output_may_be_replaced_but_is_never_its_own_source(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    out.write_text("old")
    prepare(data, out, overwrite=True)
    assert len(written(out)) == 4
    for source in (data, tmp_path):
        with pytest.raises(QcoreError) as caught:
            prepare(source, data if source == data else tmp_path / "new.jsonl", overwrite=True)
        assert caught.value.code == "PATH_CONFLICT"
    with pytest.raises(QcoreError) as caught:
        prepare(data, tmp_path / "none" / "out.jsonl")
    assert caught.value.code == "CANNOT_CREATE"
    assert len(written(data)) == 4


@pytest.mark.parametrize(
    ("lines", "code"),
    [
        (b"", "CALIB_EMPTY"),
        (b'{"messages": []}\n', "CALIB_EMPTY"),
        (b'{"a": 1}\n', "CALIB_LINE"),
        (b'{"text": "fine"}\n' * 500 + b'{"text": "\xff"}\n', "CALIB_UTF8"),
    ],
)
def test_whatever_stops_it_nothing_is_left(tmp_path: Path, lines: bytes, code: str) -> None:
    (tmp_path / "raw.jsonl").write_bytes(lines)
    with pytest.raises(QcoreError) as caught:
        prepare(tmp_path / "raw.jsonl", tmp_path / "out.jsonl")
    assert caught.value.code == code
    assert caught.value.where.startswith("raw.jsonl")
    assert [p.name for p in tmp_path.iterdir()] == ["raw.jsonl"]


RUN = "import sys; from qcore.cli import main; sys.exit(main(sys.argv[1:]))"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_leaves_nothing(tmp_path: Path, number: int) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    arguments = ["data", "prepare", "-", "-o", str(folder / "out.jsonl"), "--quiet"]
    child = subprocess.Popen(
        [sys.executable, "-c", RUN, *arguments],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert child.stdin is not None
    assert child.stderr is not None
    child.stdin.write(b'{"text": "fine"}\n' * 50_000)
    child.stdin.flush()
    deadline = time.monotonic() + 60
    while not any(p.stat().st_size for p in folder.iterdir()) and time.monotonic() < deadline:
        time.sleep(0.02)
    staged = {p.name.partition(".partial-")[0] for p in folder.iterdir()}
    assert staged == {".out.jsonl", ".out.audit.json"}
    child.send_signal(number)
    assert child.wait(timeout=30) == 75
    assert b"INTERRUPTED" in child.stderr.read()
    child.stdin.close()
    child.stderr.close()
    assert list(folder.iterdir()) == []


# The command line


def told(capsys: pytest.CaptureFixture[str], *arguments: object, status: int = 0) -> Any:
    assert main([*map(str, arguments), "--json"]) == status
    return json.loads(capsys.readouterr().out)


def test_the_commands_do_what_the_functions_do(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = told(capsys, "data", "detect", data)
    assert found["sources"] == {"raw.jsonl": {"pair": 1, "messages": 1, "text": 1, "sharegpt": 1}}
    out, key = tmp_path / "out.jsonl", tmp_path / "key"
    arguments = ["data", "prepare", data, "-o", out, "--anonymize", "--pii-key", key]
    account = told(capsys, *arguments)
    assert account["personal_data"]["found"] == {"digits": 1, "email": 1}
    first = out.read_bytes()
    assert told(capsys, *arguments, status=3)["code"] == "OUTPUT_EXISTS"
    told(capsys, *arguments, "--overwrite")
    assert out.read_bytes() == first
    assert main([*map(str, arguments), "--overwrite"]) == 0
    shown = capsys.readouterr().out
    assert f"done         {out}   account {tmp_path / 'out.audit.json'}" in shown
    assert "read         raw.jsonl:1: " in shown


def test_detect_says_by_its_status_what_would_be_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "raw.csv"
    path.write_text("frage,antwort\nhi,hello\n")
    assert told(capsys, "data", "detect", path, status=1)["accepted"] is False
    told(capsys, "data", "detect", path, "--allow-bad-rows")
    mapped = ["--map", "user=frage", "--map", "assistant=antwort"]
    assert told(capsys, "data", "detect", path, *mapped)["sources"] == {"raw.csv": {"pair": 1}}
    out = tmp_path / "out.jsonl"
    assert told(capsys, "data", "prepare", path, "-o", out, status=3)["code"] == "CALIB_LINE"
    assert told(capsys, "data", "prepare", path, "-o", out, *mapped)["rows"]["written"] == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["detect"], "Missing argument 'FILES...'"),
        (["detect", "raw.jsonl", "--map", "user"], "'user' is not TARGET=COLUMN"),
        (["detect", "raw.jsonl", "--shape", "chat"], "Use one of request_log, messages"),
        (["prepare", "raw.jsonl"], "Missing option '-o'"),
        (["prepare", "raw.jsonl", "-o", "o", "--pii-kinds", "mail"], "'mail' is no kind"),
        (["prepare", "raw.jsonl", "-o", "o", "--pii-kinds", ","], "it names nothing"),
        (["prepare", "raw.jsonl", "-o", "o", "--pii-region", "X"], "'X' is no region"),
        (["prepare", "raw.jsonl", "-o", "o", "--pii-list", "none"], "Cannot read the list none"),
        (["detec", "raw.jsonl"], "Did you mean 'detect'?"),
    ],
)
def test_a_wrong_call_is_told_in_one_sentence(
    arguments: list[str],
    said: str,
    data: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(data.parent)
    assert main(["data", *arguments]) == 3
    shown = capsys.readouterr()
    assert said in shown.err
    assert shown.err.count("\n") == 1
    assert [p.name for p in data.parent.iterdir()] == ["raw.jsonl"]


@pytest.mark.parametrize("command", ["detect", "prepare"])
def test_each_command_has_an_example_and_prints_python(
    command: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", command, "--help"]) == 0
    assert f"Example: qcore data {command}" in capsys.readouterr().out
    out = ["-o", str(tmp_path / "out.jsonl"), "--pii-key", str(tmp_path / "key")]
    arguments = ["data", command, str(data), "--shape", "text"]
    assert main([*arguments, *(out if command == "prepare" else []), "--print-python"]) == 0
    code = capsys.readouterr().out
    exec(code, {})
    assert (tmp_path / "out.jsonl").exists() == (command == "prepare")


# Calibration sets


def test_a_calibration_set_is_built_from_any_shape_and_anonymized(tmp_path: Path) -> None:
    path = tmp_path / "raw.jsonl.gz"
    rows = [
        {
            "prompt": f"Where is order {3348917500 + i}? " * 3,
            "response": f"Mail to u{i}@acme.com. " * 3,
        }
        for i in range(20)
    ]
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))

    def build(**options: Any) -> Calibration:
        return Calibration.build(
            str(tmp_path / "*.gz"), model=chat_model(), n_samples=8, few_samples=True, **options
        )

    plain = build()
    first, again = (build(anonymize=Anonymizer(key=KEY)) for _ in range(2))
    assert first.sha256 == again.sha256
    assert first.card["personal_data"]["found"] == {"digits": 24, "email": 24}
    assert first.card["personal_data"]["rows"] == 8
    assert "replaced     digits 24, email 24" in str(first.card)
    texts = "".join(sample.text for sample in first.samples)
    assert "acme" not in texts
    assert not re.search("33489175", texts)
    # The choice goes by what was there, so it is the same rows under every key and without one.
    assert [s.where for s in plain.samples] == [s.where for s in first.samples]
    assert not {s.id for s in plain.samples} & {s.id for s in first.samples}
    assert "personal_data" not in plain.card


def test_quantize_takes_what_detect_takes_and_records_what_was_replaced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "raw.csv"
    lines = [
        f'"Where is order {3348917500 + i} of mine please?","It left u{i}@acme.com."'
        for i in range(9)
    ]
    path.write_text("\n".join(["frage,antwort", *lines]))
    model = Path(qcore.__file__).parent / "assets" / "helpdesk6m"
    out = tmp_path / "w4"
    arguments = [
        "quantize",
        model,
        "--recipe",
        "plain",
        "--calib",
        path,
        "--map",
        "user=frage",
        "--map",
    ]
    arguments += ["assistant=antwort", "--anonymize", "--n-samples", 4, "--max-length", 48]
    arguments += ["--keep", "model.layers.[1-5].*", "-o", out, "--quiet"]
    assert told(capsys, *arguments)["out"] == str(out)
    record = qcore.open(out).record
    assert record["calibration"]["personal_data"]["found"] == {"digits": 4, "email": 4}
    assert record["calibration"]["settings"]["columns"] == {"user": "frage", "assistant": "antwort"}
    assert "acme" not in json.dumps(record)
    assert main([*map(str, arguments), "--print-python"]) == 0
    code = capsys.readouterr().out
    assert "anonymize=True" in code
    assert "columns={'user': 'frage', 'assistant': 'antwort'}" in code


def test_both_ways_out_of_a_missing_template_are_flags_of_quantize(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    template = tmp_path / "plain.jinja"
    template.write_text("{% for m in messages %}{{ m.role }} says {{ m.content }}\n{% endfor %}")
    assets = Path(qcore.__file__).parent / "assets"
    arguments = ["quantize", assets / "helpdesk6m", "--recipe", "plain"]
    arguments += ["--calib", assets / "calibration.jsonl"]
    arguments += ["--n-samples", 4, "--max-length", 48, "--keep", "model.layers.[1-5].*", "--quiet"]
    told(capsys, *arguments, "--template", template, "-o", tmp_path / "a")
    told(capsys, *arguments, "--as-text", "-o", tmp_path / "b")
    settings = [qcore.open(tmp_path / name).record["calibration"]["settings"] for name in "ab"]
    assert [each["as_text"] for each in settings] == [False, True]
    assert (
        main([*map(str, arguments), "--template", str(template), "-o", "c", "--print-python"]) == 0
    )
    assert f"template=Path({str(template)!r})" in capsys.readouterr().out
