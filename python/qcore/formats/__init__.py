"""Artifacts on disk: layouts that other runtimes load, written in one step or not at all, and read back."""

from qcore.formats.artifact_writer import ArtifactWriter, planned_bytes
from qcore.formats.base import FUSED_NAMES, Format, LayerShape, TensorSpec
from qcore.formats.manifest import Problem, read_record, require_verified, verify_artifact
from qcore.formats.reader import QuantizedReader
from qcore.formats.select import FORMATS, choose_format, detect
from qcore.formats.shard_file import tensor_bytes

__all__ = [
    "FORMATS",
    "FUSED_NAMES",
    "ArtifactWriter",
    "Format",
    "LayerShape",
    "Problem",
    "QuantizedReader",
    "TensorSpec",
    "choose_format",
    "detect",
    "planned_bytes",
    "read_record",
    "require_verified",
    "tensor_bytes",
    "verify_artifact",
]
