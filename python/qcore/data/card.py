"""The card of a calibration set: what was used, for the record and for people."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from qcore.cards import Card, format_number, histogram_svg
from qcore.data.rows import RowReader
from qcore.data.tokens import Sample
from qcore.errors import escaped


class CalibrationCard(dict[str, Any]):
    """What was used, as a dictionary; `str` gives the short text."""

    @property
    def text(self) -> str:
        """A few lines for a terminal."""
        rows, tokens = self["rows"], self["tokens"]
        dropped = ", ".join(f"{count:,} {why}" for why, count in rows["dropped"].items())
        shapes = ", ".join(f"{name} {count:,}" for name, count in self["shapes"].items())
        template = self["template"]
        lines = [
            f"calibration  {', '.join(source['name'] for source in self['sources'])}: {shapes}",
            f"rows         {rows['read']:,} read, {rows['chosen']:,} chosen"
            + (f", dropped: {dropped}" if dropped else ""),
            f"tokens       {tokens['total']:,} ({tokens['min']:,} to {tokens['max']:,}, "
            f"median {tokens['median']:,})",
            f"template     {'none' if template is None else 'sha256:' + template['sha256'][:12]}"
            f"   BOS {self['bos']['samples']:,} of {rows['chosen']:,} samples",
        ]
        if self.get("personal_data"):
            found = self["personal_data"]["found"]
            told = ", ".join(f"{kind} {n:,}" for kind, n in found.items()) or "none found"
            lines.append(f"replaced     {told}")
        if self.get("sufficiency"):
            enough = self["sufficiency"]
            lines[2] += (
                f" = {enough['ratio']:.1f} x widest input ({enough['widest_in_features']:,})"
            )
        return "\n".join([*lines, *(f"note         {note}" for note in self["notes"])])

    def __str__(self) -> str:
        return self.text


def build_card(
    samples: list[Sample],
    reader: RowReader,
    dropped: Mapping[str, int],
    settings: Mapping[str, object],
    notes: list[str],
    model: Any,
) -> CalibrationCard:
    """The card of these samples; `template` is set by the caller."""
    bos_id = model.tokenizer.bos_id
    card = CalibrationCard(
        format=1,
        sha256="",
        sources=[dict(file.record) for file in reader.files]
        or [{"name": "Python iterable", "rows": reader.counts.read}],
        settings=dict(settings),
        rows={
            "read": reader.counts.read,
            "chosen": 0,
            "dropped": dict(sorted(dropped.items())),
            "bad": list(reader.counts.bad_rows),
        },
        shapes={},
        tokens={},
        template=None,
        bos={"id": bos_id, "samples": 0},
        first_sample="",
        notes=notes,
    )
    linears = getattr(getattr(model, "plan", None), "linears", None)
    if linears:
        widest = max(int(linear.in_features) for linear in linears)
        card["sufficiency"] = {"widest_in_features": widest, "ratio": 0.0}
    return recounted(card, samples)


def recounted(card: CalibrationCard, samples: Sequence[Sample]) -> CalibrationCard:
    """A card like this one, for other samples from the same sources."""
    lengths = sorted(sample.n_tokens for sample in samples)
    bos_id = card["bos"]["id"]
    other = CalibrationCard(card)
    other["sha256"] = _set_hash(samples)
    other["rows"] = {**card["rows"], "chosen": len(samples)}
    other["shapes"] = dict(sorted(Counter(sample.shape for sample in samples).items()))
    other["tokens"] = {
        "total": sum(lengths),
        "min": lengths[0],
        "median": lengths[(len(lengths) - 1) // 2],
        "max": lengths[-1],
    }
    other["bos"] = {"id": bos_id, "samples": sum(int(s.tokens[0]) == bos_id for s in samples)}
    other["first_sample"] = _shown(samples[0])
    if "sufficiency" in card:
        widest = card["sufficiency"]["widest_in_features"]
        other["sufficiency"] = {"widest_in_features": widest, "ratio": sum(lengths) / widest}
    return other


def _set_hash(samples: Sequence[Sample]) -> str:
    digest = hashlib.sha256(b"qcore.calibration 1\n")
    for sample in samples:
        digest.update(bytes.fromhex(sample.id))
        digest.update(sample.n_tokens.to_bytes(8, "little"))
        digest.update(sample.tokens.astype("<i8").tobytes())
    return digest.hexdigest()


def _shown(sample: Sample) -> str:
    """The beginning of a sample, special tokens visible, other control characters escaped."""
    if not sample.text:
        return "token ids " + " ".join(map(str, sample.tokens[:40].tolist()))
    return "\n".join(escaped(line) for line in sample.text[:1_000].split("\n"))


def notebook_card(card: CalibrationCard, lengths: Sequence[int]) -> Card:
    """The card as a notebook shows it."""
    rows, tokens = card["rows"], card["tokens"]
    facts: dict[str, object] = {
        "sources": ", ".join(source["name"] for source in card["sources"]),
        "shapes": ", ".join(f"{name} {n:,}" for name, n in card["shapes"].items()),
        "rows": f"{rows['read']:,} read, {rows['chosen']:,} chosen",
        "dropped": reasons(rows["dropped"]) or "none",
        "tokens": (
            f"{tokens['total']:,}; each {tokens['min']:,} to {tokens['max']:,}, "
            f"median {tokens['median']:,}"
        ),
        "template": (card["template"] or {}).get("sha256", "none"),
        "begin with BOS": f"{card['bos']['samples']:,} of {rows['chosen']:,}",
        "sha256": card["sha256"],
    }
    if card.get("personal_data"):
        facts["personal data replaced"] = reasons(card["personal_data"]["found"]) or "none found"
    if card.get("sufficiency"):
        enough = card["sufficiency"]
        facts["tokens per widest input"] = (
            f"{format_number(enough['ratio'])} x {enough['widest_in_features']:,}"
        )
    return Card(
        f"Calibration: {len(lengths):,} samples",
        warnings=card["notes"],
        facts=facts,
        figures=[histogram_svg(lengths, title="Length of the samples", x_label="tokens")],
        texts={"first sample": card["first_sample"]},
    )


def reasons(dropped: Mapping[str, int]) -> str:
    """What was dropped why, as a phrase."""
    return ", ".join(f"{count:,} {why}" for why, count in sorted(dropped.items()))
