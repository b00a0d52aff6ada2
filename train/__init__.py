"""The programs around jaxsteer: what reads data, writes run folders and talks to the console.

Run them as `jaxsteer COMMAND`, `python -m train COMMAND` or `python -m train.COMMAND`. Pure functions over models and
steering belong in `jaxsteer`, which never imports this package.
"""
