"""The whole road on a made-up shop: `python -m demo`."""
