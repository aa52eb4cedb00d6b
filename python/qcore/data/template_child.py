"""The process in which a chat template runs: a template is a program that somebody else wrote.

Run as a script by `qcore.data.template`, never imported by it: standard library and Jinja2 only, so
that the memory limit can be small and nothing of qcore is within a template's reach. Reads one JSON
line of settings and then one line per conversation from standard input; answers one line of
settings and one line per conversation on standard output.

The environment is that of transformers (`utils/chat_template_utils.py`): same options, same
functions, so the text is the same byte for byte. Two things differ on purpose: the date is given,
and attributes that begin with `_`, `include`, `import` and `extends` are refused before anything
runs.
"""

from __future__ import annotations

import datetime
import json
import resource
import signal
import sys
from typing import Any, NoReturn, TextIO


def limit_process(settings: dict[str, Any]) -> None:
    """Memory, CPU seconds, no files, no core dump."""
    limits = {
        resource.RLIMIT_AS: settings["memory_bytes"],
        resource.RLIMIT_CPU: settings["process_cpu_s"],
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_CORE: 0,
    }
    for which, value in limits.items():
        hard = resource.getrlimit(which)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(which, (value, value))


class Written:
    """What a template has written so far, and which of it is the assistant's.

    Jinja2 hands over text as it goes, so at the end of a `generation` block everything before it
    has been written: the same count as that of transformers.
    """

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """Forgets the conversation before."""
        self.parts: list[str] = []
        self.generation: list[tuple[int, int]] = []
        self._size = 0
        self._counted = 0

    def mark(self, text: str) -> None:
        """Notes that `text`, which comes next, is the assistant's."""
        while self._counted < len(self.parts):
            self._size += len(self.parts[self._counted])
            self._counted += 1
        self.generation.append((self._size, self._size + len(text)))


def build_environment(date: str, written: Written) -> Any:
    """The sandbox of transformers; `date` (ISO) is what `strftime_now` formats."""
    import jinja2
    import jinja2.ext
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        """`{% generation %}` marks what the assistant wrote; the text passes unchanged."""

        tags = {"generation"}  # noqa: RUF012 (Jinja2's own way to declare it)

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            call = self.call_method("_pass_through")
            return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

        def _pass_through(self, caller: Any) -> Any:
            text = caller()
            written.mark(text)
            return text

    class Dict:
        """`dict(...)` without the class behind it."""

        def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
            return dict(*args, **kwargs)

        def fromkeys(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
            return dict.fromkeys(*args, **kwargs)

    class Namespace(jinja2.utils.Namespace):
        """A namespace that takes no attribute beginning with `_`."""

        # No `self` among the parameters: a template may use that name like any other.
        def __init__(*args: Any, **kwargs: Any) -> None:
            self, args = args[0], args[1:]
            attributes = dict(*args, **kwargs)
            for name in attributes:
                check_name(name)
            jinja2.utils.Namespace.__init__(self, attributes)

        def __setitem__(self, name: str, value: Any) -> None:
            check_name(name)
            super().__setitem__(name, value)

    def check_name(name: Any) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"namespace attribute {name!r}")

    def raise_exception(message: Any) -> NoReturn:
        raise jinja2.exceptions.TemplateError(message)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: Any = None,
        separators: Any = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    class Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
        """Hidden attributes raise at once, where Jinja2 would print nothing for them."""

        def unsafe_undefined(self, obj: Any, attribute: str) -> Any:
            if attribute.startswith("_"):
                raise jinja2.exceptions.SecurityError(f"attribute {attribute}")
            return super().unsafe_undefined(obj, attribute)

    day = datetime.datetime.fromisoformat(date)
    environment = Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = day.strftime
    environment.globals["dict"] = Dict()
    environment.globals["namespace"] = Namespace
    return environment


