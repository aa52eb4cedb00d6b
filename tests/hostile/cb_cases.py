"""Builders of bad calibration data and chat templates."""

from __future__ import annotations

import io
import json
import sys
import tarfile
import zipfile
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hostile_files import Attempt

import qcore
from qcore.checkpoint import open_checkpoint
from qcore.data import Calibration, ChatTemplate
from qcore.errors import CalibrationError

ASSET = Path(qcore.__file__).parent / "assets" / "helpdesk6m"
USER = [{"role": "user", "content": "hello there"}]
CHAT: dict[str, Any] = {"messages": [*USER, {"role": "assistant", "content": "good morning"}]}


@cache
def chat_model() -> Any:
    """The embedded chat model, as far as calibration looks at one."""
    checkpoint = open_checkpoint(ASSET)
    return SimpleNamespace(
        tokenizer=checkpoint.tokenizer,
        template=checkpoint.chat_template,
        config=checkpoint.config,
        checkpoint=checkpoint,
    )


def calibrate(source: object, model: Any = None, *, code: str = "", **options: Any) -> Attempt:
    """Build a calibration set; a template needs a process of its own, so give it time."""
    used = model or chat_model()
    return Attempt(
        lambda: Calibration.build(source, model=used, **{"few_samples": True, **options}),
        limit_s=5.0,
        code=code,
    )


def render(source: str, messages: Any = None) -> Attempt:
    """Render one conversation; an error that belongs to it alone is raised too."""

    def run() -> str:
        (result,) = ChatTemplate(source).render([messages or USER])
        if isinstance(result, CalibrationError):
            raise result
        return result

    return Attempt(run, limit_s=5.0)


def lines(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def tm_syntax(tmp: Path) -> list[Attempt]:
    return [render("{% for %}"), render("{{ messages"), render("line\n{% endif %}\x1b")]


def tm_reaches_python(tmp: Path) -> list[Attempt]:
    return [
        render("{{ ''.__class__.__mro__ }}"),
        render("{{ messages.__init__.__globals__ }}"),
        render("{{ '{0.__class__}'.format(messages) }}"),
        render("{{ messages | attr('__class__') }}"),
    ]


def tm_endless(tmp: Path) -> list[Attempt]:
    loops = "{% for i in range(99999) %}" * 3 + "x" + "{% endfor %}" * 3
    deep = "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"
    return [render(loops), render("{{ 'a' * 999999999999 }}"), render(deep)]


def tm_long_output(tmp: Path) -> Attempt:
    return render("{% for i in range(20000) %}{{ 'x' * 1024 }}{% endfor %}")


def tm_includes(tmp: Path) -> list[Attempt]:
    return [
        render("{% include '/etc/passwd' %}"),
        render("{% import 'a' as b %}"),
        render("{% extends 'a' %}"),
    ]


def tm_undefined(tmp: Path) -> Attempt:
    return render("{{ nothing.inside }}")


def tm_too_long(tmp: Path) -> Attempt:
    return Attempt(lambda: ChatTemplate("x" * (256 * 1024 + 1)))


def tm_raises(tmp: Path) -> Attempt:
    return render("{{ raise_exception('roles must \x1b[31m alternate') }}")


def cb_missing_or_empty(tmp: Path) -> list[Attempt]:
    (tmp / "empty.jsonl").write_bytes(b"")
    return [
        calibrate(tmp / "absent.jsonl"),
        calibrate(tmp / "empty.jsonl", code="CALIB_EMPTY"),
        calibrate([], code="CALIB_EMPTY"),
    ]


def cb_all_filtered(tmp: Path) -> Attempt:
    empty = {"messages": []}
    return calibrate(lines(tmp / "a.jsonl", empty, empty), allow_bad_rows=True)


def cb_not_utf8(tmp: Path) -> Attempt:
    (tmp / "a.jsonl").write_bytes(b'{"text": "fine"}\n{"text": "\xff\x1b"}\n')
    return calibrate(tmp / "a.jsonl")


def cb_bad_rows(tmp: Path) -> list[Attempt]:
    return [
        calibrate(lines(tmp / "a.jsonl", CHAT, [1], {"other\x1b": 2})),
        calibrate(lines(tmp / "b.jsonl", *[{"prompt_id": 1}] * 9)),
    ]


def cb_lone_surrogate(tmp: Path) -> Attempt:
    (tmp / "a.jsonl").write_text('{"text": "half \\ud800 pair"}\n')
    return calibrate(tmp / "a.jsonl")


def cb_endless_line(tmp: Path) -> Attempt:
    (tmp / "a.jsonl").write_bytes(b'{"text": "' + b"x" * (16 * 2**20) + b'"}\n')
    return calibrate(tmp / "a.jsonl")


def cb_odd_characters(tmp: Path) -> Attempt:
    text = "nul \0 and \u202e bidi " * 20
    return calibrate(lines(tmp / "a.jsonl", {"text": text}, CHAT))


def cb_bad_ids(tmp: Path) -> list[Attempt]:
    return [
        calibrate([np.array([1, 2, 4096])]),
        calibrate([[1, 2, -1] * 8]),
        calibrate(lines(tmp / "a.jsonl", {"input_ids": [1, 2.5, 3]})),
    ]


def cb_longer_than_context(tmp: Path) -> Attempt:
    return calibrate(["a long text " * 5000])


def cb_one_token(tmp: Path) -> Attempt:
    return calibrate([[1]])


def cb_archives(tmp: Path, monkeypatch: pytest.MonkeyPatch) -> list[Attempt]:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with zipfile.ZipFile(tmp / "a.zip", "w") as archive:
        archive.writestr("a.jsonl", json.dumps(CHAT))
    with tarfile.open(tmp / "a.tar", "w") as tape:
        tape.addfile(tarfile.TarInfo("a.jsonl"), io.BytesIO(b""))
    (tmp / "zip.jsonl").write_bytes((tmp / "a.zip").read_bytes())
    (tmp / "a.parquet").write_bytes(b"PAR1" + bytes(100))
    (tmp / "a.jsonl.zst").write_bytes(b"\x28\xb5\x2f\xfd" + bytes(100))
    archives = [calibrate(tmp / name) for name in ("a.zip", "a.tar", "zip.jsonl")]
    packed = ("a.parquet", "a.jsonl.zst")
    return [*archives, *(calibrate(tmp / name, code="EXTRA_MISSING") for name in packed)]


def cb_inside_the_output(tmp: Path) -> list[Attempt]:
    """The calibration file lies in the folder that would be replaced, or is that name itself."""
    out = tmp / "out"
    out.mkdir()
    data = lines(out / "a.jsonl", CHAT, CHAT | {"id": 2})
    built = Calibration.build(data, model=chat_model(), few_samples=True)

    def into(place: Path, source: object) -> Attempt:
        return Attempt(
            lambda: qcore.quantize(ASSET, calib=source, out=place, overwrite=True, progress="none"),
            limit_s=5.0,
        )

    return [into(out, data), into(out, built), into(data, built)]


def pr_no_template(tmp: Path) -> Attempt:
    plain = SimpleNamespace(**{**vars(chat_model()), "template": None, "checkpoint": None})
    return calibrate([CHAT], plain)


def pr_two_begin_tokens(tmp: Path) -> Attempt:
    begin = chat_model().tokenizer.bos_id
    return calibrate([[begin, begin, *range(5, 40)]])
