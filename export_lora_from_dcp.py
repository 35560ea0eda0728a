"""`python export_lora_from_dcp.py ...` is `vflora export ...`, for command lines that were written that way."""

import sys

from vflora.cli import entry

if __name__ == "__main__":
    sys.exit(entry("export")())
