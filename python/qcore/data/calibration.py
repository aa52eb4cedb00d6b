"""A calibration set: which texts, as which tokens, and a card that says how they came about."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qcore.cards import html_card
from qcore.data.anonymize import Anonymizer
from qcore.data.card import CalibrationCard, build_card, notebook_card, reasons, recounted
from qcore.data.choice import Choice
from qcore.data.prepare import anonymizer_of
from qcore.data.rows import RowReader
from qcore.data.shapes import TokenArray
from qcore.data.spans import share_of_roles
from qcore.data.template import DEFAULT_DATE, MAX_SOURCE_BYTES, ChatTemplate, template_variables
from qcore.data.tokens import MIN_TOKENS, ON_LONG, OnLong, RowTokenizer, Sample
from qcore.errors import ArgumentError, CalibrationError, MissingInputError, QcoreWarning, escaped

# Errors are over conversations: fewer than this make a noisy Hessian and a standard error that is a
# guess itself.
FEW_SAMPLES = 64


@dataclass(frozen=True, eq=False)
class Calibration:
    """Texts as token ids, chosen and ordered reproducibly; made by `Calibration.build`.

    Attributes:
        samples: in the order in which statistics are summed.
        card: sources, settings, counts, template, tokens.
        files: what was read, so that no output is written over it.
    """

    samples: tuple[Sample, ...]
    card: CalibrationCard
    files: tuple[Path, ...] = ()

    @classmethod
    def build(
        cls,
        source: object,
        *,
        model: Any,
        n_samples: int | None = 256,
        max_length: int = 2048,
        seed: int = 0,
        shape: str | None = None,
        template: str | Path | None = None,
        as_text: bool = False,
        on_long: OnLong = "truncate",
        few_samples: bool = False,
        allow_bad_rows: bool = False,
        skip_bad_rows: bool = False,
        date: str = DEFAULT_DATE,
        columns: Mapping[str, str] | None = None,
        path: str | None = None,
        anonymize: bool | Anonymizer = False,
        redact: Callable[[str], str] | None = None,
        roles: bool = False,
    ) -> Calibration:
        """Read, choose, render, tokenize.

        The choice is by a hash of seed and content: the order of the rows, the machine and every
        global random state are without influence, and equal rows are taken once.

        Args:
            source: a file, a folder, a glob, "-" for standard input, a list of `Path`s (JSONL, JSON,
                CSV, Parquet, text; gzip and zstd), or an iterable of dicts, strings or integer
                arrays, such as a `datasets.Dataset`. Rows of every shape that `qcore.detect` knows
                are taken. A `Calibration` is returned as it is.
            model: what the tokens are for: its tokenizer, template and config are used.
            n_samples: how many samples to choose; None takes all.
            max_length: longest sample in tokens, at most the model's context.
            seed: another number, another choice.
            shape: take only rows of this shape ("messages", "text", "token_ids") or layout.
            template: Jinja2 text, or a file of it, in place of the model's own.
            as_text: write conversations as "role: content" lines instead of by a template.
            on_long: "truncate" (keep the leading system message and the last turns that fit; prose
                keeps its start), "drop" or "error".
            few_samples: do not warn about fewer than 64 samples.
            allow_bad_rows: go on when more than 10 % of the rows fit no shape.
            skip_bad_rows: leave out conversations that the template refuses.
            date: what a template's `strftime_now` tells.
            columns: which column is what, for rows whose names say nothing.
            path: where in each row the payload lies: "request.body".
            anonymize: replace personal data in the chosen rows: True for every kind, with a key
                that is forgotten, or an `Anonymizer`. The choice does not depend on the key.
            redact: called with every text of the chosen rows; returns what is kept of it.
            roles: find out who says each token (`Sample.roles`), so that statistics can be
                weighted by it; costs one rendering per message.

        Raises:
            CalibrationError: CALIB_EMPTY, CALIB_TOO_SMALL, CALIB_LINE, CALIB_UTF8, CALIB_FORMAT,
                CALIB_PII,
                CALIB_NO_TEMPLATE, TEMPLATE_*, TOKENS_DOUBLE_BOS, TOKEN_OUT_OF_RANGE.
            MissingInputError: CALIB_MISSING.
        """
        if isinstance(source, Calibration):
            return source
        _check_settings(n_samples, max_length, on_long)
        reader = RowReader(
            source, shape=shape, columns=columns, path=path, allow_bad_rows=allow_bad_rows
        )
        anonymizer = anonymizer_of(anonymize, redact)
        notes: list[str] = []
        context = _config_value(model, "max_position_embeddings")
        if isinstance(context, int) and 0 < context < max_length:
            notes.append(f"max_length {max_length} lowered to the model's context of {context}")
            max_length = context
        chat_template = None if as_text else _chat_template(model, template, date)
        tool_template = None
        if template is None and not as_text:
            tool_template = _tool_template(model, date)

        def tokenizer() -> RowTokenizer:
            return RowTokenizer(
                model.tokenizer,
                template=chat_template,
                tool_template=tool_template,
                bos_id=model.tokenizer.bos_id,
                vocab_size=_vocab_size(model),
                max_length=max_length,
                on_long=on_long,
                as_text=as_text,
                skip_bad_rows=skip_bad_rows,
                roles=roles,
            )

        chosen = Choice(reader, n_samples, seed, anonymizer.row if anonymizer else None)
        samples, row_tokenizer = chosen.samples(tokenizer)
        dropped = {**chosen.dropped, **row_tokenizer.dropped}
        if not samples:
            raise _nothing_left(reader, dropped)
        notes += [f"{count:,} x {what}" for what, count in sorted(row_tokenizer.notes.items())]
        notes += [f"{count:,} x {what}" for what, count in sorted(reader.counts.notes.items())]
        notes += _shape_notes(samples, has_template=chat_template is not None)
        settings: dict[str, object] = {
            "n_samples": n_samples,
            "max_length": max_length,
            "seed": seed,
            "shape": shape,
            "as_text": as_text,
            "on_long": on_long,
            "date": date,
            "min_tokens": MIN_TOKENS,
        }
        if columns or path:
            settings |= {"columns": dict(columns or {}), "path": path}
        card = build_card(samples, reader, dropped, settings, notes, model)
        if roles:
            known = [sample.roles for sample in samples if sample.roles is not None]
            card["roles"] = share_of_roles(known)
        if anonymizer is not None:
            card["personal_data"] = anonymizer.audit.counts()
        used_template = any(s.shape == "messages" for s in samples) and chat_template is not None
        if used_template and chat_template is not None:
            origin = "given" if template is not None else "model"
            card["template"] = {"sha256": chat_template.sha256, "source": origin}
        if len(samples) < FEW_SAMPLES and not few_samples:
            wanted = "all" if n_samples is None else str(n_samples)
            told = f" ({reasons(dropped)})" if reasons(dropped) else ""
            warnings.warn(
                QcoreWarning(
                    f"CALIB_TOO_SMALL: {len(samples)} samples are left, {wanted} wanted; "
                    f"fewer than {FEW_SAMPLES} make noisy statistics{told}. "
                    "Add data, or say few_samples=True.",
                    "CALIB_TOO_SMALL",
                ),
                stacklevel=2,
            )
        return cls(tuple(samples), card, reader.paths)

    def split(self, n_held_out: int, *, seed: int = 0) -> tuple[Calibration, Calibration]:
        """The set without `n_held_out` of its conversations, and those.

        Who is held out goes by a hash of seed and content, so it does not depend on the order; the
        order of each part is that of the whole.

        Raises:
            CalibrationError: CALIB_TOO_SMALL, nothing would be left on one side.
        """
        if not 0 < n_held_out < len(self.samples):
            raise CalibrationError(
                f"{n_held_out} of {len(self.samples)} samples cannot be held out.",
                code="CALIB_TOO_SMALL",
                found=len(self.samples),
                needed=f"more than {n_held_out} samples",
                remedy="Give more conversations, or hold fewer out.",
            )

        def place(sample: Sample) -> bytes:
            return hashlib.sha256(f"qcore.held_out {seed} {sample.id}".encode()).digest()

        chosen = {sample.id for sample in sorted(self.samples, key=place)[:n_held_out]}
        return (
            self.of([sample for sample in self.samples if sample.id not in chosen]),
            self.of([sample for sample in self.samples if sample.id in chosen]),
        )

    def mixed(self, generic: Calibration, share: float) -> Calibration:
        """The set with a share of its samples replaced by as many of another, which come last.

        A share of less than half a sample leaves the set as it is.

        Raises:
            CalibrationError: CALIB_TOO_SMALL, the other set has fewer.
        """
        count = round(share * len(self.samples))
        if count == 0:
            return self
        if count > len(generic.samples):
            raise CalibrationError(
                f"A share of {share:g} of {len(self.samples)} samples is {count}, and the generic "
                f"text has {len(generic.samples)}.",
                code="CALIB_TOO_SMALL",
                found=len(generic.samples),
                needed=count,
                remedy="Give more generic text, or a smaller generic_share.",
            )
        own = self.samples[: len(self.samples) - count]
        mixture = self.of([*own, *generic.samples[:count]])
        mixture.card["sources"] = [*self.card["sources"], *generic.card["sources"]]
        mixture.card["generic_samples"] = count
        files = tuple(dict.fromkeys((*self.files, *generic.files)))
        return Calibration(mixture.samples, mixture.card, files)

    def of(self, samples: Sequence[Sample]) -> Calibration:
        """Some of the samples, in the order given."""
        return Calibration(tuple(samples), recounted(self.card, samples), self.files)

    @property
    def sequences(self) -> list[TokenArray]:
        """The token arrays of the samples, in order."""
        return [sample.tokens for sample in self.samples]

    @property
    def tokens(self) -> TokenArray:
        """All tokens, one sample after the other: (n_tokens,) int64."""
        return np.concatenate(self.sequences)

    @property
    def n_tokens(self) -> int:
        """Number of tokens in all samples."""
        return sum(sample.n_tokens for sample in self.samples)

    @property
    def sha256(self) -> str:
        """Hash of the samples' ids and tokens in order."""
        return str(self.card["sha256"])

    @property
    def settings(self) -> dict[str, Any]:
        """Every setting the samples depend on, besides the data and the model."""
        settings: dict[str, Any] = self.card["settings"]
        return dict(settings)

    def to_dict(self) -> dict[str, Any]:
        """The card as plain data."""
        copy: dict[str, Any] = json.loads(json.dumps(self.card))
        return copy

    def __len__(self) -> int:
        return len(self.samples)

    def __repr__(self) -> str:
        tokens = self.card["tokens"]
        return (
            f"Calibration({len(self.samples):,} samples, {tokens['total']:,} tokens of "
            f"{tokens['min']}-{tokens['max']} each, {'+'.join(self.card['shapes'])}, "
            f"sha256:{self.sha256[:12]})"
        )

    def _repr_html_(self) -> str:
        return html_card(notebook_card(self.card, [sample.n_tokens for sample in self.samples]))


