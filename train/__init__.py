"""The programs around jaxsteer: what reads data, writes run folders and talks to the console.

Run them as `jaxsteer COMMAND`, `python -m train COMMAND` or `python -m train.COMMAND`. Pure functions over models and
steering belong in `jaxsteer`, which never imports this package.
"""

import signal
import sys

if sys.argv[0] == "-m" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # `python -m train.COMMAND` is about to import JAX, which takes seconds: until the command handles Ctrl-C itself, it
    # ends the process quietly. An exception in an import is a traceback, or is swallowed there.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
