"""
Compile every module that Python can import, so that no Synapse process does it at start.

Byte code goes beside the modules, or below PYTHONPYCACHEPREFIX where that is set. The file
named as argument is written when all is done: without it, the byte code is not complete.
"""

import compileall
import os
import re
import site
import sys
import sysconfig
from py_compile import PycInvalidationMode

# Half of all there is, and of no use to a server.
NEVER_IMPORTED = r"/(tests?|idlelib|lib2to3|ensurepip|pip|phonenumbers/(geodata|carrierdata))/"


def main(marker=None):
    paths = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    for path in sorted(paths.union(site.getsitepackages())):
        if os.path.isdir(path):
            # Some packages ship files that are broken on purpose: what cannot be compiled
            # cannot be imported either, so it is nothing to fail for.
            compileall.compile_dir(
                path,
                quiet=2,
                workers=0,
                rx=re.compile(NEVER_IMPORTED),
                invalidation_mode=PycInvalidationMode.TIMESTAMP,
            )
    if marker:
        os.sync()
        with open(marker, "w", encoding="utf-8") as file:
            file.write(sys.version)


if __name__ == "__main__":
    main(*sys.argv[1:])
