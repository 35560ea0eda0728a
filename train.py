"""`train.py` of the reference, for scripts that call it: the same as `vflora train`."""

import sys

from vflora.cli import entry

if __name__ == "__main__":
    sys.exit(entry("train")())
