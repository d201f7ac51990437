"""What a replica does: hold networks, and turn calls into results. Knows no HTTP and no Ray."""

import asyncio
import logging
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

from kdsr.checkpoint import load_card, load_model
from kdsr.codecs import output_format
from kdsr.config import ModelTable, NetworkConfig, Precision, ServeConfig
from kdsr.encoded import Clock, EncodedUpscaler, StageFailed, goal_of, held_frames
from kdsr.engine import Engine, give_back_memory
from kdsr.errors import CheckpointCorrupt, KdsrError, RequestError
from kdsr.serving.admission import MAX_CALLS, Admission
from kdsr.serving.contract import Call, Description, Refusal, Result, ServedModel, ServedNetwork
from kdsr.serving.problems import Problem, is_expected, problem_of, without_places
from kdsr.spec import Card
from kdsr.turns import Claim
from kdsr.upscale import ComputeThreads, Upscaler

logger = logging.getLogger("kdsr.serving")

BYTES_PER_PIXEL = 4
"""Red, green, blue and alpha, for 8 bits."""
TIDY_SECONDS = 30.0
"""Between two times at which memory that is free is given back."""
LEAVE_SECONDS = 10.0
"""How long a network that no model names any more answers whoever was told of it before."""


@dataclass(frozen=True)
class _Network:
    """A network that is ready, and what is known of it."""

    upscaler: Upscaler
    served: ServedNetwork


class ModelHost:
    """Networks of all models in one process; their tiles share threads and take turns.

    Safe to share between threads; `answer` is for one event loop.
    """

    def __init__(self, config: ServeConfig, *, num_threads: int, device: str = "cpu") -> None:
        self._config, self._device = config, device
        self._num_threads = 1 if device != "cpu" else num_threads
        self._compute = ComputeThreads(self._num_threads, splits_lone_tiles=True)
        self._images = ThreadPoolExecutor(MAX_CALLS, thread_name_prefix="images")
        self._admission = Admission(config.limits.queue_bytes)
        self._models: tuple[ServedModel, ...] = ()
        self._networks: dict[str, _Network] = {}
        self._leaving: dict[str, tuple[_Network, float]] = {}
        """Networks that were replaced, each with the time of `time.monotonic` at which it goes."""
        self._lock = threading.Lock()
        self._failures: dict[str, str] = {}
        self._answered = 0
        self._closed = threading.Event()
        threading.Thread(target=self._tidy, name="tidy", daemon=True).start()

    def load(self, table: ModelTable) -> Mapping[str, str]:
        """Serve the models of `table`, all at once, and return why some are not what was asked for.

        A network that is held already is kept. A model that cannot be loaded stays as it was before, and is
        left out when there was none; when not one can be loaded, all stay as they were. What is replaced
        answers for some seconds more. Takes a second or more; calls go on meanwhile.
        """
        before = {model.name: model for model in self._models}
        models, failures = [], {}
        held = {sha256: network for sha256, (network, _) in self._leaving.items()} | self._networks
        for name, networks in table.items():
            try:
                models.append(self._load_model(name, networks, held))
            except KdsrError as error:
                logger.error("model %s is not replaced: %s", name, error)
                failures[name] = str(error)
                models += [before[name]] if name in before else []
        if models:
            self._replace(models, held)
        uris = [network.uri for networks in table.values() for network in networks]
        self._failures = {name: without_places(cause, *uris) for name, cause in failures.items()}
        return failures

    def _replace(self, models: Sequence[ServedModel], held: Mapping[str, _Network]) -> None:
        """Serve `models`, whose networks are among `held`, from now on."""
        wanted = {network.card.sha256 for model in models for network in model.networks}
        with self._lock:
            end = time.monotonic() + LEAVE_SECONDS
            leaving = {sha256: (network, end) for sha256, network in self._networks.items()}
            self._leaving = {
                sha256: left for sha256, left in (self._leaving | leaving).items() if sha256 not in wanted
            }
            self._networks = {sha256: held[sha256] for sha256 in wanted}
            self._models = tuple(models)
        timer = threading.Timer(LEAVE_SECONDS, self._drop_left)
        timer.daemon = True
        timer.start()

    def _drop_left(self) -> None:
        """Let those networks go whose time is over."""
        with self._lock:
            now = time.monotonic()
            self._leaving = {sha256: left for sha256, left in self._leaving.items() if left[1] > now}

    def _load_model(
        self, name: str, networks: Sequence[NetworkConfig], held: dict[str, _Network]
    ) -> ServedModel:
        served = []
        for network in networks:
            card = checked_card(network, self._config)
            if card.sha256 not in held:
                held[card.sha256] = self._load_network(network)
            # The same weights may lie elsewhere by now, and jobs read them there.
            served.append(replace(held[card.sha256].served, card=card, uri=network.uri))
        return ServedModel(name, tuple(sorted(served, key=lambda network: network.scale)))

    def _load_network(self, network: NetworkConfig) -> _Network:
        loaded = load_model(network.uri, self._config.store)
        require_digest(network, loaded.card)
        precision: Precision = self._config.precision
        engine = Engine(loaded.model, device=self._device, precision=precision)
        if not engine.same_on_many_cores(self._num_threads):
            logger.warning("%s: its bytes depend on the number of threads; each tile has one", network.uri)
            self._compute.splits_lone_tiles = False
        upscaler = Upscaler(
            engine,
            tile_size=self._config.tile_size,
            batch_size=self._config.batch_size,
            compute=self._compute,
        )
        return _Network(upscaler, ServedNetwork(loaded.card, engine.precision, network.uri))

    def describe(self) -> Description:
        """What is served now."""
        return Description(self._models, dict(self._failures), self.waiting_tiles, self._admission.taken)

    @property
    def waiting_tiles(self) -> int:
        """Tiles that wait for a thread."""
        return len(self._compute.turns)

    async def answer(self, call: Call) -> Result | Refusal:
        """The result, or why there is none. Being cancelled means that the caller left."""
        claim = Claim(deadline=time.monotonic() + call.seconds)
        try:
            network = self._network(call)
            return await asyncio.wrap_future(self._begun(call, network, claim))
        except asyncio.CancelledError:
            claim.withdraw()
            raise
        except Exception as error:  # noqa: BLE001 whatever it is, it is the answer to this call alone
            return _refusal(error, call)

    def _begun(self, call: Call, network: _Network, claim: Claim) -> "Future[Result]":
        """The call in a thread; what it costs is given back when the thread is done with it."""
        cost = self._cost(call, network)
        self._admission.enter(cost)
        future = self._images.submit(self._upscale, call, network, claim)
        future.add_done_callback(lambda done: self._ended(done, cost))
        return future

    def _ended(self, done: "Future[Result]", cost: int) -> None:
        self._admission.leave(cost, was_done=not done.cancelled() and done.exception() is None)
        self._answered += 1

    def _network(self, call: Call) -> _Network:
        with self._lock:
            left, _ = self._leaving.get(call.network_sha256, (None, 0.0))
            network = self._networks.get(call.network_sha256, left)
        if network is None:
            raise Problem("loading", f"model {call.model} is being replaced; try again", retry_after=1)
        return network

    def _cost(self, call: Call, network: _Network) -> int:
        """Bytes of the pictures that the call holds at most: the input, the network's output, the result."""
        header, scale = call.header, network.served.scale
        format_ = call.wanted.format or output_format(header.format)
        pixels = header.largest_pixels * held_frames(format_, header.frames)
        larger = max(scale, call.wanted.scale or 0) ** 2
        return int(pixels * (1 + 2 * larger)) * BYTES_PER_PIXEL * header.bits // 8

    def _upscale(self, call: Call, network: _Network, claim: Claim) -> Result:
        """Runs in a thread of its own. Raises KdsrError and what is our fault."""
        clock, began = Clock(), time.perf_counter()
        try:
            goal = goal_of(call.header, call.wanted, net_scale=network.served.scale)
            upscaler = EncodedUpscaler(network.upscaler, call.wanted, claim)
            data = upscaler.upscale(lambda: call.data, call.header, goal, clock)
        except StageFailed as failure:
            raise failure.cause from None
        first = began if claim.began is None else claim.began
        return Result(
            data,
            goal.format,
            goal.height,
            goal.width,
            queue_seconds=max(0.0, first - began - clock.spent("decode")),
            decode_seconds=clock.spent("decode"),
            compute_seconds=claim.seconds,
            encode_seconds=clock.spent("encode"),
            batch_size=claim.largest_batch,
        )

    def _tidy(self) -> None:
        """Give memory back now and then, where there was work in between."""
        before = self._answered
        while not self._closed.wait(TIDY_SECONDS):
            if self._answered != before:
                before = self._answered
                give_back_memory()

    def close(self) -> None:
        """Let the threads end."""
        self._closed.set()
        self._images.shutdown(wait=False, cancel_futures=True)
        self._compute.shutdown(wait=False, cancel_futures=True)


