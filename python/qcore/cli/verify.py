"""qcore verify: does an artifact still hold what its record says?"""

from __future__ import annotations

from pathlib import Path

import click

from qcore.cli.shared import Shared, shared_options


@click.command(
    "verify",
    short_help="Does an artifact still hold what its record says?",
    epilog="Example: qcore verify ./support-8b-w4 --full",
)
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--full", is_flag=True, help="Also decode every tensor with a second reader.")
@shared_options()
def command(shared: Shared, /, path: Path, full: bool) -> None:
    """Compare every file of the artifact at PATH with the hashes in its record."""
    if shared.print_python:
        text = f"import qcore as qc\n\nqc.open({str(path)!r}).verify(full={full})"
        shared.result({"python": text}, text.splitlines())
        return
    import qcore

    qcore.open(path).verify(full=full)
    shared.result({"path": str(path), "verified": True}, [f"verified     {path}"])
