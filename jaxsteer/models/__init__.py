"""Decoder-only transformers as pure functions: a config of features, one scanned block, and sites that can be steered.

Not here: what happens at a site (`jaxsteer.interventions`), losses and decoding, and reading weights (`jaxsteer.io`).
"""