class HostBackend:
    """What an application in the same process asks of a host: see `kdsr.serving.entrance.Backend`."""

    def __init__(self, host: ModelHost) -> None:
        self._host = host

    async def describe(self) -> Description:
        """What is served now."""
        return self._host.describe()

    async def upscale(self, call: Call) -> Result | Refusal:
        """See `ModelHost.answer`."""
        return await self._host.answer(call)


def _refusal(error: Exception, call: Call) -> Refusal:
    if not is_expected(error):
        logger.exception("request %s failed", call.request_id)
    problem = problem_of(error)
    return Refusal(problem.kind, problem.detail, problem.retry_after)


def checked_card(network: NetworkConfig, config: ServeConfig) -> Card:
    """What is known of a network before its weights are loaded. Raises KdsrError unless it is the one."""
    card = load_card(network.uri, config.store)
    require_digest(network, card)
    return card


def require_digest(network: NetworkConfig, card: Card) -> None:
    """Raise CheckpointCorrupt unless the network is the one that the configuration names."""
    if network.sha256 not in (None, card.sha256):
        raise CheckpointCorrupt(
            f"{network.uri}: expected sha256 {str(network.sha256)[:12]}, found {card.sha256[:12]}; correct "
            f"models, or fetch it again"
        )


def check_table(config: ServeConfig) -> None:
    """Raise KdsrError for a model that does not exist, or two networks of one scale in a model."""
    for name, networks in config.models.items():
        scales = [int(checked_card(network, config).spec.scale) for network in networks]
        if len(set(scales)) < len(scales):
            raise RequestError(f"models.{name}: expected one network for each scale, found scales {scales}")
