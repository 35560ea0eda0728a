"""The same as `vflora train-head`, under the name that `accelerate launch` and older notes use."""

import sys

from vflora.cli import entry

if __name__ == "__main__":
    sys.exit(entry("train-head")())
