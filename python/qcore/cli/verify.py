"""qcore verify: does an artifact still hold what its record says?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from qcore.cli.shared import Shared, python_call, shared_options
from qcore.errors import FormatError

if TYPE_CHECKING:
    from qcore.model import Model


@click.command(
    "verify",
    short_help="Does an artifact still hold what its record says?",
    epilog="Example: qcore verify ./support-8b-w4 --full",
)
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--full", is_flag=True, help="Also decode every layer with a second reader.")
@shared_options()
def command(shared: Shared, /, path: Path, full: bool) -> None:
    """Compare every file of the artifact at PATH with the hashes in its record."""
    if shared.print_python:
        call = python_call("m.verify", [], {"full": full or None})
        text = f"import qcore as qc\n\nm = qc.open({str(path)!r})\n{call}"
        shared.result({"python": text}, text.splitlines())
        return
    import qcore

    model = qcore.open(path)
    model.verify(full=full)
    layers = compare_readers(model) if full else 0
    digest = getattr(model, "digest", None)
    told = [f"verified     {path}" + (f"   {digest}" if digest else "   (no record: values only)")]
    if layers:
        told.append(f"layers       {layers} decoded twice, equal")
    data = {"path": str(path), "verified": True, "digest": digest, "layers_decoded": layers}
    shared.result(data, told)


def compare_readers(model: Model) -> int:
    """Decodes each quantized layer of an artifact of ours with both readers; returns how many.

    Raises:
        FormatError: VERIFY_FAILED, the first layer that differs.
    """
    from qcore.formats import second_reader
    from qcore.model import Artifact

    if not isinstance(model, Artifact) or not model.record:
        return 0
    import numpy as np

    tensors = second_reader.read_folder(model.path)
    config = model.config["quantization_config"]
    names = sorted(model.quantized_layers)
    for name in names:
        layer = model.quantized(name)
        codes, scales, zeros = second_reader.decode(config, tensors, name)
        if not (
            np.array_equal(layer.codes, codes)
            and np.array_equal(layer.scales, scales)
            and np.array_equal(layer.zeros, zeros)
        ):
            raise FormatError(
                "Two readers decode this layer differently.",
                code="VERIFY_FAILED",
                where=name,
                remedy="Quantize again, and report it if it comes back.",
            )
    return len(names)
