"""Programs around jaxsteer: train, evaluate, generate, inspect, benchmark. Run as `python -m train.<verb>`."""
