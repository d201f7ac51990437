"""Public networks as teachers: tensors only, any size, and a clear answer to what cannot be one."""

import importlib
import io
import os
import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save as save_safetensors

from kdsr.checkpoint import LoadedModel, is_imported, load_card, load_model
from kdsr.errors import CheckpointCorrupt, RequestError, UnknownModel
from kdsr.models import build_model, imported
from kdsr.models.imported import Imported, read_checkpoint
from kdsr.spec import ImportedSpec, RrdbnetSpec
from kdsr.validation import require_better_than_bicubic

DATA = os.environ.get("KDSR_DATA")
needs_data = pytest.mark.skipif(DATA is None, reason="KDSR_DATA is not set")


@pytest.fixture(scope="module")
def spandrel():
    pytest.importorskip("safetensors")
    try:
        return imported._import_spandrel()
    except RequestError as error:
        pytest.skip(str(error))


def network(name, **fields):
    torch.manual_seed(0)
    architecture = importlib.import_module(f"spandrel.architectures.{name}")
    return getattr(architecture, name)(**fields).eval()


def compact(**fields):
    return network("Compact", **{"num_feat": 8, "num_conv": 2, "upscale": 2, **fields})


def dumped(content):
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def read(data, suffix=".pth"):
    return read_checkpoint(data, suffix=suffix, origin="file:///x")


# ---------------------------------------------------------------- what can be a teacher


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".safetensors"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_public_checkpoint_is_recognised_by_its_tensors(spandrel, tmp_path, suffix, wrapped):
    theirs = compact(upscale=4)
    tensors = theirs.state_dict()
    if suffix == ".safetensors":
        data = save_safetensors(tensors)
    else:
        data = dumped({"params_ema": tensors} if wrapped else tensors)
    (tmp_path / f"their net{suffix}").write_bytes(data)
    loaded = load_model(f"file://{tmp_path}/their net{suffix}")
    spec = ImportedSpec(scale=4, channels=3, architecture="RealESRGAN Compact")
    assert loaded.model.spec == loaded.card.spec == spec and is_imported(loaded.card)
    assert (loaded.card.name, loaded.card.value_range, loaded.card.colour) == ("their net", (0, 1), "sRGB")
    assert not loaded.model.training
    lr = torch.rand(2, 3, 5, 7)
    with torch.no_grad():
        assert torch.equal(loaded.model(lr), theirs(lr))
    assert load_card(f"file://{tmp_path}/their net{suffix}") == loaded.card


def test_the_card_of_a_grey_network_says_so(spandrel, tmp_path):
    (tmp_path / "grey.pth").write_bytes(dumped(compact(num_in_ch=1, num_out_ch=1).state_dict()))
    card = load_card(f"file://{tmp_path}/grey.pth")
    assert card.colour == "grey" and card.spec.channels == 1


def test_sizes_the_network_refuses_are_mirrored_up_and_cut_back(spandrel):
    theirs = network("SAFMN", dim=16, n_blocks=1, upscaling_factor=2)
    ours = read(dumped(theirs.state_dict()))
    assert ours.spec.multiple_of == 8
    lr = torch.rand(1, 3, 13, 18)
    padded = torch.nn.functional.pad(lr, (0, 6, 0, 3), mode="reflect")
    with torch.no_grad():
        assert torch.equal(ours(lr), theirs(padded)[..., :26, :36])
        assert torch.equal(ours(lr[..., :8, :16]), theirs(lr[..., :8, :16]))


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (3, 5), (15, 16), (17, 40)])
def test_any_size_comes_out_scaled_however_small(size):
    spec = ImportedSpec(scale=3, architecture="x", multiple_of=8, min_size=16)

    class Strict(torch.nn.Module):
        def forward(self, lr):
            assert all(side % 8 == 0 and side >= 16 for side in lr.shape[-2:])
            return lr.repeat_interleave(3, -1).repeat_interleave(3, -2)

    lr = torch.rand(2, 3, *size)
    sr = Imported(spec, Strict())(lr)
    assert torch.equal(sr, lr.repeat_interleave(3, -1).repeat_interleave(3, -2))


def test_mirroring_goes_back_and_forth_without_repeating_the_edge():
    line = torch.arange(4.0).view(1, 1, 1, 4)
    spec = ImportedSpec(scale=2, architecture="x", min_size=12)
    found = imported._mirrored_up(line, spec)
    assert found.shape == (1, 1, 12, 12)
    assert found[0, 0, 5].tolist() == [0, 1, 2, 3, 2, 1, 0, 1, 2, 3, 2, 1]


# ---------------------------------------------------------------- RRDBNet, which needs no spandrel


def rrdbnet(**fields):
    torch.manual_seed(0)
    return build_model(RrdbnetSpec(num_features=8, num_growth=4, num_blocks=2, **fields)).eval()


