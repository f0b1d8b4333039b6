"""Ray Serve: a bundle answers over HTTP. `python -m serve CONFIG serve.bundle=PATH`."""

from serve.deploy import deploy

__all__ = ["deploy"]
