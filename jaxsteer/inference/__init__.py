"""A model in use: decoding (one batch, or rows kept full) and the likelihood of given continuations.

Training and its losses belong elsewhere; nothing here opens files or knows a tokenizer.
"""
