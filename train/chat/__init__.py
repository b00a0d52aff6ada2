"""Talk to a steered model in the terminal: `jaxsteer chat`."""
