"""What is stored comes back exactly or is refused, and what is half written does not exist."""

import io
import json
import os
import re
from contextlib import suppress

import pytest
import torch
from safetensors.torch import load as load_safetensors

from kdsr import checkpoint
from kdsr.checkpoint import (
    POINTERS,
    StateStore,
    bundled_names,
    copied,
    is_imported,
    load_card,
    load_model,
    require_teacher_spec,
    save_model,
)
from kdsr.errors import CheckpointCorrupt, RequestError, StoreError, UnknownModel
from kdsr.models import MODELS, build_model, fold, num_parameters
from kdsr.spec import Card, EdsrSpec, EspcnSpec, ImportedSpec, RepChainSpec, TeacherRef
from kdsr.store import open_store
from tests.dying import Dying
from tests.small_networks import SMALL

SPECS = [kind(scale=2, **SMALL[kind.model_fields["kind"].default]) for kind in MODELS]


@pytest.fixture
def store(tmp_path):
    return open_store(f"file://{tmp_path}/model")


def net(spec, seed=0):
    torch.manual_seed(seed)
    model = build_model(spec)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


def card_of(model, **fields):
    return Card(**{"name": "test", "spec": model.spec, "num_parameters": 0, "sha256": "", **fields})


class Breaking:
    """A store that fails instead of the write that `breaks`."""

    def __init__(self, store, breaks):
        self.store, self.breaks = store, breaks

    def __getattr__(self, name):
        return getattr(self.store, name)

    def put(self, key, data):
        if self.breaks(key):
            raise StoreError(f"no more writes: {key}")
        return self.store.put(key, data)


# ---------------------------------------------------------------- models


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.kind)
def test_a_model_comes_back_bit_for_bit_and_ready_to_run(store, spec):
    model = net(spec)
    save_model(store, model, card_of(model))
    loaded = load_model(store.uri)
    assert loaded.model.spec == spec and not loaded.model.training
    expected, found = model.state_dict(), loaded.model.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_weights_in_channels_last_come_back_the_same(store):
    model = net(EdsrSpec(scale=2, num_features=8, num_blocks=1)).to(memory_format=torch.channels_last)
    save_model(store, model, card_of(model))
    found = load_model(store.uri).model.state_dict()
    assert all(torch.equal(tensor, found[name]) for name, tensor in model.state_dict().items())


def test_the_card_says_what_the_weights_are_and_keeps_what_it_was_told(store):
    model = fold(net(RepChainSpec(scale=4, num_features=8, num_layers=3)))
    teacher = TeacherRef(name="big", sha256="ab" * 32, licence="MIT")
    told = {"teacher": teacher, "data": ["photos (CC0)"], "licence": "Apache-2.0", "num_steps": 7}
    told |= {"command": "python jobs/distill.py", "commit": "abc", "metrics": {"heldout_psnr_y": 30.5}}
    card = save_model(store, model, card_of(model, name="photo-x4", **told))
    assert load_card(store.uri) == load_model(store.uri).card == card
    assert card.spec.folded and card.num_parameters == num_parameters(model)
    assert card.sha256 == checkpoint._digest(store.get("model.safetensors"))
    for name, value in told.items():
        assert getattr(card, name) == value
    assert json.loads(store.get("card.json"))["teacher"]["licence"] == "MIT"


def test_weights_are_safetensors(store):
    model = net(EspcnSpec(scale=2, num_features=8))
    save_model(store, model, card_of(model))
    assert load_safetensors(store.get("model.safetensors")).keys() == model.state_dict().keys()


@pytest.mark.parametrize("change", ["flipped", "short", "other"])
def test_weights_that_are_not_those_of_the_card_are_refused(store, change):
    model = net(EspcnSpec(scale=2, num_features=8))
    card = save_model(store, model, card_of(model))
    data = bytearray(store.get("model.safetensors"))
    data[-1] ^= 1
    changed = {"flipped": bytes(data), "short": bytes(data[:-8]), "other": b""}[change]
    store.put("model.safetensors", changed)
    with pytest.raises(
        CheckpointCorrupt, match=rf"expected sha256 {card.sha256[:12]}, found .*train it again"
    ):
        load_model(store.uri)


