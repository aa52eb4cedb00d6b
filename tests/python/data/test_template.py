"""Templates render as in transformers, inside limits, and never reach Python."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from qcore.data import template as template_module
from qcore.data.template import ChatTemplate, template_variables
from qcore.errors import CalibrationError, FormatError, QcoreError

USER = [{"role": "user", "content": "hé\u2028<b>"}]


def render(source: str, messages: object = None, **options: object) -> str:
    result = ChatTemplate(source, **options).render([messages or USER])[0]
    if isinstance(result, CalibrationError):
        raise result
    return result


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{{ messages[0]['content'] }}", "hé\u2028<b>"),
        ("{{ messages[0] | tojson }}", '{"role": "user", "content": "hé\u2028<b>"}'),
        ("{{ [1, {'b': 2}] | tojson(indent=1) }}", '[\n 1,\n {\n  "b": 2\n }\n]'),
        ("  {% if true %}\n  a\n  {% endif %}\nb", "  a\nb"),
        ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
        ("{% generation %}kept{% endgeneration %}", "kept"),
        ("{% generation %}\n  kept\n  {%- endgeneration -%}\n x", "  keptx"),
        ("{% set ns = namespace(n=1) %}{% set ns.n = ns.n + 1 %}{{ ns.n }}", "2"),
        ("{{ dict(a=1)['a'] }}{{ dict.fromkeys('ab', 0) | length }}", "12"),
        ("{{ strftime_now('%d %b %Y') }}", "26 Jul 2024"),
        ("{{ undefined_name }}|{{ tools is none }}|{{ documents is none }}", "|True|True"),
        ("{{ add_generation_prompt }}", "False"),
        ("{{ bos_token }}", "<s>"),
    ],
)
def test_renders_like_transformers(source, text):
    assert render(source, variables={"bos_token": "<s>"}) == text


def test_the_date_is_given_not_read_from_the_clock():
    assert render("{{ strftime_now('%Y-%m-%d') }}", date="2031-05-06") == "2031-05-06"


def test_a_generation_prompt_can_be_asked_for():
    source = "{% if add_generation_prompt %}go{% endif %}"
    assert ChatTemplate(source).render([USER], add_generation_prompt=True) == ["go"]


def test_reasoning_is_found_under_each_of_its_names():
    for key in ("reasoning", "thinking", "reasoning_content"):
        turn = {"role": "assistant", "content": "x", key: "because"}
        assert render("{{ messages[0].reasoning_content }}", [turn]) == "because"


def test_many_conversations_come_back_in_order_over_several_batches(monkeypatch):
    monkeypatch.setattr(template_module, "BATCH_ROWS", 3)
    conversations = [[{"role": "user", "content": f"text {i}"}] for i in range(10)]
    texts = ChatTemplate("{{ messages[0].content }}").render(conversations)
    assert texts == [f"text {i}" for i in range(10)]


def test_a_batch_with_much_output_goes_on_in_another_process(monkeypatch):
    monkeypatch.setattr(template_module, "BATCH_OUTPUT_BYTES", 100)
    texts = ChatTemplate("{{ messages[0].content * 80 }}").render(
        [[{"role": "user", "content": c}] for c in "abc"]
    )
    assert texts == ["a" * 80, "b" * 80, "c" * 80]


ESCAPES = [
    "{{ messages.__class__ }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages['__class__'] }}",
    "{{ messages | attr('__class__') }}",
    "{{ messages[('__cla' ~ 'ss__')] }}",
    "{{ messages | attr('__cla' ~ 'ss__') }}",
    "{{ '{0.__class__}'.format(1) }}",
    "{{ ('{a.__cla' ~ 'ss__}').format_map({'a': 1}) }}",
    "{{ messages | map(attribute='__class__') | list }}",
    "{{ cycler.__init__.__globals__ }}",
    "{{ raise_exception.__globals__ }}",
    "{{ self._TemplateReference__context }}",
    "{{ namespace(_x=1) }}",
    "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update({'role': 'x'}) }}",
    "{% include 'other' %}",
    "{% import 'other' as other %}",
    "{% from 'other' import thing %}",
    "{% extends 'other' %}",
]


@pytest.mark.parametrize("source", ESCAPES)
def test_ways_out_of_the_sandbox_are_refused(source):
    with pytest.raises(QcoreError) as caught:
        render(source)
    assert caught.value.code == "TEMPLATE_FORBIDDEN"
    assert caught.value.error_class == 65


EXHAUSTERS = [
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{{ 'a' * 10000000000 }}",
    "{{ ('a' * 1000000) * 17 }}",
    "{{ range(1000000000) | list }}",
    "{{ 'a' | center(10000000000) }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ 7 ** (7 ** 10) }}",
    "{{ " + "(" * 20_000 + "1" + ")" * 20_000 + " }}",
    "{% set ns = namespace(s='a') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
]


@pytest.mark.parametrize("source", EXHAUSTERS, ids=lambda source: source[:40])
def test_templates_that_eat_time_or_memory_are_ended(source):
    begin = time.monotonic()
    with pytest.raises(QcoreError) as caught:
        render(source)
    assert caught.value.code == "TEMPLATE_LIMIT"
    # 2 s of CPU is the limit; the rest is for a machine that others use too.
    assert time.monotonic() - begin < 30


def test_a_limit_names_the_conversation_that_met_it():
    source = "{% if messages[0].content == 'b' %}{{ 'a' * 10**10 }}{% endif %}"
    conversations = [[{"role": "user", "content": c}] for c in "abc"]
    with pytest.raises(QcoreError, match=r"chats\.jsonl:2"):
        ChatTemplate(source).render(conversations, wheres=[f"chats.jsonl:{i}" for i in (1, 2, 3)])


def test_a_refused_conversation_is_an_answer_and_the_others_are_rendered():
    source = "{% if messages[0].content == 'b' %}{{ raise_exception('no\x1b[31m b') }}{% endif %}ok"
    answers = ChatTemplate(source).render([[{"role": "user", "content": c}] for c in "abc"])
    assert answers[0] == answers[2] == "ok"
    assert isinstance(answers[1], CalibrationError)
    assert answers[1].code == "TEMPLATE_RAISED"
    assert "no\\x1b[31m b" in str(answers[1])
    assert "conversation 1" in str(answers[1])


@pytest.mark.parametrize(
    ("source", "code", "says"),
    [
        ("a\n{% if %}", "TEMPLATE_SYNTAX", "line 2"),
        ("{% endfor %}", "TEMPLATE_SYNTAX", "endfor"),
        ("{{ nowhere.x }}", "TEMPLATE_UNDEFINED", "'nowhere' is undefined"),
        ("{{ 1 + 'a' }}", "TEMPLATE_RAISED", "TypeError"),
    ],
)
def test_errors_have_their_code_and_say_where(source, code, says):
    with pytest.raises(QcoreError, match=says) as caught:
        render(source)
    assert caught.value.code == code


@pytest.mark.parametrize("extra", [-1, 0, 1])
def test_the_source_limit_is_exact(extra):
    source = "a" * (template_module.MAX_SOURCE_BYTES + extra)
    if extra <= 0:
        assert render(source) == source
        return
    with pytest.raises(FormatError) as caught:
        ChatTemplate(source)
    assert caught.value.code == "LIMIT_TEMPLATE"


@pytest.mark.parametrize("extra", [0, 1])
def test_the_output_limit_is_exact(extra):
    size = template_module.MAX_OUTPUT_BYTES + extra
    source = f"{{{{ 'é' * {size // 2} }}}}{{{{ 'a' * {size % 2} }}}}"
    if not extra:
        assert len(render(source).encode()) == size
        return
    with pytest.raises(QcoreError) as caught:
        render(source)
    assert caught.value.code == "TEMPLATE_LIMIT"


def test_the_child_can_write_no_file(tmp_path):
    code = (
        "import signal, sys; sys.path.insert(0, sys.argv[1]); import template_child\n"
        "template_child.limit_process({'memory_bytes': 2**29, 'process_cpu_s': 5})\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "file = open(sys.argv[2], 'wb', 0)\n"
        "try:\n    file.write(b'x')\nexcept OSError:\n    print('refused')\n"
    )
    folder = Path(template_module.__file__).parent
    done = subprocess.run(
        [sys.executable, "-I", "-c", code, str(folder), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "refused\n", done.stderr
    assert (tmp_path / "out").stat().st_size == 0


def test_the_child_gets_none_of_our_environment(monkeypatch):
    seen = {}

    def run(command, **options):
        seen.update(options["env"])
        raise subprocess.TimeoutExpired(command, 1)

    monkeypatch.setenv("QCORE_API_KEY_FILE", "canary")
    monkeypatch.setattr(template_module.subprocess, "run", run)
    with pytest.raises(QcoreError, match="no answer"):
        render("a")
    assert seen
    assert not set(seen) - {"LC_ALL", "PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH"}


def test_special_tokens_come_from_the_tokenizers_settings():
    class Settings:
        tokenizer_config = {  # noqa: RUF012
            "bos_token": {"content": "<b>", "lstrip": False},
            "pad_token": "<p>",
            "eos_token": None,
        }

    class Tokens:
        bos_id, eos_ids = 5, (6, 7)

        def token(self, token_id):
            return f"<{token_id}>"

    class WithSettings:
        checkpoint, tokenizer = Settings(), Tokens()

    class Bare:
        tokenizer = Tokens()

    assert template_variables(WithSettings()) == {"bos_token": "<b>", "pad_token": "<p>"}
    assert template_variables(Bare()) == {"bos_token": "<5>", "eos_token": "<6>"}