def _check_settings(n_samples: int | None, max_length: int, on_long: str) -> None:
    for name, value in (("n_samples", n_samples), ("max_length", max_length)):
        if value is None and name == "n_samples":
            continue
        least = MIN_TOKENS if name == "max_length" else 1
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ArgumentError(
                f"{name} is {value!r}.",
                found=value,
                needed=f">= {least}",
                remedy=f"Use an integer of at least {least}.",
            )
    if on_long not in ON_LONG:
        raise ArgumentError(
            f"on_long is {on_long!r}.",
            found=on_long,
            needed=ON_LONG,
            remedy=f"Use one of {', '.join(ON_LONG)}.",
        )


def _chat_template(model: Any, template: str | Path | None, date: str) -> ChatTemplate | None:
    if isinstance(template, Path):
        try:
            with template.open("rb") as file:
                # One byte more than the limit: longer sources are refused by their size, not read.
                source: str | None = file.read(MAX_SOURCE_BYTES + 1).decode("utf-8")
        except OSError as error:
            raise MissingInputError(
                f"Cannot read the chat template {escaped(str(template))}: {error.strerror}.",
                code="CALIB_MISSING",
                where=escaped(str(template)),
                remedy="Check the path.",
            ) from error
        except UnicodeDecodeError as error:
            raise CalibrationError(
                f"{escaped(template.name)}:{error.start + 1}: not UTF-8.",
                code="CALIB_UTF8",
                where=escaped(str(template)),
                remedy="Save the template as UTF-8.",
            ) from error
    else:
        source = template if template is not None else model.template
    if source is None:
        return None
    return ChatTemplate(source, variables=template_variables(model), date=date)