def test_missing_weights_are_refused(store):
    model = net(EspcnSpec(scale=2, num_features=8))
    save_model(store, model, card_of(model))
    store.delete("model.safetensors")
    with pytest.raises(CheckpointCorrupt, match=r"model\.safetensors is not there"):
        load_model(store.uri)


def test_weights_of_another_spec_are_refused(store):
    model = net(EspcnSpec(scale=2, num_features=8))
    card = save_model(store, model, card_of(model))
    wider = card.model_copy(update={"spec": EspcnSpec(scale=2, num_features=12)})
    store.put("card.json", wider.model_dump_json().encode())
    with pytest.raises(CheckpointCorrupt, match="the weights do not fit their card"):
        load_model(store.uri)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[]", b'{"name": "x"}'])
def test_a_card_that_is_none_is_refused(store, content):
    store.put("card.json", content)
    with pytest.raises(CheckpointCorrupt, match=r"card\.json is not a model card"):
        load_model(store.uri)


def test_a_card_of_an_imported_network_asks_for_its_file(store):
    spec = ImportedSpec(scale=2, architecture="SPAN")
    card = Card(name="x", spec=spec, num_parameters=1, sha256="00")
    store.put("card.json", card.model_dump_json().encode())
    assert is_imported(card)
    with pytest.raises(CheckpointCorrupt, match="give its own file instead"):
        load_model(store.uri)


@pytest.mark.parametrize("breaks_at", ["model.safetensors", "card.json"])
def test_a_model_that_is_half_written_does_not_exist(store, breaks_at):
    old, new = (net(EspcnSpec(scale=2, num_features=8), seed) for seed in (0, 1))
    save_model(store, old, card_of(old))
    with pytest.raises(StoreError, match="no more writes"):
        save_model(Breaking(store, lambda key: key == breaks_at), new, card_of(new))
    with pytest.raises(UnknownModel):
        load_model(store.uri)
    save_model(store, new, card_of(new))
    assert load_model(store.uri).card.num_parameters > 0


@pytest.fixture
def bundle(tmp_path, monkeypatch):
    """Two models that come with kdsr, and a file that is none."""
    monkeypatch.setattr(checkpoint, "BUNDLED", tmp_path)
    for name in ("photo-x4", "edsr-small-x4"):
        model = net(EspcnSpec(scale=4, num_features=8))
        save_model(open_store(f"file://{tmp_path}/{name}"), model, card_of(model, name=name))
    (tmp_path / "fixture.png").write_bytes(b"")
    (tmp_path / "unfinished").mkdir()


def test_a_bundled_model_is_known_by_its_name(bundle):
    assert bundled_names() == ["edsr-small-x4", "photo-x4"]
    assert load_model("photo-x4").card.name == load_card("photo-x4").name == "photo-x4"


@pytest.mark.parametrize("reference", ["photo-x5", "unfinished", "file:///nowhere/model"])
def test_an_unknown_model_is_answered_with_those_there_are(bundle, reference):
    for load in (load_model, load_card):
        with pytest.raises(UnknownModel, match=rf"{reference}.*one of: edsr-small-x4, photo-x4$"):
            load(reference)


def test_bundled_models_run_say_where_they_come_from_and_stay_small():
    for name in bundled_names():
        loaded = load_model(name)
        card, scale = loaded.card, loaded.model.spec.scale
        assert card.name == name and card.num_parameters == num_parameters(loaded.model)
        assert card.data and card.teacher and card.command.startswith("python jobs/") and card.metrics
        assert card.licence != "unknown"
        sr = loaded.model(torch.full((1, 3, 9, 8), 0.5))
        assert sr.shape == (1, 3, 9 * scale, 8 * scale) and abs(sr.mean().item() - 0.5) < 0.05
    assert sum(path.stat().st_size for path in checkpoint.BUNDLED.rglob("*")) < 10e6


