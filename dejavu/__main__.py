"""`python -m dejavu` is the `dejavu` command."""

import sys

from dejavu.cli import main

if __name__ == "__main__":
    sys.exit(main())
