"""Indexes for shards that others wrote: one beside every tar, and the manifest of their folder."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from lightning_crosslmm.conversation_members import TEXTS
from lightning_crosslmm.errors import UserError
from lightning_crosslmm.shard_build import index_tar
from lightning_crosslmm.shard_files import UNFINISHED, ShardRecord, read_index, write_manifest
from lightning_crosslmm.shard_index import ShardIndex, index_path
from lightning_crosslmm.shard_set import local_tars
from lightning_crosslmm.video_probe import probe_video
from lightning_crosslmm.workers import Worker, WorkerLostError, work_through


@dataclass(frozen=True)
class IndexReport:
    """What was indexed.

    Args:
        num_shards: shards with an index now, and how many samples they hold.
        num_samples: of all of them.
        num_kept: how many of the indexes were there before.
        skipped: messages, a damaged sample that was left out each.
        left_out: how many members of which extension are not read.
        failed: messages, a shard that has no index each.
    """

    num_shards: int
    num_samples: int
    num_kept: int
    skipped: tuple[str, ...]
    left_out: Mapping[str, int]
    failed: tuple[str, ...]


class _Indexed(NamedTuple):
    record: ShardRecord
    answer_kinds: frozenset[str]
    duration_s: float
    is_kept: bool = True
    skipped: tuple[str, ...] = ()
    left_out: Mapping[str, int] = {}


def index_shards(
    spec: str | Path, *, num_workers: int = 1, overwrite: bool = False, skip_bad: bool = False
) -> IndexReport:
    """Write an index beside every tar, and the manifest of a folder as soon as each of its tars has one.

    An index appears whole or not at all, so that a run that was interrupted goes on where it was: an index stays that
    fits its tar's size and is no older. A shard that cannot be indexed keeps no other from it.

    Args:
        spec: a folder, a tar or a brace pattern of tars, on this machine.
        num_workers: processes, a shard at a time each.
        overwrite: write indexes anew that are there.
        skip_bad: leave samples out whose text or video is damaged or missing, and list them; without it their shard
            gets no index.

    Raises:
        UserError: names spec or setting where nothing can be indexed.
    """
    paths = local_tars(spec)
    for folder in dict.fromkeys(path.parent for path in paths):
        if (folder / UNFINISHED).exists():
            raise UserError(f"{folder}: its writing did not finish ({UNFINISHED} is there); write it again")

    def job(worker: Worker, path: Path) -> _Indexed | str:
        try:
            return worker.call(_index, path, overwrite, skip_bad)
        except UserError as error:
            return str(error)
        except WorkerLostError as error:
            return f"{path}: reading it {error}"

    indexed: dict[Path, _Indexed] = {}
    failed, skipped, left_out = list[str](), list[str](), Counter[str]()
    for path, found in zip(paths, work_through(job, paths, num_workers, (__name__,)), strict=True):
        if isinstance(found, str):
            failed.append(found)
            continue
        indexed[path] = found
        skipped += found.skipped
        left_out.update(found.left_out)
    for folder in dict.fromkeys(path.parent for path in indexed):
        _write_manifest(folder, indexed)
    num_samples = sum(found.record.num_samples for found in indexed.values())
    num_kept = sum(found.is_kept for found in indexed.values())
    return IndexReport(len(indexed), num_samples, num_kept, tuple(skipped), left_out, tuple(failed))


def _index(path: Path, overwrite: bool, skip_bad: bool) -> _Indexed:
    kept = None if overwrite else _valid_index(path)
    if kept is not None:
        return _summary(kept)
    built = index_tar(path, probe_video, skip_bad)
    built.index.save(path)
    skipped = tuple(reason for _, reason in built.skipped)
    return _summary(built.index)._replace(is_kept=False, skipped=skipped, left_out=built.left_out)


def _valid_index(path: Path) -> ShardIndex | None:
    try:
        index = read_index(path)
    except UserError:
        return None
    is_older = index_path(path).stat().st_mtime_ns < path.stat().st_mtime_ns
    is_probed = all(entry.num_frames or set(entry.members) <= set(TEXTS) for entry in index.entries)
    return index if is_probed and not is_older else None


def _summary(index: ShardIndex) -> _Indexed:
    kinds = frozenset(kind for entry in index.entries for kind in entry.answer_kinds if kind)
    return _Indexed(ShardRecord.of(index), kinds, sum(entry.duration_s for entry in index.entries))


def _write_manifest(folder: Path, indexed: Mapping[Path, _Indexed]) -> None:
    paths = sorted(folder.glob("*.tar"))
    if all(path in indexed or index_path(path).exists() for path in paths):
        shards = [indexed[path] if path in indexed else _summary(read_index(path)) for path in paths]
        kinds = frozenset[str]().union(*(shard.answer_kinds for shard in shards))
        write_manifest(folder, [shard.record for shard in shards], kinds, sum(shard.duration_s for shard in shards))
