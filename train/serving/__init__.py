"""A base model and its adapters kept ready for many clients at once; HTTP, terminal and page are built on it.

`models` says what can be asked for, `prompts` turns requests into tokens, `engine` owns the decoder on a thread of its
own, `streams` carries its events into asyncio, `text` turns them into text, and `effects` compares a steered model
with its base token by token.
"""