def original(tensors):
    """Under the names of the first published code, numbered."""
    last = 3 * sum(name.startswith("conv_up") for name in tensors) // 2
    names = {"conv_first": "model.0", "conv_body": "model.1.sub.2", "conv_up1": "model.3"}
    names |= {"conv_up2": "model.6", "conv_hr": f"model.{last + 2}", "conv_last": f"model.{last + 4}"}
    return {
        _renamed(name, names, r"model.1.sub.\1.RDB\2.conv\3.0."): value for name, value in tensors.items()
    }


def later(tensors):
    """Under the names of the same authors' second code."""
    names = {"conv_body": "trunk_conv", "conv_up1": "upconv1", "conv_up2": "upconv2", "conv_hr": "HRconv"}
    return {_renamed(name, names, r"RRDB_trunk.\1.RDB\2.conv\3."): value for name, value in tensors.items()}


def _renamed(name, names, block):
    layer, _, kind = name.rpartition(".")
    return re.sub(r"^body\.(\d+)\.rdb(\d)\.conv(\d)\.", block, f"{names.get(layer, layer)}.{kind}")


@pytest.mark.parametrize("names", [dict, later, original], ids=["common", "later", "original"])
@pytest.mark.parametrize("wrapping", [None, "params", "params_ema", "module"])
@pytest.mark.parametrize("fields", [{"scale": 4}, {"scale": 2}, {"scale": 2, "unshuffle": True}], ids=str)
def test_an_rrdbnet_of_any_naming_becomes_our_own(monkeypatch, tmp_path, names, wrapping, fields):
    monkeypatch.setitem(sys.modules, "spandrel", None)
    theirs = rrdbnet(**fields)
    tensors = names(theirs.state_dict())
    if wrapping == "module":
        tensors = {f"module.{name}": tensor for name, tensor in tensors.items()}
    elif wrapping is not None:
        tensors = {wrapping: tensors}
    (tmp_path / "esrgan.pth").write_bytes(dumped(tensors))
    loaded = load_model(f"file://{tmp_path}/esrgan.pth")
    assert loaded.model.spec == loaded.card.spec == theirs.spec
    assert is_imported(loaded.card) and not loaded.model.training
    lr = torch.rand(1, 3, 7, 10)
    with torch.no_grad():
        assert torch.equal(loaded.model(lr), theirs(lr))


@pytest.mark.parametrize("fields", [{"scale": 4}, {"scale": 2, "unshuffle": True}], ids=str)
def test_our_rrdbnet_draws_what_the_reference_draws(spandrel, fields):
    # spandrel's reference always has a growth of 32.
    spec = RrdbnetSpec(num_features=8, num_growth=32, num_blocks=2, **fields)
    ours = build_model(spec).eval()
    theirs = spandrel.ModelLoader().load_from_state_dict(dict(ours.state_dict())).model.eval()
    lr = torch.rand(1, 3, 12, 16)
    with torch.no_grad():
        assert torch.allclose(ours(lr), theirs(lr), atol=1e-5)


def test_an_rrdbnet_with_a_layer_of_another_size_is_refused():
    tensors = rrdbnet(scale=4).state_dict()
    tensors["conv_hr.weight"] = tensors["conv_hr.weight"][:, :3]
    with pytest.raises(CheckpointCorrupt, match="file:///x: not a checkpoint of plain tensors"):
        read(dumped(tensors))


def test_half_precision_weights_are_read_as_float32():
    tensors = {name: tensor.half() for name, tensor in rrdbnet(scale=4).state_dict().items()}
    assert all(parameter.dtype == torch.float32 for parameter in read(dumped(tensors)).parameters())


# ---------------------------------------------------------------- what cannot


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("suffix", [".pt", ".pth"])
@pytest.mark.parametrize("legacy", [False, True])
def test_code_in_a_checkpoint_is_refused_and_never_run(spandrel, tmp_path, suffix, legacy):
    buffer = io.BytesIO()
    content = {"params": {**compact().state_dict(), "extra": Payload(tmp_path / "ran")}}
    torch.save(content, buffer, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(
        CheckpointCorrupt, match=r"file:///x: not a checkpoint of plain tensors .*without code"
    ):
        read(buffer.getvalue(), suffix)
    assert not (tmp_path / "ran").exists()
    buffer.seek(0)
    torch.load(buffer, weights_only=False)
    assert (tmp_path / "ran").exists(), "the payload is harmless, so the test proves nothing"


@pytest.mark.filterwarnings("ignore:.*TorchScript", "ignore:.*torch.jit")
def test_a_compiled_program_is_refused(spandrel):
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(torch.nn.Identity()), buffer)
    with pytest.raises(CheckpointCorrupt, match="not a checkpoint of plain tensors"):
        read(buffer.getvalue(), ".pt")


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".safetensors"])
@pytest.mark.parametrize("keep", [0, 1, 50, -1, -400])
def test_a_truncated_file_is_refused(spandrel, suffix, keep):
    tensors = compact().state_dict()
    data = save_safetensors(tensors) if suffix == ".safetensors" else dumped(tensors)
    with pytest.raises(CheckpointCorrupt, match="not a checkpoint of plain tensors"):
        read(data[:keep], suffix)


