"""Artifacts on disk: layouts that other runtimes load, written in one step or not at all, and read back."""

from qcore.formats.base import Format, LinearShape, TensorSpec
from qcore.formats.select import FORMATS, choose_format

__all__ = ["FORMATS", "Format", "LinearShape", "TensorSpec", "choose_format"]
