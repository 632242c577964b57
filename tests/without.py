"""The first lines of a process in which packages are as if they were not installed."""

from __future__ import annotations

WITHOUT = """
import sys
from importlib.machinery import PathFinder

blocked = {blocked!r}

class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in blocked else super().find_spec(name, path, target)

sys.meta_path = [Without if finder is PathFinder else finder for finder in sys.meta_path]
for name in blocked:
    try:
        __import__(name)
    except ModuleNotFoundError:
        continue
    raise SystemExit(f"{{name}} is not blocked")
"""
"""The finder of installed packages does not know them: `WITHOUT.format(blocked=("torch",))` and more of a program.

It ends the process where one of them can be imported all the same.
"""
