"""The training step, as a generator: it trains and hands over reports; the caller logs, validates and saves.

Knows neither where data comes from nor what is distilled, and no cluster.
"""

import copy
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

import torch
import torch.distributed
from torch import Tensor, nn

from kdsr.config import OptimizerConfig
from kdsr.errors import NonFiniteLoss
from kdsr.memory import gathered, is_sharded, parted, parted_optimizer, whole
from kdsr.models import SrModel, build_model
from kdsr.objectives import Losses
from kdsr.objectives.step import gradient_norm
from kdsr.optimizers import build_optimizer
from kdsr.pairs import Cursor, PairBatch, mixed_seed

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepReport:
    """What one step did."""

    step: int
    """Steps done, this one included."""
    losses: dict[str, float]
    """Weighted value of each term."""
    learning_rate: float
    gradient_norm: float
    num_patches: int
    """Of this worker."""
    seconds: float
    """Of the whole step, waiting included."""
    waiting_seconds: float
    """Until the batch was there."""
    details: dict[str, float] = field(default_factory=dict)
    """What terms tell beside their values: weights really used, bounds."""

    @property
    def loss(self) -> float:
        """What was minimised."""
        return sum(self.losses.values())


@dataclass
class TrainState:
    """Where a run is: everything that a checkpoint must bring back."""

    model: SrModel
    """The network as it is trained, not wrapped."""
    optimizer: torch.optim.Optimizer
    ema: SrModel
    config: OptimizerConfig
    num_steps: int
    auxiliary: nn.Module | None = None
    """What is trained beside the network and never exported: projections, critics."""
    step: int = 0
    cursor: Cursor = field(default_factory=Cursor)

    def train_too(self, auxiliary: nn.Module) -> None:
        """Train the parameters of `auxiliary` with those of the network, and save its state with theirs.

        They never decay.
        """
        if parameters := _learning(auxiliary):
            self.optimizer.add_param_group({"params": parameters})
        self.auxiliary = auxiliary

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values only, so that it loads without running code.

        The same for any number of workers: where parameters are in parts, all workers must ask together, and
        the first one gets the whole.
        """
        state = {
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict(),
            "auxiliary": {} if self.auxiliary is None else self.auxiliary.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "cursor": list(self.cursor),
        }
        return gathered(state) if is_sharded(self.model) else state

    def mean(self) -> SrModel | None:
        """The mean network; where it is in parts, all workers must ask together, and the first gets it."""
        if not is_sharded(self.ema):
            return self.ema
        weights = gathered(self.ema.state_dict())
        if torch.distributed.get_rank() > 0:
            return None
        mean = build_model(self.ema.spec)
        mean.load_state_dict(weights)
        return mean.eval()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state`. Without a position in this order of the data, its first epoch begins."""
        for network, weights in ((self.model, state["model"]), (self.ema, state["ema"])):
            network.load_state_dict(parted(weights, network.state_dict()))
        if self.auxiliary is not None:
            self.auxiliary.load_state_dict(state.get("auxiliary", {}))
        self.optimizer.load_state_dict(parted_optimizer(state["optimizer"], self.optimizer))
        self.step = state["step"]
        self.cursor = _cursor(state["cursor"])


def _cursor(saved: Sequence[int]) -> Cursor:
    if len(saved) == len(Cursor._fields):
        return Cursor(*saved)
    log.warning(
        "the checkpoint counts its data in windows, in another order than today's: the epoch that it was in "
        "ends here, and the run goes on with a new one"
    )
    return Cursor()


def new_state(
    model: SrModel,
    config: OptimizerConfig,
    *,
    num_steps: int,
    place: Callable[[nn.Module], object] = lambda network: network,
) -> TrainState:
    """A run that has not begun.

    Parameters that ask for no gradient stay what they are. `place` brings a network, the mean one too, to
    where it is trained.
    """
    ema = copy.deepcopy(model).eval()
    for network in (model, ema):
        place(network)
    return TrainState(model, build_optimizer(model, config), ema, config, num_steps)


