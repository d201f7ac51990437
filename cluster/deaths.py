"""Who counts the deaths of workers. Alone in its module, so that its process starts soon and stays small."""

from collections import Counter


class DeathCount:
    """Which images were begun and not ended: those that a dying worker had in hand. One actor for all."""

    def __init__(self) -> None:
        self._begun: Counter[str] = Counter()

    def begin_all(self, ids: list[str]) -> list[int]:
        """How often each was begun without an end before; marks all as begun when none ever was."""
        earlier = [self._begun[id_] for id_ in ids]
        if not any(earlier):
            self._begun.update(ids)
        return earlier

    def begin(self, id_: str) -> None:
        """Mark one image as begun once more."""
        self._begun[id_] += 1

    def end(self, ids: list[str]) -> None:
        """Forget images that were answered for."""
        for id_ in ids:
            self._begun.pop(id_, None)
