"""`python -m jforge`: the command line."""

import sys

from jforge.cli import main

if __name__ == "__main__":
    sys.exit(main())
