"""From conversations to tokens: read, replace personal data, render, tokenize, choose."""

from qcore.data.anonymize import Anonymizer
from qcore.data.calibration import Calibration
from qcore.data.card import CalibrationCard
from qcore.data.detect import Detection, detect
from qcore.data.prepare import PreparedData, prepare
from qcore.data.select import Selection, select
from qcore.data.template import ChatTemplate
from qcore.data.tokens import Sample

__all__ = [
    "Anonymizer",
    "Calibration",
    "CalibrationCard",
    "ChatTemplate",
    "Detection",
    "PreparedData",
    "Sample",
    "Selection",
    "detect",
    "prepare",
    "select",
]
