"""Artifacts on disk: layouts that other runtimes load, written in one step or not at all, and read back."""

from qcore.formats.artifact_writer import ArtifactWriter
from qcore.formats.base import Format, LayerShape, TensorSpec
from qcore.formats.manifest import Problem, read_record, require_verified, verify_artifact
from qcore.formats.reader import QuantizedReader
from qcore.formats.select import FORMATS, choose_format, detect

__all__ = [
    "FORMATS",
    "ArtifactWriter",
    "Format",
    "LayerShape",
    "Problem",
    "QuantizedReader",
    "TensorSpec",
    "choose_format",
    "detect",
    "read_record",
    "require_verified",
    "verify_artifact",
]
