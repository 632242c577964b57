"""The real child of a worker, with engines that break. A test names it in place of the child's own module."""

from __future__ import annotations

import sys
from pathlib import Path

import cspdeploy.runtimes
from cspdeploy.check.worker_child import main

if __name__ == "__main__":
    cspdeploy.runtimes.__path__.append(str(Path(__file__).parent / "faulty_runtimes"))
    sys.exit(main(sys.argv[1:]))