def _tool_template(model: Any, date: str) -> ChatTemplate | None:
    """The template named "tool_use", for conversations that come with tools."""
    named = getattr(getattr(model, "checkpoint", None), "chat_templates", None) or {}
    source = named.get("tool_use")
    if source is None:
        return None
    return ChatTemplate(source, variables=template_variables(model), date=date)


def _config_value(model: Any, key: str) -> Any:
    config = getattr(model, "config", None) or {}
    text_config = config.get("text_config")
    if key not in config and isinstance(text_config, Mapping):
        config = text_config
    return config.get(key)


def _vocab_size(model: Any) -> int:
    """Rows of the embedding: ids at or above it have no vector."""
    size = _config_value(model, "vocab_size")
    return size if isinstance(size, int) else int(model.tokenizer.vocab_size)


def _shape_notes(samples: list[Sample], *, has_template: bool) -> list[str]:
    counts = Counter(sample.shape for sample in samples)
    notes = []
    if counts["text"] and has_template:
        notes.append(f"{counts['text']:,} samples are prose, without the model's chat template")
    if counts["token_ids"]:
        notes.append(f"{counts['token_ids']:,} samples are given ids: template and BOS unchecked")
    return notes


def _nothing_left(reader: RowReader, dropped: Mapping[str, int]) -> CalibrationError:
    read = reader.counts.read
    short = sum(count for why, count in dropped.items() if why.startswith("shorter"))
    where = ", ".join(file.name for file in reader.files[:5]) or "the iterable"
    if read and short == sum(dropped.values()):
        return CalibrationError(
            f"All {read:,} rows have fewer than {MIN_TOKENS} tokens.",
            code="CALIB_TOO_SMALL",
            where=where,
            found=f"0 samples left of {read:,}",
            needed=f"samples of at least {MIN_TOKENS} tokens, {FEW_SAMPLES} of them or more",
            remedy="Give whole conversations or longer texts.",
        )
    why = reasons(dropped)
    return CalibrationError(
        f"No sample is left of {read:,} rows{': ' + why if why else ''}.",
        code="CALIB_EMPTY",
        where=where,
        found=f"{read:,} rows; {why}",
        needed="at least one row with messages, text or input_ids",
        remedy="Give data that has such rows, or relax shape and max_length.",
    )