def forbidden_construct(tree: Any) -> tuple[str, int] | None:
    """The first thing in the syntax tree that no chat template needs, and its line."""
    from jinja2 import nodes

    loaders = (nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends)
    for node in tree.find_all(nodes.Node):
        if isinstance(node, loaders):
            return type(node).__name__.lower(), node.lineno
        if isinstance(node, nodes.Getattr) and node.attr.startswith("_"):
            return f"attribute {node.attr}", node.lineno
        key = node.arg if isinstance(node, nodes.Getitem) else None
        if isinstance(node, nodes.Filter) and node.name == "attr" and node.args:
            key = node.args[0]
        if isinstance(key, nodes.Const) and str(key.value).startswith("__"):
            return f"attribute {key.value}", node.lineno
    return None


def failure(error: BaseException) -> dict[str, Any]:
    """The catalogue's code of an exception, and its text."""
    import jinja2

    text = str(getattr(error, "message", None) or error) or type(error).__name__
    if isinstance(error, jinja2.TemplateSyntaxError):
        return {"code": "TEMPLATE_SYNTAX", "text": text, "line": error.lineno}
    if isinstance(error, jinja2.exceptions.SecurityError):
        return {"code": "TEMPLATE_FORBIDDEN", "text": text}
    if isinstance(error, jinja2.UndefinedError):
        return {"code": "TEMPLATE_UNDEFINED", "text": text}
    if isinstance(error, (MemoryError, RecursionError, OverflowError)):
        return {"code": "TEMPLATE_LIMIT", "text": f"{type(error).__name__}: {text}"}
    if isinstance(error, jinja2.TemplateError):
        return {"code": "TEMPLATE_RAISED", "text": text}
    return {"code": "TEMPLATE_RAISED", "text": f"{type(error).__name__}: {text}"}


def rendered(
    template: Any, values: dict[str, Any], max_bytes: int, written: Written
) -> dict[str, Any]:
    """The text of one conversation and what of it is the assistant's, or why there is none."""
    written.begin()
    parts = written.parts
    size = 0
    for part in template.generate(**values):
        # UTF-8 is at most four bytes a character and at least one, so most texts need no encoding
        # here.
        size += len(part) if part.isascii() else len(part.encode("utf-8", "surrogatepass"))
        if size > max_bytes:
            return {"code": "TEMPLATE_LIMIT", "text": f"output above {max_bytes} bytes"}
        parts.append(part)
    marks = {"generation": written.generation} if written.generation else {}
    return {"text": "".join(parts), **marks}


def restart_clock(seconds: float) -> None:
    """End this process by SIGPROF after so many seconds of CPU time from now."""
    signal.setitimer(signal.ITIMER_PROF, seconds)


def main(source: TextIO, sink: TextIO) -> None:
    """Answer every line of `source`, or stop at the first answer that ends the batch."""
    settings = json.loads(source.readline())
    sys.path.extend(settings["import_paths"])
    import jinja2  # noqa: F401 (before the limits: importing needs files)

    written = Written()
    environment = build_environment(settings["date"], written)
    limit_process(settings)

    def answer(value: dict[str, Any]) -> int:
        line = json.dumps(value)
        sink.write(line + "\n")
        sink.flush()
        return len(line)

    restart_clock(settings["row_cpu_s"])
    try:
        construct = forbidden_construct(environment.parse(settings["template"]))
        if construct:
            what, line = construct
            answer({"code": "TEMPLATE_FORBIDDEN", "text": what, "line": line})
            return
        template = environment.from_string(settings["template"])
    except Exception as error:
        answer(failure(error))
        return
    answer({"ok": True})
    answered = 0
    for row in source:
        values = {**settings["variables"], **json.loads(row)}
        restart_clock(settings["row_cpu_s"])
        try:
            result = rendered(template, values, settings["output_bytes"], written)
        except Exception as error:
            result = failure(error)
        restart_clock(0)
        answered += answer(result)
        if answered > settings["batch_bytes"]:
            return


if __name__ == "__main__":
    main(sys.stdin, sys.stdout)
