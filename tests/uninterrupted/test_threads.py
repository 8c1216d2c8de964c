"""The end of another thread's work, as those see it who wait for it."""

from __future__ import annotations

import threading
import time

from dist_ema.uninterrupted.threads import End


def test_all_who_wait_for_an_end_go_on_when_it_comes() -> None:
    """The first one to go on kept the lock, and the others waited their whole time."""
    end = End()
    waited: list[float] = []

    def wait() -> None:
        began = time.monotonic()
        assert end.comes_within(20.0)
        waited.append(time.monotonic() - began)

    threads = [threading.Thread(target=wait) for _ in range(3)]
    for thread in threads:
        thread.start()
    time.sleep(0.05)
    end.come_of(lambda: None)
    for thread in threads:
        thread.join()
    assert len(waited) == 3 and max(waited) < 10.0
