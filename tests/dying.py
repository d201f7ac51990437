"""A store as a process sees it that is killed: nothing of what it does afterwards arrives."""

from typing import Any

from kdsr.errors import StoreError


class Dying:
    """A store that does `after` writes and deletions, and none from then on; reads are as ever."""

    def __init__(self, store: Any, *, after: int) -> None:
        self._store, self._left = store, [after]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def child(self, prefix: str) -> "Dying":
        """A folder of it, which dies with it."""
        twin = Dying(self._store.child(prefix), after=0)
        twin._left = self._left
        return twin

    def put(self, key: str, data: bytes) -> Any:
        """Write, or die before."""
        self._live(f"write {key}")
        return self._store.put(key, data)

    def delete(self, key: str) -> None:
        """Delete, or die before."""
        self._live(f"delete {key}")
        self._store.delete(key)

    def _live(self, what: str) -> None:
        if self._left[0] == 0:
            raise StoreError(f"died before it could {what}")
        self._left[0] -= 1