def test_a_teacher_of_another_scale_or_other_channels_is_refused():
    card = card_of(net(EspcnSpec(scale=4, num_features=8)), name="big")
    require_teacher_spec(card, scale=4, channels=3)
    with pytest.raises(RequestError, match="teacher big: the student has scale 2, the teacher 4"):
        require_teacher_spec(card, scale=2, channels=3)
    with pytest.raises(RequestError, match="teacher big: the student has channels 1, the teacher 3"):
        require_teacher_spec(card, scale=4, channels=1)


# ---------------------------------------------------------------- training states


@pytest.fixture
def states(tmp_path):
    return StateStore(open_store(f"file://{tmp_path}/run"))


def state_of(step):
    return {"model": {"w": torch.full((3,), float(step))}, "step": step, "cursor": [step]}


def kept(states):
    """Steps of the states in the store, and the pointers."""
    keys = [info.key.removeprefix("checkpoints/") for info in states.store.list("checkpoints/")]
    steps = sorted(int(key[:9]) for key in keys if key.endswith(".pt"))
    return steps, sorted(key.removesuffix(".json") for key in keys if key.endswith(".json"))


def key_of(states, pointer):
    return json.loads(states.store.get(f"checkpoints/{pointer}.json"))["key"]


def damage(states, pointer, change="flipped"):
    key = key_of(states, pointer)
    data = bytearray(states.store.get(key))
    data[len(data) // 2] ^= 1
    match change:
        case "flipped":
            states.store.put(key, bytes(data))
        case "short":
            states.store.put(key, bytes(data[:-10]))
        case "gone":
            states.store.delete(key)
        case "pointer":
            states.store.put(f"checkpoints/{pointer}.json", b"{")


def test_a_run_without_a_state_has_none(states):
    assert states.load(*POINTERS) is None and states.step("latest") is None


def test_only_the_last_two_and_the_best_state_are_kept(states):
    states.save(state_of(1), step=1, pointers=("latest",))
    assert kept(states) == ([1], ["latest"])
    states.save(state_of(2), step=2, pointers=("best", "latest"))
    for step in (3, 4, 5):
        states.save(state_of(step), step=step, pointers=("latest",))
    assert kept(states) == ([2, 4, 5], ["best", "latest", "previous"])
    assert [states.step(pointer) for pointer in POINTERS] == [5, 4, 2]
    assert torch.equal(states.load("best")["model"]["w"], torch.full((3,), 2.0))
    assert states.load("latest")["cursor"] == [5]
    states.save(state_of(6), step=6, pointers=("best", "latest"))
    assert kept(states) == ([5, 6], ["best", "latest", "previous"])


def test_states_of_the_time_before_there_was_a_previous_one_are_known(states):
    buffer = io.BytesIO()
    torch.save(state_of(7), buffer)
    states.store.put("checkpoints/000000007.pt", buffer.getvalue())
    entry = {"step": 7, "key": "checkpoints/000000007.pt", "sha256": checkpoint._digest(buffer.getvalue())}
    states.store.put("checkpoints/latest.json", json.dumps(entry).encode())
    assert states.load(*POINTERS)["step"] == 7
    states.save(state_of(8), step=8, pointers=("latest",))
    assert kept(states) == ([7, 8], ["latest", "previous"])


def test_wherever_saving_is_cut_the_state_before_or_the_new_one_is_there(states):
    """A process that dies at its first, second, ... write or deletion, and goes on as another one."""
    last, writes = 1, 0
    states.save(state_of(1), step=1, pointers=("best", "latest"))
    for step in range(2, 40):
        dying = Dying(states.store, after=writes)
        done = False
        with suppress(StoreError):
            StateStore(dying).save(state_of(step), step=step, pointers=("best", "latest")[step % 2 :])
            done = True
        found = StateStore(states.store).load(*POINTERS)["step"]
        assert found == step if done else found in {last, step}
        assert StateStore(states.store).load("best") is not None
        last, writes = found, 0 if done else writes + 1
        if done:
            assert set(kept(states)[0]) >= {step, last}
    assert last > 10


@pytest.mark.parametrize("change", ["flipped", "short", "gone", "pointer"])
def test_for_a_damaged_state_the_one_before_is_taken_and_it_is_said(states, caplog, change):
    for step in (1, 2, 3):
        states.save(state_of(step), step=step, pointers=("latest",))
    before = key_of(states, "previous")
    damage(states, "latest", change)
    resumed = StateStore(states.store)
    assert resumed.load(*POINTERS)["step"] == 2
    (warning,) = caplog.messages
    what = {
        "flipped": r"000000003-\w+\.pt: expected sha256 \w+, found \w+",
        "short": r"000000003-\w+\.pt: expected sha256 \w+, found \w+",
        "gone": r"000000003-\w+\.pt is not there",
        "pointer": r"latest\.json names no state",
    }[change]
    assert re.search(rf"{what}.*Taken instead: {before} of step 2$", warning)
    # The damaged one is not what a next one may fall back on.
    resumed.save(state_of(3), step=3, pointers=("latest",))
    assert [resumed.step(pointer) for pointer in ("latest", "previous")] == [3, 2]
    damage(states, "latest")
    assert StateStore(states.store).load(*POINTERS)["step"] == 2


def test_with_both_last_states_damaged_the_best_one_is_taken(states):
    for step, pointers in ((1, ("best", "latest")), (2, ("latest",)), (3, ("latest",))):
        states.save(state_of(step), step=step, pointers=pointers)
    damage(states, "latest")
    damage(states, "previous", "gone")
    assert StateStore(states.store).load(*POINTERS)["step"] == 1


def test_a_run_whose_states_are_all_damaged_never_begins_again_by_itself(states):
    for step, pointers in ((1, ("best", "latest")), (2, ("latest",)), (3, ("latest",))):
        states.save(state_of(step), step=step, pointers=pointers)
    for pointer, change in (("latest", "flipped"), ("previous", "gone"), ("best", "short")):
        damage(states, pointer, change)
    with pytest.raises(CheckpointCorrupt, match=r"000000003-.*000000002-.*000000001-.*No checkpoint is left"):
        StateStore(states.store).load(*POINTERS)


def test_a_state_is_copied_with_all_that_it_is_made_of():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    model = model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters())
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "cursor": [3], "step": 3}
    twin = copied(state)
    with torch.no_grad():
        model[0].weight.zero_()
    assert twin["model"]["0.weight"].abs().sum() > 0
    assert twin["model"]._metadata == state["model"]._metadata
    assert twin["model"]["0.weight"].is_contiguous(memory_format=torch.channels_last)
    assert twin["optimizer"] == state["optimizer"] and twin["cursor"] == [3]
    assert twin["optimizer"]["param_groups"][0] is not state["optimizer"]["param_groups"][0]


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_code_in_a_state_is_never_run(states, tmp_path):
    """Even with a pointer that vouches for it."""
    buffer = io.BytesIO()
    torch.save({"model": Payload(tmp_path / "ran")}, buffer)
    states.store.put("checkpoints/000000001.pt", buffer.getvalue())
    entry = {"step": 1, "key": "checkpoints/000000001.pt", "sha256": checkpoint._digest(buffer.getvalue())}
    states.store.put("checkpoints/latest.json", json.dumps(entry).encode())
    with pytest.raises(CheckpointCorrupt, match=r"000000001\.pt: not a training state"):
        states.load("latest")
    assert not (tmp_path / "ran").exists()
