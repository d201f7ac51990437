"""Numbers of a training run for Prometheus, through the metrics port of each Ray node.

Made from what a run tells of itself; measures nothing. Each has the tags `run` and `rank`.
"""

from collections.abc import Mapping

from ray.util.metrics import Counter, Gauge

from kdsr.training import Progress, RunConfig, Worker

TAGS = ("run", "rank")
NOT_LOSSES = {
    *("learning_rate", "gradient_norm", "patches_per_second", "waiting_share"),
    *("heldout_psnr_y", "train_psnr_y"),
}


class RunMetrics:
    """What one worker of a run has done so far."""

    def __init__(self, config: RunConfig, worker: Worker, *, done: int) -> None:
        """`done` are the steps of earlier starts."""
        self._tags = {"run": config.name, "rank": str(worker.rank)}
        self._batch_size, self._world_size = config.batch_size, worker.world_size
        self._done = self._timed = done
        self._step = self._gauge("kdsr_train_step", "Steps done, those of earlier starts too")
        self._loss = self._gauge("kdsr_train_loss", "Loss, and each term with its weight", "term")
        self._psnr = self._gauge("kdsr_train_psnr_y_db", "PSNR-Y of the mean network", "images")
        self._rate = self._gauge("kdsr_train_learning_rate", "Of the optimizer")
        self._norm = self._gauge("kdsr_train_gradient_norm", "Mean since the last report")
        self._steps = self._counter("kdsr_train_steps", "Steps done by this start")
        self._patches = self._counter("kdsr_train_patches", "Patches that this worker trained on")
        self._seconds = self._counter("kdsr_train_seconds", "Seconds of the steps, waiting included")
        self._waiting = self._counter("kdsr_train_waiting_seconds", "Seconds that steps waited for data")
        self._saves = self._counter("kdsr_train_checkpoints", "Checkpoints written")
        self._save_seconds = self._counter("kdsr_train_checkpoint_seconds", "Seconds of writing them")
        self._save_bytes = self._counter("kdsr_train_checkpoint_bytes", "Bytes of them")

    def observe(self, progress: Progress) -> None:
        """Take over what the run tells."""
        metrics = progress.metrics
        self._count(progress.step)
        if "patches_per_second" in metrics:
            self._time(progress.step, metrics)
        self._step.set(progress.step)
        self._show(metrics)
        for save in progress.saves:
            self._saves.inc()
            self._save_seconds.inc(save.seconds)
            self._save_bytes.inc(save.num_bytes)

    def _show(self, metrics: Mapping[str, float]) -> None:
        """What has a last value."""
        for gauge, name in ((self._rate, "learning_rate"), (self._norm, "gradient_norm")):
            if name in metrics:
                gauge.set(metrics[name])
        for images in ("heldout", "train"):
            if f"{images}_psnr_y" in metrics:
                self._psnr.set(metrics[f"{images}_psnr_y"], {"images": images})
        # What has a slash is no loss: a weight that the balance found.
        for name in metrics.keys() - NOT_LOSSES:
            if "/" not in name:
                self._loss.set(metrics[name], {"term": name})

    def _count(self, step: int) -> None:
        if step > self._done:
            self._steps.inc(step - self._done)
            self._patches.inc((step - self._done) * self._batch_size / self._world_size)
        self._done = step

    def _time(self, step: int, metrics: Mapping[str, float]) -> None:
        """Speed is told where a run logs, and is that of all steps since it last did."""
        seconds = (step - self._timed) * self._batch_size / metrics["patches_per_second"]
        self._timed = step
        for counter, value in ((self._seconds, seconds), (self._waiting, seconds * metrics["waiting_share"])):
            if value > 0:
                counter.inc(value)

    def _gauge(self, name: str, description: str, *tags: str) -> Gauge:
        gauge = Gauge(name, description, (*TAGS, *tags))
        gauge.set_default_tags(self._tags)
        return gauge

    def _counter(self, name: str, description: str) -> Counter:
        counter = Counter(name, description, TAGS)
        counter.set_default_tags(self._tags)
        return counter