@pytest.mark.parametrize("content", [torch.zeros(3), [1, 2], 7, None])
def test_a_file_that_holds_no_state_dict_is_refused(spandrel, content):
    with pytest.raises(CheckpointCorrupt, match="not a checkpoint of plain tensors"):
        read(dumped(content))


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".safetensors"])
def test_an_unknown_architecture_is_refused_by_name(spandrel, suffix):
    tensors = {"made.up.weight": torch.zeros(3)}
    data = save_safetensors(tensors) if suffix == ".safetensors" else dumped(tensors)
    with pytest.raises(RequestError, match="file:///x: no known architecture has these weights"):
        read(data, suffix)


def test_weights_that_only_look_like_a_known_architecture_are_refused(spandrel):
    tensors = compact().state_dict()
    tensors["body.0.weight"] = tensors["body.0.weight"][:, :, :1]
    with pytest.raises(CheckpointCorrupt, match="not a checkpoint"):
        read(dumped(tensors))


@pytest.mark.parametrize(
    ("fields", "found"),
    [({"upscale": 1}, "x1 from 3 to 3"), ({"upscale": 8}, "x8 from 3 to 3")],
)
def test_a_network_that_does_not_upscale_by_2_to_4_is_refused(spandrel, fields, found):
    with pytest.raises(RequestError, match=f"expected an upscaler x2, x3 or x4 .* found .*{found} channels"):
        read(dumped(compact(**fields).state_dict()))


def test_a_missing_file_is_an_unknown_model(tmp_path):
    with pytest.raises(UnknownModel, match="no checkpoint file at file://.*/none.pth"):
        load_model(f"file://{tmp_path}/none.pth")


def test_without_spandrel_the_way_to_install_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "spandrel", None)
    with pytest.raises(
        RequestError, match=r"public checkpoints need spandrel .* pip install --no-deps spandrel"
    ):
        read(dumped({"made.up.weight": torch.zeros(3)}))


# ---------------------------------------------------------------- the stand-in for torchvision


def test_a_stand_in_is_there_only_while_it_is_needed():
    with imported._stand_in("absent_package.some.part"):
        part = importlib.import_module("absent_package.some.part")
        assert part.rotate is None
        assert importlib.import_module("absent_package").some.part is part
    assert not any(name.startswith("absent_package") for name in sys.modules)


def test_a_package_that_is_installed_is_never_replaced(monkeypatch):
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    with imported._stand_in("colorsys.transforms"):
        assert "colorsys" not in sys.modules
        assert importlib.import_module("colorsys").rgb_to_hls


# ---------------------------------------------------------------- a real teacher


@pytest.fixture(scope="module")
def teacher(spandrel):
    return load_model(f"file://{Path(str(DATA)).absolute()}/teachers/dctlsa_x4.pt")


class Scaled(Imported):
    """A teacher whose output has another range."""

    def __init__(self, inner, factor):
        super().__init__(inner.spec, inner.network)
        self.factor = factor

    def forward(self, lr):
        return super().forward(lr) * self.factor


class Swapped(Imported):
    """A teacher that expects BGR."""

    def forward(self, lr):
        return super().forward(lr).flip(1)


@needs_data
def test_a_real_teacher_loads_and_is_worth_learning_from(teacher):
    spec = teacher.model.spec
    assert (spec.scale, spec.channels, spec.architecture) == (4, 3, "DCTLSA")
    with torch.no_grad():
        for size in ((5, 7), (17, 16)):
            sr = teacher.model(torch.rand(1, 3, *size))
            assert sr.shape == (1, 3, 4 * size[0], 4 * size[1])
    require_better_than_bicubic(teacher)


@needs_data
@pytest.mark.parametrize(
    "wrong",
    [lambda m: Scaled(m, 255), lambda m: Scaled(m, 0.9), lambda m: Swapped(m.spec, m.network)],
    ids=["range 0..255", "range 0..0.9", "BGR"],
)
def test_a_real_teacher_with_another_range_or_channel_order_is_refused(teacher, wrong):
    changed = LoadedModel(wrong(teacher.model).eval(), teacher.card)
    with pytest.raises(RequestError, match=r"teacher dctlsa_x4: expected at least 1 dB over bicubic"):
        require_better_than_bicubic(changed)
