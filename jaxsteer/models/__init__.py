"""Decoder-only transformers as pure functions: features as data, one scanned block, sites that can be steered."""
