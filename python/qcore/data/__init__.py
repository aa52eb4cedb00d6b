"""From conversations to tokens: read, render, tokenize, choose."""

from qcore.data.calibration import Calibration
from qcore.data.card import CalibrationCard
from qcore.data.template import ChatTemplate
from qcore.data.tokens import Sample

__all__ = ["Calibration", "CalibrationCard", "ChatTemplate", "Sample"]
