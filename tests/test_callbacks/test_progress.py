import io

from rich.console import Console

from callbacks.progress import TrainingProgress
from callbacks.throughput import Throughput


def test_columns_appear_as_they_are_known(make_trainer, tiny, batches) -> None:
    bar = TrainingProgress()
    seen: list[dict[str, str]] = []
    collect = bar._update_metrics
    bar._update_metrics = lambda *arguments: (seen.append(bar.get_metrics(*arguments)), collect(*arguments))
    make_trainer(Throughput(), bar, enable_progress_bar=True, limit_val_batches=1).fit(tiny(), batches(), batches(1))
    assert set(seen[0]) == {"loss", "accuracy"}
    assert set(seen[-1]) == {"loss", "accuracy", "val accuracy", "clips/s", "waiting"}
    assert seen[-1]["val accuracy"] == "0.750" and seen[-1]["accuracy"] == "0.500" and seen[-1]["waiting"].endswith("%")


def test_the_bar_shows_them(make_trainer, tiny, batches) -> None:
    screen = io.StringIO()
    bar = TrainingProgress(console_kwargs={"file": screen, "force_terminal": True, "width": 200})
    assert Console  # rich is what draws
    make_trainer(Throughput(), bar, enable_progress_bar=True, limit_val_batches=1).fit(tiny(), batches(), batches(1))
    for words in ("loss:", "val accuracy: 0.750", "clips/s:", "waiting:"):
        assert words in screen.getvalue()
