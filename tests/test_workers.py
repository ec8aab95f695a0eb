import os
import time

import pytest

from lightning_crosslmm.errors import UserError
from lightning_crosslmm.workers import Worker, WorkerLostError, work_through


@pytest.fixture
def worker():
    worker = Worker(())
    yield worker
    worker.close()


def double(worker, number):
    return worker.call(sum, (number, number))


def test_a_worker_is_another_process_and_stays(worker):
    first = worker.call(os.getpid)
    assert first != os.getpid() and worker.call(os.getpid) == first


def test_what_hangs_is_ended_and_the_next_call_finds_another(worker):
    first, start_s = worker.call(os.getpid), time.monotonic()
    with pytest.raises(WorkerLostError, match=r"did not end within 0\.05 s"):
        worker.call(time.sleep, 60, timeout_s=0.05)
    assert time.monotonic() - start_s < 30 and worker.call(os.getpid) != first


def test_what_crashes_says_so(worker):
    with pytest.raises(WorkerLostError, match=r"crashed \(exit code -6\)"):
        worker.call(os.abort)
    assert worker.call(abs, -3) == 3


def test_errors_come_back(worker):
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        worker.call(divmod, 1, 0)
    with pytest.raises(UserError, match="is not opened"):
        from lightning_crosslmm.location import locate

        worker.call(locate, "pipe:cat")


def test_items_come_back_in_their_order_and_all_workers_take_part():
    assert list(work_through(double, range(20), 3)) == [2 * i for i in range(20)]
    assert list(work_through(double, [], 3)) == []
    assert len(set(work_through(lambda worker, _: worker.call(os.getpid), range(3), 1))) == 1
    with pytest.raises(UserError, match="workers must be at least 1, got 0"):
        list(work_through(double, [1], 0))


def test_who_stops_early_waits_for_nothing():
    def job(worker, seconds):
        return worker.call(time.sleep, seconds)

    start_s = time.monotonic()
    results = work_through(job, [0.0, 900.0, 900.0, 900.0], 2)
    next(results)
    results.close()
    assert time.monotonic() - start_s < 300  # of 900, on a machine however busy
