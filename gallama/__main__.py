"""`python -m gallama` is the command `gallama`."""

import sys

from gallama.cli import main

if __name__ == "__main__":
    sys.exit(main())
