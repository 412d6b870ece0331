"""Fails where an object for one instruction set defines a symbol that a linker could share with other units,
or code that runs when the module is loaded.

An inline function or template with external linkage is a weak symbol: the linker keeps one copy of it,
perhaps the AVX-512 one, and every other unit then calls that. `python check_symbols.py NM OBJECT...` says so
and exits with 1; the only symbols allowed are the kernel tables `gossamer_*`. A static initialiser would
run AVX-512 code before anybody has asked the processor.
"""

from __future__ import annotations

import subprocess
import sys


def shared_symbols(nm: str, objects: list[str]) -> list[str]:
    """``object: symbol`` for every symbol that is neither local nor a kernel table; and initialisers."""
    found = []
    for path in objects:
        listing = subprocess.run([nm, "-P", path], check=True, capture_output=True, text=True).stdout
        for line in listing.splitlines():
            name, kind = line.split()[:2]
            initialiser = "_GLOBAL__sub_I" in name or "__cxx_global_var_init" in name
            if kind in "Uwv" or (kind.islower() and kind != "u" and not initialiser):
                continue  # defined elsewhere, or local
            if not name.startswith("gossamer_") or kind in "VWu":
                found.append(f"{path}: {name} ({kind})")
    return found


if __name__ == "__main__":
    shared = shared_symbols(sys.argv[1], sys.argv[2:])
    for line in shared:
        print(f"not allowed in a unit of one instruction set: {line}", file=sys.stderr)
    sys.exit(1 if shared else 0)
