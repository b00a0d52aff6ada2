"""jaxsteer measured against transformers and peft on the same work, in one run, turn by turn.

`rows` is the table of what is measured; each row makes a `contest.Contest` of our part (`training`, `decoding`,
`fresh`) and requests to the peer's process, tests/peers/bench_peer.py. `command` runs them, `page` writes the table.
"""
