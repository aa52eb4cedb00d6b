"""One model's contest: everybody judged on the same texts, with a record of each."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import qcore
from benchmarks.fidelity.judge import Judge, Score, file_bytes, linear_bits
from benchmarks.fidelity.ours import Ours, artifact, calibration
from benchmarks.fidelity.peers import Peer, made
from benchmarks.harness import Session
from benchmarks.peers.places import PeerAbsentError

PEERS_FILE = Path(__file__).with_name("peers.json")
YARDSTICK = Ours("rtn", "4s64")


@dataclass(frozen=True)
class Contender:
    """One quantized model and what was found of it.

    Attributes:
        name: tool and setting.
        recipe: ours: stem of the recipe file; "" for others.
        grid: ours: of all layers, such as "4a64".
        bits: stored bits per weight of the linear layers.
        nbytes: of the file's weights.
        seconds, cpu_seconds: of the quantization; processor seconds compare across busy machines.
        scores: by kind of text.
        yardstick: plain rounding in the same run.
        version: of the tool.
        date: of a figure that comes from a file; "" for this run's.
    """

    name: str
    recipe: str
    grid: str
    bits: float
    nbytes: int
    seconds: float
    cpu_seconds: float
    scores: Mapping[str, Score]
    yardstick: Mapping[str, Score]
    version: str = ""
    date: str = ""

    def ratio(self, kind: str) -> tuple[float, float]:
        """KL as a multiple of plain rounding's, and its standard error."""
        return self.scores[kind].ratio_to(self.yardstick[kind])

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Contender:
        """What `dataclasses.asdict` made, also by way of JSON."""
        parsed = {
            key: {kind: Score.from_dict(score) for kind, score in data[key].items()}
            for key in ("scores", "yardstick")
        }
        return cls(**{**data, **parsed})

    def line(self) -> str:
        text = f"{self.name:<46} {self.bits:6.3f} {self.nbytes / 1e6:7.2f} {self.cpu_seconds:7.0f}"
        for kind, score in self.scores.items():
            ratio, error = self.ratio(kind)
            text += f"  {score.kl:.4f} ±{score.se:.4f} {ratio:6.3f} ±{error:.3f}"
            text += f" {score.p99:7.3f} {score.same_top:7.2%}"
        return text + (f"  of {self.date}" if self.date else "")


@dataclass(frozen=True)
class Stage:
    """Where a contest takes place.

    Attributes:
        name: of the model, for people and for the file of peers.
        model, calib, chat, wiki: paths; wiki may be None.
        ours, peers: who takes part.
        rows, n_samples: held-out texts of each kind, calibration conversations.
        cache: folder of artifacts and scores.
        earlier: JSON of runs on the same texts; who is in them and not in this one stands in the table with their date.
    """

    name: str
    model: Path
    calib: Path
    chat: Path
    wiki: Path | None
    ours: Sequence[Ours]
    peers: Sequence[Peer]
    rows: int
    n_samples: int
    cache: Path
    earlier: Sequence[Path] = ()


