"""What can only be measured on an accelerator, in stages that are saved row by row and go on where they stopped.

`python -m train.bench accelerator`; one module for each stage, listed in `stages`.
"""
