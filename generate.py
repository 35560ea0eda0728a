"""`python generate.py ...` is `vflora generate ...`, for command lines that were written that way."""

import sys

from vflora.cli import entry

if __name__ == "__main__":
    sys.exit(entry("generate")())
