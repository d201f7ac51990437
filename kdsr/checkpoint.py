"""Models and training states in a store. What has no card, or no `latest.json`, does not exist.

A model directory is `model.safetensors` and, written after it, `card.json`. Nothing is ever unpickled.
"""

import copy
import hashlib
import io
import logging
import pickle  # for the name of an error only
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors

from kdsr.config import StoreConfig
from kdsr.errors import CheckpointCorrupt, KeyNotFound, RequestError, UnknownModel
from kdsr.models import SrModel, build_model, num_parameters
from kdsr.models.imported import read_checkpoint, read_vgg
from kdsr.models.vgg import Vgg
from kdsr.spec import Card, Frozen, ImportedSpec
from kdsr.store import Store, open_object, open_store

log = logging.getLogger(__name__)

WEIGHTS_KEY, CARD_KEY = "model.safetensors", "card.json"
BUNDLED = Path(__file__).parent / "weights"
FOREIGN_SUFFIXES = (".pt", ".pth", ".safetensors")


@dataclass(frozen=True)
class LoadedModel:
    """A network in evaluation mode and what is known of it."""

    model: SrModel
    card: Card


def bundled_names() -> list[str]:
    """Names of the models that come with kdsr."""
    return sorted(path.parent.name for path in BUNDLED.glob(f"*/{CARD_KEY}"))


def load_model(reference: str, config: StoreConfig = StoreConfig()) -> LoadedModel:
    """A model by bundled name, by the uri of its directory, or from a public checkpoint file.

    Raises UnknownModel when there is none, CheckpointCorrupt when weights and card do not belong together.
    """
    if reference.endswith(FOREIGN_SUFFIXES):
        return _load_foreign(reference, config)
    card, store = _open_directory(reference, config)
    if isinstance(card.spec, ImportedSpec):
        raise CheckpointCorrupt(
            f"{store.uri}: {CARD_KEY} names an imported network; give its own file instead"
        )
    weights = _get_checked(store, WEIGHTS_KEY, sha256=card.sha256)
    model = build_model(card.spec)
    try:
        model.load_state_dict(load_safetensors(weights))
    except (RuntimeError, SafetensorError) as error:
        raise CheckpointCorrupt(f"{store.uri}: the weights do not fit their card: {error}") from None
    return LoadedModel(model.eval(), card)


def load_judge(reference: str, config: StoreConfig = StoreConfig()) -> Vgg | LoadedModel:
    """A network whose features images are compared by: the file of a VGG, or what `load_model` knows."""
    if reference.endswith(FOREIGN_SUFFIXES):
        key, data = _read_file(reference, config)
        if (vgg := read_vgg(data, suffix=Path(key).suffix, origin=reference)) is not None:
            return vgg
    return load_model(reference, config)


def load_card(reference: str, config: StoreConfig = StoreConfig()) -> Card:
    """What is known of a model, without its weights where it has a card of its own."""
    if reference.endswith(FOREIGN_SUFFIXES):
        return _load_foreign(reference, config).card
    return _open_directory(reference, config)[0]


