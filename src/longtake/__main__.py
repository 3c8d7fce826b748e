"""``python -m longtake``: the same as the ``longtake`` command."""

import sys

from longtake.cli import main

if __name__ == "__main__":
    sys.exit(main())
