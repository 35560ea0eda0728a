"""`python generate.py ...` is `vflora generate ...`, for command lines that were written that way."""

import sys

from vflora.cli import main

if __name__ == "__main__":
    sys.exit(main(["generate", *sys.argv[1:]]))
