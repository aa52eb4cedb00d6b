"""Names and places by Presidio, an extra that is loaded when it is asked for."""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Iterator
from typing import Any

from qcore.errors import ExtraMissingError, escaped

# What Presidio calls them -> the kind of a finding.
ENTITIES = {"PERSON": "person", "LOCATION": "place"}
MIN_SCORE = 0.5
_REMEDY = (
    'Install it with: pip install "qcore-quant[pii]" (400 MB) and python -m spacy download {model}, '
    "or list the names in a file (--pii-list)."
)


class EntityFinder:
    """Spans of persons and places in a text.

    Args:
        model: the spaCy model that Presidio reads with, such as "en_core_web_lg". It must be
            installed: nothing is downloaded.

    Raises:
        ExtraMissingError: EXTRA_MISSING without Presidio or without the model.
    """

    def __init__(self, model: str) -> None:
        remedy = _REMEDY.format(model=escaped(model, 80))
        try:
            from presidio_analyzer import AnalyzerEngine
            from presidio_analyzer.nlp_engine import NlpEngineProvider
        except ImportError:
            raise ExtraMissingError(
                "Names are found by Presidio, which is not installed.", remedy=remedy
            ) from None
        # Presidio downloads a model that is missing; qcore uses no network.
        if not model.isidentifier() or importlib.util.find_spec(model) is None:
            raise ExtraMissingError(
                f"The spaCy model {escaped(model, 80)} is not installed.", remedy=remedy
            )
        self._language = model.split("_")[0]
        settings = {
            "nlp_engine_name": "spacy",
            "models": [{"lang_code": self._language, "model_name": model}],
        }
        engine = NlpEngineProvider(nlp_configuration=settings).create_engine()
        self._analyzer: Any = AnalyzerEngine(
            nlp_engine=engine, supported_languages=[self._language]
        )

    def __call__(
        self, text: str, before: str, rejected: Counter[str]
    ) -> Iterator[tuple[int, int, str]]:
        """Start, end and kind of every name."""
        found = self._analyzer.analyze(
            text=text, language=self._language, entities=list(ENTITIES), score_threshold=MIN_SCORE
        )
        for entity in found:
            yield entity.start, entity.end, ENTITIES[entity.entity_type]
