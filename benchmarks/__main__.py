"""`python -m benchmarks NAME [options]`: runs benchmarks/NAME.py; dashes are as good."""

from __future__ import annotations

import importlib
import pkgutil
import sys

import benchmarks


def main(argv: list[str]) -> int:
    """Exit code of the named benchmark; 2 for a name that is not one."""
    names = sorted(
        module.name
        for module in pkgutil.iter_modules(benchmarks.__path__)
        if not module.name.startswith("_")
    )
    if not argv or argv[0].replace("-", "_") not in names:
        given = repr(argv[0]) if argv else "none"
        print(f"benchmarks: wants one of {', '.join(names)}, got {given}", file=sys.stderr)
        return 2
    module = importlib.import_module(f"benchmarks.{argv[0].replace('-', '_')}")
    return int(module.main(argv[1:]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
