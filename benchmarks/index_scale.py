"""How long the stream takes to start on a very large index, and what its workers' memory does from then on.

    python benchmarks/index_scale.py
    python benchmarks/index_scale.py --shards 1000 --samples 100 --batches 500 --dir /local/disk

Makes `--shards` shards of `--samples` samples each: tars and indexes are real and a file each, but every tar is one and
the same file under another name, so that ten million samples take some GB of indexes and no time. Samples are text:
a clip would tell nothing about the index. Rows are packed, which asks the index for every sample that is planned.

Prints the seconds until the shards are open, until the first batch is planned and until it has come from the workers,
then each worker's resident memory as batches go by. What a process reads of the index is kept up to 64 shards, so
memory rises until so many were seen and must be flat from there on; the last line compares the last quarter of the
batches with the one before.
"""

import argparse
import hashlib
import os
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout's root, wherever the user stands

import psutil
import torch

from data.loader import BatchLoader
from data.module import VideoDataModule
from lightning_crosslmm.conversation import Conversation, Message
from lightning_crosslmm.shard_files import ShardRecord, write_manifest
from lightning_crosslmm.shards import SampleInfo, ShardWriter
from lightning_crosslmm.video import FrameSampling


def write_shards(folder: Path, num_shards: int, num_samples: int) -> None:
    """Write one shard, and give it further names, each with an index of its own."""
    with ShardWriter(folder, samples_per_shard=num_samples) as writer:
        for number in range(num_samples):
            turns = (Message("user", f"What is {number}?"), Message("assistant", f"It is {number}."))
            writer.write(Conversation(f"s{number:06d}", turns, (), ("",)), {}, SampleInfo(0.0, 0, ()))
    first = folder / "shard-000000.tar"
    index, num_bytes, records = first.with_suffix(".index.json").read_bytes(), first.stat().st_size, []
    for number in range(num_shards):
        tar = folder / f"shard-{number:06d}.tar"
        own = index.replace(first.name.encode(), tar.name.encode(), 1)
        if number:
            os.link(first, tar)
            tar.with_suffix(".index.json").write_bytes(own)
        records.append(ShardRecord(tar.name, num_samples, num_bytes, hashlib.sha256(own).hexdigest()))
    write_manifest(folder, records, (), 0.0)


def module_of(folder: Path, num_workers: int, batch: int) -> VideoDataModule:
    """Describe the stream as a training would."""
    return VideoDataModule(
        sampling=FrameSampling("uniform", num_frames=1),
        image_size=16,
        tokenizer="byte",
        max_tokens=256,
        global_batch_size=batch,
        pack_tokens=256,
        train=str(folder),
        sample_timeout_s=60,
        num_workers=num_workers,
        prefetch_batches=4,
    )


def workers_mib(loader: BatchLoader) -> list[float]:
    """Resident memory of each worker of a loader that is under way, or of this process where it has none, in MiB."""
    workers = getattr(loader._loader._iterator, "_workers", [])
    pids = [worker.pid for worker in workers] or [os.getpid()]
    return [psutil.Process(pid).memory_info().rss / 2**20 for pid in pids]


def main() -> None:
    """Print times, then a row per stretch of batches."""
    parser = argparse.ArgumentParser(description="Measure the stream on a very large index.")
    parser.add_argument("--shards", type=int, default=10_000)
    parser.add_argument("--samples", type=int, default=1000, help="of each shard")
    parser.add_argument("--batches", type=int, default=4000)
    parser.add_argument("--batch", type=int, default=8, help="rows of a batch")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--dir", type=Path, help="where the files are made, and removed at the end; default: temporary")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=chosen.dir) as name:
        folder, start_s = Path(name) / "shards", time.perf_counter()
        write_shards(folder, chosen.shards, chosen.samples)
        print(f"{chosen.shards} shards, {chosen.shards * chosen.samples} samples, written in", end=" ")
        print(f"{time.perf_counter() - start_s:.0f} s", flush=True)
        datamodule, start_s = module_of(folder, chosen.workers, chosen.batch), time.perf_counter()
        datamodule.setup("fit")
        datamodule._planner = datamodule._planner.told(tokens_per_frame=1)
        print(f"open after            {time.perf_counter() - start_s:8.2f} s")
        loader = datamodule.train_dataloader()
        next(iter(datamodule._begin_epoch()))
        print(f"first batch planned   {time.perf_counter() - start_s:8.2f} s", flush=True)
        seen, table = 0, []
        for number, batch in zip(range(chosen.batches), loader, strict=False):
            if number == 0:
                print(f"first batch there     {time.perf_counter() - start_s:8.2f} s\n{'batch':>8}{'samples':>10}  MiB")
            seen += len(batch.keys)
            if number % max(1, chosen.batches // 20) == 0:
                table.append(workers_mib(loader))
                print(f"{number:>8}{seen:>10}  " + "  ".join(f"{mib:.0f}" for mib in table[-1]), flush=True)
        datamodule.teardown("fit")
    quarter = max(1, len(table) // 4)
    before, after = (
        max(max(row) for row in rows) for rows in (table[-2 * quarter : -quarter] or table, table[-quarter:])
    )
    print(f"most of a worker in the last quarter: {after:.0f} MiB, in the one before: {before:.0f} MiB")


if __name__ == "__main__":
    main()
