"""Work over threads and processes: every task once, in order, by whoever is there."""

import os

from cqlora.data.workers import THREAD_TASKS, Workers


def name_process(task: int) -> tuple[int, int]:
    return task, os.getpid()


def test_processes_take_over_while_tasks_are_left_and_results_keep_their_order():
    with Workers(2) as workers:
        asked, done, at = iter(range(200_000)), [], set()
        for task, (same, process) in workers.map_in_order(name_process, asked):
            assert task == same == len(done)
            done.append(task)
            at.add(process)
            if len(at) == 3 and len(done) > 5000:
                break
        again = [process for _, (_, process) in workers.map_in_order(name_process, range(4))]
    assert os.getpid() in at
    assert os.getpid() not in again


def test_little_work_starts_no_process():
    with Workers(2) as workers:
        assert {process for _, (_, process) in workers.map_in_order(name_process, range(THREAD_TASKS))} == {os.getpid()}
        assert workers._pool is None
