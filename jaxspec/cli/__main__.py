"""`python -m jaxspec.cli`."""

import sys

from jaxspec.cli import main

if __name__ == "__main__":
    sys.exit(main())
