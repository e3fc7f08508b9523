"""``python -m masq`` is ``masq``."""

import sys

from masq.cli import main

if __name__ == "__main__":
    sys.exit(main())
