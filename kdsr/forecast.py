"""What a bulk run would come to, before it is begun. Knows no Ray."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import PurePosixPath

from kdsr import codecs
from kdsr.config import UpscaleConfig
from kdsr.engine import Engine
from kdsr.errors import DataError
from kdsr.manifest import Task
from kdsr.models import SrModel
from kdsr.objects import Goal, goal_of
from kdsr.store import open_store


@dataclass(frozen=True)
class Forecast:
    """What a run would do; estimated from the headers of some inputs and a short measurement."""

    images: dict[str, int]
    """By ending of the name."""
    input_bytes: int
    probed: int
    """Headers that were looked at."""
    unreadable: int
    """Of them."""
    output_megapixels: float
    seconds: float
    output_bytes: int

    def sentence(self) -> str:
        """For the person who asked."""
        kinds = ", ".join(f"{count} {ending or 'without ending'}" for ending, count in self.images.items())
        return (
            f"{sum(self.images.values())} inputs ({kinds}), {self.input_bytes / 1e6:.1f} MB; about "
            f"{self.output_megapixels:.1f} Mpx and {self.output_bytes / 1e6:.0f} MB of results in "
            f"{self.seconds:.0f} s on a machine like this one, from {self.probed} headers of which "
            f"{self.unreadable} would fail; nothing was written"
        )


PROBED_IMAGES = 100
PROBE_BYTES = 2**18
BYTES_PER_PIXEL = {"jpeg": 0.35, "webp": 0.25, "avif": 0.2, "gif": 0.7, "png": 1.1, "tiff": 1.6}
"""Of results, as photographs come out of the default settings; 3 for other formats."""


def forecast(config: UpscaleConfig, tasks: Iterable[Task], model: SrModel) -> Forecast:
    """What doing all `tasks` would come to on this machine. Writes nothing.

    Headers are read of the first inputs, and the rest is taken to be alike.
    """
    source = open_store(config.input, config.store)
    images: Counter[str] = Counter()
    goals: list[Goal] = []
    input_bytes = unreadable = 0
    for task in tasks:
        images[PurePosixPath(task.key).suffix.lower()] += 1
        input_bytes += task.size
        if len(goals) + unreadable < PROBED_IMAGES:
            try:
                header = codecs.probe(source.get(task.key, length=max(PROBE_BYTES, min(task.size, 2**24))))
                goals.append(goal_of(header, config, net_scale=model.spec.scale))
            except DataError:
                unreadable += 1
    probed = len(goals) + unreadable
    share = sum(images.values()) / max(probed, 1)
    pixels = share * sum(goal.pixels for goal in goals)
    speed = Engine(model, precision=config.precision).megapixels_per_second()
    return Forecast(
        dict(images),
        input_bytes,
        probed,
        unreadable,
        output_megapixels=pixels / 1e6,
        seconds=pixels / 1e6 / speed,
        output_bytes=round(share * sum(goal.pixels * BYTES_PER_PIXEL.get(goal.format, 3) for goal in goals)),
    )
