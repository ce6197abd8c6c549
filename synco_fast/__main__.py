"""``python -m synco_fast`` is ``synco-fast``."""

from synco_fast.cli import main

raise SystemExit(main())