def fit(
    state: TrainState,
    objective: Callable[[PairBatch], Losses],
    batches: Iterator[tuple[PairBatch, Cursor]],
    *,
    until_step: int,
    seed: int = 0,
    autocast: torch.dtype | None = None,
    after_step: Callable[[], dict[str, float]] = dict,
    micro_batch: int | None = None,
    apart: Callable[[], AbstractContextManager[None]] = nullcontext,
    share: Callable[[Sequence[nn.Parameter]], None] | None = None,
) -> Iterator[StepReport]:
    """Train until `until_step`, one report a step. `state` is current whenever a report is handed over.

    What a step draws from torch's generators follows from `seed` and its number alone, so that a run that
    goes on draws what it would have drawn; give each worker a `seed` of its own.
    `autocast` is the type of the forward pass; None leaves it in float32. `after_step` is called when the
    weights have moved, and what it returns is reported. A batch of more than `micro_batch` patches passes in
    near-equal parts whose gradients add up to those of the whole, but for what a term draws, and what it
    compares over a batch; all but the last part pass within `apart`, where workers need not share gradients.
    With `share` the last one does too, and `share` makes the gradients those of all workers: for losses that
    do not reach every parameter, each of which a data-parallel network waits for.
    Raises NonFiniteLoss, before the weights are touched, when a term or a gradient is NaN or infinite, and
    when `after_step` does, before those that it moves are, with its words in the same sentence.
    """
    parameters = _learning(state.model)
    beside = [] if state.auxiliary is None else _learning(state.auxiliary)
    while state.step < until_step:
        begin = time.perf_counter()
        torch.manual_seed(mixed_seed(seed, state.step))
        pair, cursor = next(batches)
        arrived = time.perf_counter()
        pair = replace(pair, progress=state.step / state.num_steps)
        learning_rate = _set_learning_rate(state)
        values: dict[str, float] = {}
        parts = pair.parts(micro_batch)
        for number, part in enumerate(parts, 1):
            with nullcontext() if share is None and number == len(parts) else apart():
                with torch.autocast(part.lr.device.type, dtype=autocast, enabled=autocast is not None):
                    losses = objective(part)
                for name, value in _finite_values(losses, step=state.step + 1, cursor=cursor).items():
                    values[name] = values.get(name, 0.0) + value * len(part) / len(pair)
                (torch.stack(list(losses.values())).sum() * part.weight).backward()
        if share is not None:
            share([each for group in state.optimizer.param_groups for each in group["params"]])
        norm = _clip(parameters, state.config.clip_norm)
        norms = {"the gradient": norm, "the gradient beside the network": gradient_norm(beside)}
        for what, found in norms.items():
            if not math.isfinite(found):
                _refuse(f"{what} is {found}", step=state.step + 1, cursor=cursor)
        state.optimizer.step()
        state.optimizer.zero_grad(set_to_none=True)
        state.step += 1
        state.cursor = cursor
        _update_ema(state)
        try:
            details = after_step()
        except NonFiniteLoss as error:
            _refuse(str(error), step=state.step, cursor=cursor)
        yield StepReport(
            step=state.step,
            losses=values,
            learning_rate=learning_rate,
            gradient_norm=norm,
            num_patches=len(pair.lr),
            seconds=time.perf_counter() - begin,
            waiting_seconds=arrived - begin,
            details=details,
        )


def share_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Let each worker of torch's process group have the mean of their gradients. All must ask together.

    What no worker has a gradient of is left without one, as with a worker alone, whose optimizer then does
    not move it.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    reached = parameters[0].new_tensor([parameter.grad is not None for parameter in parameters])
    torch.distributed.all_reduce(reached)
    chosen = [parameter for parameter, count in zip(parameters, reached.tolist(), strict=True) if count > 0]
    for parameter in chosen:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    gradients = [parameter.grad for parameter in chosen if parameter.grad is not None]
    row = torch.cat([gradient.flatten() for gradient in gradients])
    torch.distributed.all_reduce(row)
    row /= torch.distributed.get_world_size()
    for gradient, own in zip(gradients, row.split([each.numel() for each in gradients]), strict=True):
        gradient.copy_(own.view(gradient.shape))


def learning_rate_at(config: OptimizerConfig, *, step: int, num_steps: int) -> float:
    """Linear warm-up, then cosine to `final_learning_rate` (Loshchilov and Hutter, SGDR, ICLR 2017)."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, num_steps - config.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    return config.final_learning_rate + (config.learning_rate - config.final_learning_rate) * cosine


def _learning(network: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in network.parameters() if parameter.requires_grad]


def _set_learning_rate(state: TrainState) -> float:
    rate = learning_rate_at(state.config, step=state.step, num_steps=state.num_steps)
    for group in state.optimizer.param_groups:
        group["lr"] = rate
    return rate


def _finite_values(losses: Losses, *, step: int, cursor: Cursor) -> dict[str, float]:
    values = {name: loss.item() for name, loss in losses.items()}
    for name, value in values.items():
        if not math.isfinite(value):
            _refuse(f"term {name} is {value}", step=step, cursor=cursor)
    return values


def _refuse(what: str, *, step: int, cursor: Cursor) -> NoReturn:
    raise NonFiniteLoss(
        f"step {step}: {what} for batch {cursor.step} of the data; the last good checkpoint is kept. A run "
        f"keeps its settings: begin one of another name with a lower optimizer.learning_rate (or that of the "
        f"adversarial term), with optimizer.clip_norm, or with precision float32"
    ) from None


def _clip(parameters: list[nn.Parameter], clip_norm: float | None) -> float:
    norm: Tensor = torch.nn.utils.clip_grad_norm_(parameters, clip_norm or math.inf, foreach=True)
    return whole(norm).item()


@torch.no_grad()
def _update_ema(state: TrainState) -> None:
    """Exponential mean of the weights, shorter at the start so that it does not remember the first ones.

    Buffers are not weights (means of statistics, counts, tables) and are taken as they are.
    """
    decay = min(state.config.ema_decay, (1 + state.step) / (10 + state.step))
    if state.config.ema_decay == 0:
        decay = 0.0
    means: list[Tensor] = list(state.ema.parameters())
    weights: list[Tensor] = list(state.model.parameters())
    torch._foreach_lerp_(means, weights, 1 - decay)
    for kept, current in zip(state.ema.buffers(), state.model.buffers(), strict=True):
        kept.copy_(current)
