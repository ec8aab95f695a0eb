"""The data of a split: one or several shard sets, in a row or mixed by weight, as one numbered list of shards."""

import hashlib
import json
import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from data.order import EpochOrder, MixedOrder, SampleRef, Share
from lightning_crosslmm.errors import UserError, nearest
from lightning_crosslmm.shards import SampleEntry, ShardSet, open_shards, prefetch
from lightning_crosslmm.storage import LOCAL, Storage

Spec = str | Path | Mapping[str, Any]
"""What names a shard set: a folder, tar, brace pattern or URL, or ``{shards: SPEC, weight: W}``."""


@dataclass(frozen=True)
class Mixture:
    """Opened shard sets; their shards are numbered through, set after set.

    Args:
        names: what each set was named by.
        sets: the sets.
        weights: of the sets; None puts them in a row, every sample once per epoch.
    """

    names: tuple[str, ...]
    sets: tuple[ShardSet, ...]
    weights: tuple[float, ...] | None = None

    @classmethod
    def open(cls, spec: Spec | Sequence[Spec], setting: str, storage: Storage = LOCAL, mixes: bool = True) -> Self:
        """Open one shard set, or a list of them.

        Args:
            spec: of the set, or a list.
            setting: what messages call it.
            storage: how shards at a URL are read.
            mixes: whether weights mean something; only training mixes, measuring reads every sample once.

        Raises:
            UserError: names the setting and what is wrong with it; or what opening its shards is refused for.
        """
        specs = [spec] if isinstance(spec, str | Path | Mapping) else list(spec)
        pairs = [_read_spec(one, setting) for one in specs]
        if not pairs:
            raise UserError(f"{setting}: is an empty list; name a folder of shards, a tar or a brace pattern")
        weights = [weight for _, weight in pairs if weight is not None]
        if weights and not mixes:
            raise UserError(
                f"{setting}: gives the weight {weights[0]}, but every sample is read once; leave weights out"
            )
        if len(weights) not in (0, len(pairs)):
            bare = next(name for name, weight in pairs if weight is None)
            raise UserError(f"{setting}: '{bare}' has no weight and others have; give each one, or none")
        mixture = cls(
            tuple(name for name, _ in pairs),
            tuple(open_shards(name, storage=storage) for name, _ in pairs),
            tuple(weights) if len(pairs) > 1 and weights else None,
        )
        (path, times), *_ = Counter(mixture.paths).most_common(1)
        if times > 1:
            raise UserError(
                f"{setting}: holds {path} {times} times; name each shard once; weights show a set more often"
            )
        return mixture

    @property
    def paths(self) -> tuple[Any, ...]:
        """Where each shard lies."""
        return tuple(path for shards in self.sets for path in shards.paths)

    @property
    def samples_per_shard(self) -> tuple[int, ...]:
        """How many samples each shard holds."""
        return tuple(count for shards in self.sets for count in shards.num_samples)

    @property
    def num_samples(self) -> int:
        """Samples of all sets: the length of an epoch."""
        return sum(self.samples_per_shard)

    @property
    def answer_kinds(self) -> frozenset[str]:
        """All question types that the sets name."""
        return frozenset(kind for shards in self.sets for kind in shards.answer_kinds)

    @property
    def fingerprint(self) -> str:
        """What identifies the data, in hex: of a single set its own, else over all sets and their weights."""
        if len(self.sets) == 1:
            return self.sets[0].fingerprint
        facts = [[shards.fingerprint for shards in self.sets], self.weights]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def order(self, seed: int, epoch: int, window_shards: int, shuffle: bool = True) -> Sequence[SampleRef]:
        """Order the samples of an epoch; arguments as for ``EpochOrder``, which it is where no weights are."""
        if not shuffle or self.weights is None:
            return EpochOrder(seed, epoch, self.fingerprint, self.samples_per_shard, window_shards, shuffle)
        weights = (Fraction(str(weight)) for weight in self.weights)
        shares = [
            Share(first, shards.num_samples, weight)
            for first, shards, weight in zip(self._firsts, self.sets, weights, strict=True)
        ]
        return MixedOrder(seed, epoch, self.fingerprint, shares, window_shards)

    def place(self, ref: SampleRef) -> tuple[ShardSet, int]:
        """Say which set a sample's shard belongs to, and its number there."""
        number = bisect_right(self._firsts, ref.shard) - 1
        return self.sets[number], ref.shard - self._firsts[number]

    def path(self, ref: SampleRef) -> Any:
        """Say where a sample's shard lies."""
        shards, shard = self.place(ref)
        return shards.paths[shard]

    def entry(self, ref: SampleRef) -> SampleEntry:
        """Look a sample up in its shard's index.

        Raises:
            UserError: names the index where it cannot be read or changed since the set was opened.
        """
        shards, shard = self.place(ref)
        return shards.index(shard).entries[ref.sample]

    def read(self, ref: SampleRef, entry: SampleEntry) -> dict[str, bytes]:
        """Read a sample's members; arguments and errors as for ``shards.read_sample``."""
        shards, shard = self.place(ref)
        return shards.read(shard, entry)

    def prefetch(self, refs: Iterable[SampleRef]) -> None:
        """Have the shards of samples fetched that lie in a store and are cached, those first that are named first."""
        prefetch(map(self.place, {ref.shard: ref for ref in refs}.values()))

    def check_cache(self, window_shards: int) -> None:
        """See whether the cache holds the shards that are read at a time; each would be fetched for each sample.

        Raises:
            UserError: names the setting, and what it must be at least.
        """
        windows = [shards.cached_bytes(window_shards) for shards in self.sets]
        storage, needed = self.sets[0].storage, sum(windows) if self.weights else max(windows)
        if needed > storage.cache_bytes:
            raise UserError(
                f"data.storage.cache_bytes: {storage.cache_bytes} do not hold the shards that are read at a time "
                f"(data.window_shards={window_shards}), which take up to {needed}; raise it to twice that, so that the "
                "next ones are fetched ahead, lower data.window_shards, or set data.storage.cache_dir=null"
            )

    @cached_property
    def _firsts(self) -> list[int]:
        firsts = [0]
        for shards in self.sets[:-1]:
            firsts.append(firsts[-1] + len(shards.paths))
        return firsts

    def record(self) -> dict[str, Any]:
        """List sets and shards with what tells them from others, for a later run to compare with."""
        return {
            "fingerprint": self.fingerprint,
            "sets": [
                {
                    "shards": name,
                    "weight": self.weights[number] if self.weights else None,
                    "records": [
                        [str(path), *facts] for path, (_, *facts) in zip(shards.paths, shards.records, strict=True)
                    ],
                }
                for number, (name, shards) in enumerate(zip(self.names, self.sets, strict=True))
            ],
        }


