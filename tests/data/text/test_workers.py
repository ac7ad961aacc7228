"""Worker processes: Ctrl-C is left to the process that started them, from their first moment."""

from __future__ import annotations

import signal

from megarewarm.data.text.preprocess import workers


def blocked(_: int) -> bool:
    return signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_a_worker_never_sees_ctrl_c() -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    with workers.local(2, 2) as pool:
        assert list(workers.in_order(pool, blocked, range(4))) == [True] * 4
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before
