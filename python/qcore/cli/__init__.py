"""The command line: each command parses, calls the Python face, and prints.

Results go to standard output, everything else to standard error. `entry.py` turns what happened into an exit status.
"""

from qcore.cli.entry import main

__all__ = ["main"]
