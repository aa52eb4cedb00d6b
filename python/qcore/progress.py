"""How far a long call is: one reporter, fed with dictionaries, shown where the user looks.

An event names a step and how much of it is done:

    {"event": "block", "index": 18, "of": 32, "loss": 3.1e-4, "damp": 0.03, "eta_s": 702}

`index` counts finished units, so `index == of` ends the step. `eta_s` is worked out here when the
caller leaves it out.
An event without `of` is a note: {"event": "done", "out": "./support-8b-w4"} or {"event": "note",
"text": "..."}.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, TextIO

from qcore.errors import ArgumentError

MODES = ("auto", "bar", "log", "json", "none")
# A log is read later: at most one line a second, and never a minute of silence in which a build
# server might take the run for dead.
LOG_EVERY_S = 1.0
LOG_SILENCE_S = 60.0
# A terminal is drawn often enough to look alive, seldom enough to cost nothing.
DRAW_EVERY_S = 0.1
BAR_CELLS = 28

Event = Mapping[str, Any]


class Progress:
    """Takes events and shows them; adds the time left, and closes itself as a context manager."""

    def __init__(self) -> None:
        self._step: object = None
        self._begin = 0.0
        self._first = 0

    def __call__(self, event: Event) -> None:
        """Takes one event."""
        self.show(self._timed(event))

    def show(self, event: Event) -> None:
        """Brings one event to the user."""
        raise AssertionError("each reporter shows events in its own way")

    def close(self) -> None:
        """Ends the line or widget that is open. Closing twice does nothing."""

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _timed(self, event: Event) -> Event:
        """The event with `eta_s`, from the pace since the first event of its step."""
        if "of" not in event or "index" not in event or "eta_s" in event:
            return event
        now = time.monotonic()
        if (event["event"], event["of"]) != self._step:
            self._step = (event["event"], event["of"])
            self._begin, self._first = now, event["index"]
        done = event["index"] - self._first
        if done <= 0:
            return event
        return {**event, "eta_s": (now - self._begin) / done * (event["of"] - event["index"])}


def reporter(
    how: str | Callable[[Event], None] = "auto", *, stream: TextIO | None = None
) -> Progress:
    """The reporter that `how` names.

    Args:
        how: "auto" (QCORE_PROGRESS, else a notebook's widget, a bar in a terminal, lines
            elsewhere),
            "bar", "log", "json", "none", or a callable that receives each event.
        stream: where text goes; standard error when None.

    Raises:
        ArgumentError: an unknown name.
    """
    if callable(how):
        return how if isinstance(how, Progress) else _Handed(how)
    name, source = how, "progress"
    if name == "auto" and os.environ.get("QCORE_PROGRESS"):
        name, source = os.environ["QCORE_PROGRESS"], "QCORE_PROGRESS"
    if name not in MODES:
        raise ArgumentError(
            f"{source} is {name!r}.", needed=MODES, remedy=f"Use one of {', '.join(MODES)}."
        )
    out = stream or sys.stderr
    if name == "auto":
        if stream is None and in_notebook():
            return _Notebook()
        name = "bar" if draws_in_place(out) else "log"
    if name == "bar":
        return _Bar(out)
    if name == "log":
        return _Log(out)
    return _Json(out) if name == "json" else _Handed(lambda event: None)


def in_notebook() -> bool:
    """Whether this process is the kernel of a notebook. Never loads IPython."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return type(shell).__name__ == "ZMQInteractiveShell"


def draws_in_place(stream: TextIO) -> bool:
    """Whether a line written there can be written over."""
    return stream.isatty() and os.environ.get("TERM", "") != "dumb"


def event_line(event: Event) -> str:
    """One line of text: "block 18/32  loss 3.1e-04  damp 0.03  11:42 left"."""
    parts = [str(event.get("event", ""))]
    if "of" in event:
        parts[0] += f" {event['index']}/{event['of']}"
    for key, value in event.items():
        if key in {"event", "index", "of", "eta_s"} or value is None:
            continue
        shown = f"{value:.3g}" if isinstance(value, float) else str(value)
        parts.append(shown if key == "text" else f"{key} {shown}")
    eta_s = event.get("eta_s")
    if eta_s is not None and event.get("index") != event.get("of"):
        parts.append(f"{clock_time(eta_s)} left")
    return "  ".join(parts)


