"""The cross-attention backend that was fastest, by device, dtype and channels per head: what `auto` takes.

Written by `python benchmarks/attention.py --write`, on each device; what is not here goes by `choose_backend`'s rule.
"""

FASTEST: dict[tuple[str, str, int], str] = {}
