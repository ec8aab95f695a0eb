"""The position: where a run stands in its data, one small record that is equal on every rank."""

from dataclasses import asdict, dataclass, fields, replace
from typing import Any, NamedTuple, Self

from lightning_crosslmm.errors import UserError


class Place(NamedTuple):
    """Where a global batch begins: the chunk of the order that its first row is planned from, and that row in it."""

    chunk: int = 0
    row: int = 0


@dataclass(frozen=True)
class Position:
    """Where a run stands in its data: the same whatever the number of ranks and workers, while the batch stays.

    Args:
        seed: of the order.
        epoch: counted from 0.
        batch: global batches of this epoch that have been trained.
        chunk: chunk of the epoch's order from which the next global batch takes its first row.
        row: that row in the chunk.
        global_batch: rows per batch over all ranks.
        fingerprint: of the data.
        plan: the settings that rows depend on, as ``name=value`` joined by ", "; with another one, `chunk` and `row`
            would name other samples.
        version: of this record.
    """

    seed: int
    epoch: int
    batch: int
    chunk: int
    row: int
    global_batch: int
    fingerprint: str
    plan: str
    version: int = 2

    @property
    def place(self) -> Place:
        """Where the next global batch begins."""
        return Place(self.chunk, self.row)

    def at(self, batch: int, place: Place) -> Self:
        """Stand at another batch of the same epoch, which begins at this place."""
        return replace(self, batch=batch, chunk=place.chunk, row=place.row)

    def next_epoch(self) -> Self:
        """Stand at the beginning of the following epoch."""
        return replace(self, epoch=self.epoch + 1, batch=0, chunk=0, row=0)

    def to_dict(self) -> dict[str, int | str]:
        """Write the record with plain types, as a checkpoint that runs no code can hold them."""
        return asdict(self)

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> Self:
        """Read what ``to_dict`` wrote.

        Raises:
            UserError: a field is absent, unknown, of another type or negative, or the version is another.
        """
        names = {field.name: field.type for field in fields(cls)}
        if isinstance(record, dict) and record.get("version") not in (None, cls.version):
            raise UserError(
                f"data position in the checkpoint: its version is {record['version']}, this code reads {cls.version}; "
                "start a new run from its weights (init_from)"
            )
        if not isinstance(record, dict) or set(record) != set(names):
            raise UserError(
                f"data position in the checkpoint: expected the fields {sorted(names)}, got {record!r:.200}"
            )
        for name, kind in names.items():
            if type(record[name]) is not kind or (kind is int and name != "seed" and record[name] < 0):
                raise UserError(
                    f"data position in the checkpoint: '{name}' must be {kind.__name__}, got {record[name]!r}"
                )
        return cls(**record)

    def difference(self, other: "Position") -> str:
        """Say which setting makes two positions of the same epoch incomparable, as "data.NAME: then A, now B"; or "".

        The fingerprint is left to whoever knows the data.

        Args:
            other: what this run would begin with.
        """
        pairs = [("data.seed", self.seed, other.seed)]
        pairs += [("data.global_batch_size", self.global_batch, other.global_batch)]
        then, now = (dict(part.split("=", 1) for part in plan.split(", ")) for plan in (self.plan, other.plan))
        pairs += [(f"data.{name}", then.get(name), now.get(name)) for name in sorted(then | now)]
        return next((f"{name}: then {a}, now {b}" for name, a, b in pairs if a != b), "")