def clock_time(seconds: float) -> str:
    """702 -> "11:42", 3723 -> "1:02:03"."""
    whole = max(0, round(seconds))
    hours, rest = divmod(whole, 3600)
    minutes, left = divmod(rest, 60)
    return f"{hours}:{minutes:02}:{left:02}" if hours else f"{minutes}:{left:02}"


class _Handed(Progress):
    """Hands each event to a callable."""

    def __init__(self, take: Callable[[Event], None]) -> None:
        super().__init__()
        self._take = take

    def show(self, event: Event) -> None:
        self._take(event)


class _Json(Progress):
    """One JSON object a line."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self._stream = stream

    def show(self, event: Event) -> None:
        self._stream.write(json.dumps(event, default=str) + "\n")
        self._stream.flush()


class _Bar(Progress):
    """One line of a terminal, drawn over and over; a finished step leaves its line."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self._stream = stream
        self._open = False
        self._drawn_at = 0.0

    def show(self, event: Event) -> None:
        if "of" not in event:
            self.close()
            self._stream.write(event_line(event) + "\n")
            self._stream.flush()
            return
        finished = event["index"] >= event["of"]
        now = time.monotonic()
        if not finished and now - self._drawn_at < DRAW_EVERY_S:
            return
        self._drawn_at = now
        filled = round(BAR_CELLS * event["index"] / max(1, event["of"]))
        line = f"[{'=' * filled}{'-' * (BAR_CELLS - filled)}] {event_line(event)}"
        columns = shutil.get_terminal_size().columns
        # One column stays free: some terminals wrap when the last one is written.
        line = line[: max(1, columns - 1)]
        self._stream.write(f"\r\x1b[K{line}")
        self._open = True
        if finished:
            self.close()
        self._stream.flush()

    def close(self) -> None:
        if self._open:
            self._stream.write("\n")
            self._stream.flush()
            self._open = False


class _Log(Progress):
    """Plain lines for files and build servers."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self._stream = stream
        self._lock = threading.Lock()
        self._said_at = -LOG_EVERY_S
        self._last: Event | None = None
        self._ended = threading.Event()
        self._breaker: threading.Thread | None = None

    def show(self, event: Event) -> None:
        finished = event.get("index") == event.get("of")
        with self._lock:
            self._last = event
            if not finished and time.monotonic() - self._said_at < LOG_EVERY_S:
                return
            self._say(event_line(event))
        if "of" in event and self._breaker is None:
            self._breaker = threading.Thread(target=self._break_silence, daemon=True)
            self._breaker.start()
        if event.get("event") == "done":
            self.close()

    def close(self) -> None:
        self._ended.set()

    def _say(self, line: str) -> None:
        self._stream.write(line + "\n")
        self._stream.flush()
        self._said_at = time.monotonic()

    def _break_silence(self) -> None:
        while not self._ended.wait(LOG_EVERY_S):
            with self._lock:
                if self._last and time.monotonic() - self._said_at >= LOG_SILENCE_S:
                    self._say(f"still at  {event_line(self._last)}")


class _Notebook(Progress):
    """tqdm's widget where tqdm is installed, else one line of HTML that is updated in place."""

    def __init__(self) -> None:
        super().__init__()
        self._bar: Any = None
        self._handle: Any = None

    def show(self, event: Event) -> None:
        if "of" not in event:
            return
        if self._bar is None and self._handle is None:
            self._begin_step(event)
        if self._bar is not None:
            self._bar.set_description(str(event["event"]), refresh=False)
            shown = {k: v for k, v in event.items() if k not in {"event", "index", "of", "eta_s"}}
            self._bar.set_postfix(shown, refresh=False)
            self._bar.n = event["index"]
            self._bar.refresh()
        else:
            self._handle.update(_html(event))
        if event["index"] >= event["of"]:
            self.close()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        self._bar = self._handle = None

    def _begin_step(self, event: Event) -> None:
        # Without ipywidgets tqdm.auto warns and falls back to text; any notebook shows HTML.
        if all(importlib.util.find_spec(name) for name in ("tqdm", "ipywidgets")):
            self._bar = importlib.import_module("tqdm.auto").tqdm(total=event["of"])
        else:
            display = importlib.import_module("IPython.display")
            self._handle = display.display(_html(event), display_id=True)


def _html(event: Event) -> Any:
    from html import escape

    html = importlib.import_module("IPython.display").HTML
    value = f'<progress value="{event["index"]}" max="{event["of"]}"></progress>'
    return html(f"{value} <code>{escape(event_line(event))}</code>")
