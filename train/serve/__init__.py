"""An endpoint that speaks OpenAI's protocol: `python -m train.serve`."""