class Contest:
    """The contenders of one stage."""

    def __init__(self, session: Session, stage: Stage) -> None:
        self.session, self.stage = session, stage
        self.judge = Judge(stage.model, stage.chat, stage.wiki, stage.rows)
        self.contenders: list[Contender] = []
        self._yardstick: Mapping[str, Score] = {}

    def hold(self) -> None:
        """Ours, then the peers that are here, then the others from the file."""
        texts = ", ".join(f"{kind} {len(held)}" for kind, held in self.judge.held.items())
        print(f"\n{self.stage.name}, held-out texts: {texts}")
        head = "".join(
            f"  {f'KL {kind}':>14} {'/ rounding':>13} {'p99':>7} {'top':>7}"
            for kind in self.judge.held
        )
        print(f"{'':46} {'bits':>6} {'MB':>7} {'CPU s':>7}{head}", flush=True)
        ours = sorted(self.stage.ours, key=lambda found: found != YARDSTICK)
        for contender in ours:
            self._own(contender)
        for peer in self.stage.peers:
            self._peer(peer)
        for row in earlier(self.stage.earlier, self.stage.name):
            if row.name not in {found.name for found in self.contenders}:
                self._add(row)

    def _own(self, ours: Ours) -> None:
        stage = self.stage
        out, told = artifact(stage.model, stage.calib, stage.n_samples, ours, stage.cache)
        self._enter(ours.name, out, told, recipe=ours.recipe, grid=ours.grid)

    def _peer(self, peer: Peer) -> None:
        try:
            out, told = made(peer, self.stage.model, self._calib, self.stage.cache)
        except (PeerAbsentError, RuntimeError) as error:
            why = str(error).strip().splitlines()[-1]
            kept = recorded(self.stage.name).get(peer.name)
            if kept is None:
                name = f"{self.stage.name}: {peer.name}"
                self.session.state(name, None, "", missing=f"{peer.name} is absent: {why}")
            else:
                self._add(kept)
            return
        self._enter(peer.name, out, told)

    def _enter(
        self, name: str, out: Path, told: Mapping[str, Any], *, recipe: str = "", grid: str = ""
    ) -> None:
        """Judges what lies at `out`."""
        weights = sum(x.out_features * x.in_features for x in self.judge.model.plan.linears)
        # A decoded checkpoint is larger than the codes that it was decoded from.
        stored = told.get("linear_bytes")
        nbytes = file_bytes(out)
        scores = self._scores(out)
        self._yardstick = self._yardstick or scores
        self._add(
            Contender(
                name=name,
                recipe=recipe,
                grid=grid,
                bits=8 * stored / weights if stored else linear_bits(out),
                nbytes=self._kept_bytes + stored if stored else nbytes,
                seconds=told["seconds"],
                cpu_seconds=told["cpu_seconds"],
                scores=scores,
                yardstick=self._yardstick,
                version=told.get("version", qcore.__version__),
            )
        )

    def _add(self, contender: Contender) -> None:
        self.contenders.append(contender)
        print(contender.line(), flush=True)
        kept = self.session.details.setdefault(self.stage.name, [])
        kept.append(dataclasses.asdict(contender))
        self.session.write()

    @cached_property
    def _calib(self) -> qcore.Calibration:
        return calibration(self.judge.model, self.stage.calib, self.stage.n_samples)

    @cached_property
    def _kept_bytes(self) -> int:
        """Of what stays bfloat16 on all sides."""
        linears = {linear.name for linear in self.judge.model.plan.linears}
        tensors = self.judge.model.tensors.items()
        return sum(t.nbytes for name, t in tensors if name.rpartition(".")[0] not in linears)

    def _scores(self, path: Path) -> dict[str, Score]:
        """The judge's, or those that it gave the same weights on the same texts before."""
        file = self.stage.cache / f"scores-{self.judge.digest[:16]}.json"
        known = json.loads(file.read_text("utf-8")) if file.exists() else {}
        key = digest(path)
        if key not in known:
            scores = self.judge.scores(path)
            known[key] = {kind: dataclasses.asdict(score) for kind, score in scores.items()}
            file.write_text(json.dumps(known), "utf-8")
        return {kind: Score.from_dict(score) for kind, score in known[key].items()}


def digest(path: Path) -> str:
    """Of all weights and the settings that say how to read them."""
    found = hashlib.sha256()
    files = (
        [path] if path.is_file() else sorted([*path.glob("*.safetensors"), path / "config.json"])
    )
    for name in files:
        with name.open("rb") as file:
            found.update(hashlib.file_digest(file, "sha256").digest())
    return found.hexdigest()


def recorded(model: str) -> dict[str, Contender]:
    """The peers that the repository's file holds for this model, by name."""
    if not PEERS_FILE.exists():
        return {}
    rows = json.loads(PEERS_FILE.read_text("utf-8")).get(model, [])
    return {row["name"]: Contender.from_dict(row) for row in rows}


def earlier(files: Sequence[Path], model: str) -> list[Contender]:
    """Everybody in the runs of these files, the last file first."""
    found = []
    for file in reversed(files):
        run = json.loads(file.read_text("utf-8"))
        when = run["date"].replace("T", " ").removesuffix("+00:00")
        for row in run["details"].get(model, []):
            contender = Contender.from_dict(row)
            found.append(dataclasses.replace(contender, date=contender.date or when))
    return found


def record(contest: Contest, date: str) -> None:
    """Writes the peers that were judged in this run into the repository's file."""
    everyone = json.loads(PEERS_FILE.read_text("utf-8")) if PEERS_FILE.exists() else {}
    model = contest.stage.name
    rows = recorded(model)
    for contender in contest.contenders:
        if not contender.recipe and not contender.date:
            rows[contender.name] = dataclasses.replace(contender, date=date)
    everyone[model] = [rounded(dataclasses.asdict(row)) for row in rows.values()]
    # A line for each peer.
    models = (
        json.dumps(name) + ": [\n" + ",\n".join(map(json.dumps, found)) + "\n]"
        for name, found in everyone.items()
    )
    staged = PEERS_FILE.with_suffix(".part")
    staged.write_text("{\n" + ",\n".join(models) + "\n}\n", "utf-8")
    staged.replace(PEERS_FILE)


def rounded(value: Any) -> Any:
    """Seven digits are enough for a figure."""
    if isinstance(value, float):
        return float(f"{value:.7g}")
    if isinstance(value, dict):
        return {key: rounded(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(entry) for entry in value]
    return value