def _read_spec(spec: Any, setting: str) -> tuple[str, float | None]:
    if isinstance(spec, str | Path):
        return str(spec), None
    if not isinstance(spec, Mapping) or not isinstance(spec.get("shards"), str | Path):
        raise UserError(f"{setting}: a set is a text or {{shards: ..., weight: ...}}, got {spec!r:.200}")
    if unknown := next((key for key in spec if key not in ("shards", "weight")), None):
        raise UserError(f"{setting}: '{unknown}' is not read{nearest(str(unknown), ('shards', 'weight'))}")
    weight = spec.get("weight")
    if weight is not None and (
        isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf
    ):
        raise UserError(f"{setting}: the weight of '{spec['shards']}' must be a number above 0, got {weight!r}")
    return str(spec["shards"]), weight


def changes(then: Mapping[str, Any], now: Mapping[str, Any], limit: int = 3) -> list[str]:
    """Say what differs between two records of ``Mixture.record``: sets, weights, and shards by their file names.

    Args:
        then: the record of the run that is resumed.
        now: that of this run.
        limit: name at most so many shards of a kind of change.
    """
    said = []
    names = [{each["shards"]: each for each in record["sets"]} for record in (then, now)]
    for verb, one, other in (("removed", *names), ("added", *reversed(names))):
        said += [f"the set '{name}' was {verb}" for name in one if name not in other]
    for name in (name for name in names[0] if name in names[1]):
        before, after = names[0][name], names[1][name]
        if before["weight"] != after["weight"]:
            said.append(f"the weight of '{name}' was {before['weight']} and is {after['weight']}")
        old, new = ({Path(path).name: facts for path, *facts in each["records"]} for each in (before, after))
        kinds = {
            "removed": [shard for shard in old if shard not in new],
            "added": [shard for shard in new if shard not in old],
            "rewritten": [shard for shard in old if shard in new and old[shard] != new[shard]],
        }
        for verb, shards in kinds.items():
            if shards:
                more = ", ..." if len(shards) > limit else ""
                said.append(f"in '{name}' {len(shards)} shard(s) {verb}: {', '.join(shards[:limit])}{more}")
    return said or ["the order of its sets or shards"]
