"""`python -m jvgen.cli`."""

import sys

from jvgen.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