def save_model(store: Store, model: SrModel, card: Card) -> Card:
    """Write `model` under `store`'s root, the card last; returns the card with size and sha256 filled in."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    weights = save_safetensors(tensors)
    card = card.model_copy(
        update={"spec": model.spec, "num_parameters": num_parameters(model), "sha256": _digest(weights)}
    )
    store.delete(CARD_KEY)
    store.put(WEIGHTS_KEY, weights)
    store.put(CARD_KEY, (card.model_dump_json(indent=2) + "\n").encode())
    return card


def _open_directory(reference: str, config: StoreConfig) -> tuple[Card, Store]:
    is_uri = "://" in reference
    store = open_store(reference if is_uri else f"file://{BUNDLED / reference}", config)
    try:
        return Card.model_validate_json(store.get(CARD_KEY)), store
    except KeyNotFound:
        what = f"no {CARD_KEY} at {reference}" if is_uri else f"no bundled model {reference!r}"
        raise UnknownModel(
            f"{what}; give the uri of a model directory, a checkpoint file ({', '.join(FOREIGN_SUFFIXES)}), "
            f"or one of: {', '.join(bundled_names())}"
        ) from None
    except ValidationError as error:
        raise CheckpointCorrupt(f"{store.uri}/{CARD_KEY} is not a model card: {error}") from None


def _load_foreign(uri: str, config: StoreConfig) -> LoadedModel:
    key, data = _read_file(uri, config)
    model = read_checkpoint(data, suffix=Path(key).suffix, origin=uri)
    card = Card(
        name=Path(key).stem,
        spec=model.spec,
        num_parameters=num_parameters(model),
        sha256=_digest(data),
        colour="sRGB" if model.spec.channels == 3 else "grey",
        imported=True,
    )
    return LoadedModel(model.eval(), card)


def _read_file(uri: str, config: StoreConfig) -> tuple[str, bytes]:
    """Key and content of a checkpoint file. Raises UnknownModel."""
    store, key = open_object(uri, config)
    try:
        return key, store.get(key)
    except KeyNotFound:
        raise UnknownModel(f"no checkpoint file at {uri}") from None


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _get_checked(store: Store, key: str, *, sha256: str) -> bytes:
    """The object under `key`. Raises CheckpointCorrupt unless it is the one that was written."""
    try:
        data = store.get(key)
    except KeyNotFound:
        raise CheckpointCorrupt(f"{store.uri}/{key} is not there; fetch or train it again") from None
    if _digest(data) != sha256:
        raise CheckpointCorrupt(
            f"{store.uri}/{key}: expected sha256 {sha256[:12]}, found {_digest(data)[:12]}; the file changed "
            f"after it was written, fetch or train it again"
        )
    return data


# ---------------------------------------------------------------- training states


POINTERS = ("latest", "previous", "best")
"""Names of states, in the order in which a run that goes on tries them."""


class Entry(Frozen):
    """What a pointer says of the state that it names."""

    step: int
    key: str
    sha256: str


@dataclass
class StateStore:
    """Training states of one run: `checkpoints/STEP-SHA.pt`, and small pointers that are written after them.

    `latest` is the last state, `previous` the one before it, which is there for when the last one is damaged,
    and `best` the one that did best. What no pointer names is deleted. A state is never written over another:
    its key has its sha256.
    """

    store: Store
    sound: Entry | None = None
    """The state that was read or written last by this object, which a next one becomes the successor of."""

    def save(self, state: dict[str, Any], *, step: int, pointers: Sequence[str]) -> int:
        """Write `state` and let `pointers` ("latest", "best") name it, in their order; returns its bytes.

        Cut off anywhere, it leaves what was there before, or the new state.
        """
        buffer = io.BytesIO()
        torch.save(state, buffer)
        data = buffer.getvalue()
        digest = _digest(data)
        entry = Entry(step=step, key=f"checkpoints/{step:09}-{digest[:12]}.pt", sha256=digest)
        self.store.put(entry.key, data)
        before = self.sound or self.entry("latest")
        if before is not None and before != entry:
            self._point("previous", before)
        for pointer in pointers:
            self._point(pointer, entry)
        self.sound = entry
        self._delete_unnamed()
        return len(data)

    def load(self, *pointers: str) -> dict[str, Any] | None:
        """The first of the states that `pointers` name that is as it was written; None when they name none.

        Says which ones were not. Raises CheckpointCorrupt when all of them are damaged.
        """
        damaged: list[str] = []
        for pointer in pointers:
            try:
                if (entry := self.entry(pointer)) is None:
                    continue
                state = self._read(entry)
            except CheckpointCorrupt as error:
                damaged.append(str(error))
                continue
            if damaged:
                log.warning("%s. Taken instead: %s of step %d", "; ".join(damaged), entry.key, entry.step)
            self.sound = entry
            return state
        if damaged:
            raise CheckpointCorrupt(
                f"{'; '.join(dict.fromkeys(damaged))}. No checkpoint is left to go on from: put one back, or "
                f"delete {self.store.uri} to begin again"
            )
        return None

    def entry(self, pointer: str) -> Entry | None:
        """What `pointer` names. Raises CheckpointCorrupt for a pointer that cannot be read."""
        key = f"checkpoints/{pointer}.json"
        try:
            return Entry.model_validate_json(self.store.get(key))
        except KeyNotFound:
            return None
        except ValidationError:
            raise CheckpointCorrupt(f"{self.store.uri}/{key} names no state: it was damaged") from None

    def step(self, pointer: str) -> int | None:
        """Its step."""
        entry = self.entry(pointer)
        return None if entry is None else entry.step

    def _read(self, entry: Entry) -> dict[str, Any]:
        data = _get_checked(self.store, entry.key, sha256=entry.sha256)
        try:
            state: dict[str, Any] = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        except (RuntimeError, pickle.UnpicklingError):
            raise CheckpointCorrupt(
                f"{self.store.uri}/{entry.key}: not a training state of plain tensors"
            ) from None
        return state

    def _point(self, pointer: str, entry: Entry) -> None:
        self.store.put(f"checkpoints/{pointer}.json", entry.model_dump_json().encode())

    def _delete_unnamed(self) -> None:
        try:
            named = {entry.key for pointer in POINTERS if (entry := self.entry(pointer))}
        except CheckpointCorrupt as error:
            log.warning("%s; old states stay", error)
            return
        for info in self.store.list("checkpoints/"):
            if info.key.endswith(".pt") and info.key not in named:
                self.store.delete(info.key)


def copied(state: Any) -> Any:
    """`state` with its tensors copied into memory, so that training may go on while it is written."""
    match state:
        case torch.Tensor():
            return state.detach().to("cpu", copy=True)
        case dict():
            twin = copy.copy(state)  # with what torch hangs on its dicts
            twin.update({name: copied(value) for name, value in state.items()})
            return twin
        case list() | tuple():
            return type(state)(copied(value) for value in state)
        case _:
            return state


# ---------------------------------------------------------------- teachers


def require_teacher_spec(card: Card, *, scale: int, channels: int) -> None:
    """Raise RequestError when a teacher cannot teach a student of this scale and these channels."""
    expectations = (("scale", scale, card.spec.scale), ("channels", channels, card.spec.channels))
    for what, expected, found in expectations:
        if expected != found:
            raise RequestError(
                f"teacher {card.name}: the student has {what} {expected}, the teacher {found}; "
                f"take a teacher of the same {what}"
            )


def is_imported(card: Card) -> bool:
    """Whether the model came from a public checkpoint file and its value range is only assumed."""
    return card.imported or isinstance(card.spec, ImportedSpec)
