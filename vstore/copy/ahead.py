"""An iterator that runs in a thread of its own, some items ahead of whoever takes them."""

import threading
from collections import deque
from collections.abc import Iterator
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Ahead(Generic[Item]):
    """Takes from `items` until it is `most` items ahead; an error comes where its item would have.

    `items` belong to the thread until the last one has been taken, or `close` has returned.
    """

    def __init__(self, items: Iterator[Item], most: int) -> None:
        self._items = items
        self._most = most
        self._ready: deque[Item] = deque()
        self._error: BaseException | None = None
        self._is_over = False
        self._is_closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[Item]:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._ready or self._is_over)
                if not self._ready:
                    break
                item = self._ready.popleft()
                self._changed.notify_all()
            yield item
        self._thread.join()
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Take no more. Waits for the item that is being made."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self._thread.join()

    def _run(self) -> None:
        try:
            for item in self._items:
                with self._changed:
                    self._ready.append(item)
                    self._changed.notify_all()
                    self._changed.wait_for(lambda: len(self._ready) < self._most or self._is_closed)
                    if self._is_closed:
                        return
        except BaseException as error:  # noqa: BLE001 - raised where the items are taken
            self._error = error
        finally:
            with self._changed:
                self._is_over = True
                self._changed.notify_all()
