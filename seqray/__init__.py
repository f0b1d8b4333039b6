"""seqray: sequential recommenders on Ray, from a shop's event log to recommendations over HTTP.

The library knows PyTorch, pydantic and Arrow, and never imports Ray; the programs `train`, `tune` and `serve` do.
"""

__version__ = "0.1.0"
