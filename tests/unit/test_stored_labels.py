"""Training from what is stored of a teacher is training with the teacher: same batches, same gradients."""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn

from kdsr import shards
from kdsr.checkpoint import save_model
from kdsr.config import DataConfig, DistillConfig, RealWorldDegradation, StoredFeatures, TeacherConfig
from kdsr.degrade import build_degradation, degradation_name
from kdsr.engine import Engine
from kdsr.errors import DataError, KdsrError, RequestError
from kdsr.label import (
    DEGRADATION,
    Labeller,
    label_shard,
    labelled_index,
    plan_labels,
    read_directions,
    zoom_places,
)
from kdsr.models import build_model
from kdsr.models.imported import Imported
from kdsr.objectives import build_objective, label_columns, needs_live_teacher, stored_ranks, why_live
from kdsr.observe import Observer
from kdsr.pairs import PairMaker, PatchReader
from kdsr.shards import read_index, read_row_group, write_index
from kdsr.spec import Card, EdsrSpec, EspcnSpec, ImportedSpec, ShardIndex, UnetSpec, ZoomConfig
from kdsr.store import open_store
from kdsr.terms import (
    AdversarialTerm,
    AffinityTerm,
    AttentionTerm,
    CriticTerm,
    FeatureTerm,
    OutputTerm,
    PixelTerm,
    StatisticsTerm,
    TapPair,
    UpcyclingTerm,
    VariationalTerm,
)
from kdsr.training import check, train
from kdsr.upscale import Upscaler
from tests.pictures import photograph
from tests.small_shards import row, write_set

SCALE = 2
TEACHER = EdsrSpec(scale=2, num_features=8, num_blocks=2)
STUDENT = EspcnSpec(scale=2, num_features=4)
CARD = Card(name="teacher", spec=TEACHER, num_parameters=1, sha256="a" * 64)
TAPS = (TapPair(student="body.1", teacher="trunk.0"), TapPair(student="body.3", teacher="trunk"))
ALL = [StoredFeatures(tap="trunk.0", rank=8), StoredFeatures(tap="trunk", rank=64)]
FEW = [StoredFeatures(tap="trunk.0", rank=3), StoredFeatures(tap="trunk", rank=3)]
ZOOM = ZoomConfig(num_crops=2, side=10)
OUTPUT, AFFINITY = [PixelTerm(), OutputTerm()], [PixelTerm(), AffinityTerm(taps=TAPS, pool=4)]
ZOOM_IN = [PixelTerm(), UpcyclingTerm(zoom_out=False)]
TAPPED = [
    FeatureTerm(taps=TAPS),
    StatisticsTerm(taps=TAPS),
    AttentionTerm(taps=TAPS),
    AffinityTerm(taps=TAPS, pool=4),
    AffinityTerm(taps=TAPS, pool=4, over="channels"),
    VariationalTerm(taps=TAPS),
    CriticTerm(taps=TAPS),
]


def network(spec, seed=0):
    torch.manual_seed(seed)
    model = build_model(spec)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.requires_grad_(False).eval()


def pixelwise(spec=TEACHER, seed=0):
    """A network that looks at nothing but its pixel: what it says turns and moves with the picture."""
    model = network(spec, seed)
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, nn.Conv2d) and layer.kernel_size == (3, 3):
                layer.weight[:, :, torch.arange(3) != 1] = 0
                layer.weight[:, :, :, torch.arange(3) != 1] = 0
                if layer.out_channels == spec.num_features * SCALE**2:
                    # Each LR pixel becomes one colour: a block of it may be turned.
                    for tensor in (layer.weight, layer.bias):
                        tensor.copy_(tensor[:: SCALE**2].repeat_interleave(SCALE**2, 0))
    return model


@dataclass
class Place:
    """Shards, what is made of them, and by whom."""

    source: object
    index: ShardIndex
    target: object
    model: nn.Module
    card: Card = CARD

    def labeller(self, features=(), zoom=None):
        observer = Observer(self.model, [each.tap for each in features]) if features else None
        labels = plan_labels(
            self.source,
            self.index,
            self.target,
            card=self.card,
            observer=observer,
            features=features,
            zoom=zoom,
        )
        directions = read_directions(self.target, labels.basis)
        return Labeller(Upscaler(Engine(self.model)), labels, observer, directions)

    def label(self, features=(), zoom=None):
        labeller = self.labeller(features, zoom)
        entries = [
            label_shard(
                self.source,
                entry,
                self.target,
                labeller=labeller,
                teacher_sha256=self.card.sha256,
                row_group_bytes=1,
            )
            for entry in self.index.shards
        ]
        labelled = labelled_index(self.index, entries, self.card, labeller.labels)
        write_index(self.target, labelled)
        return labelled


@pytest.fixture
def place(tmp_path):
    source, target = (open_store(f"file://{tmp_path}/{name}") for name in ("shards", "labelled"))
    rows = [row(f"photo-{i}", photograph(i, height=32, width=32), heldout=i == 2) for i in range(3)]
    return Place(source, write_set(source, [rows]), target, network(TEACHER, 1))


def batch_of(place, index, terms, *, patch_size=16, context=0, augment=False, **fields):
    reader = PatchReader(
        store=place.target,
        index=index,
        data=DataConfig(
            shards=place.target.uri, patch_size=patch_size, patches_per_row=4, window_rows=4, augment=augment
        ),
        scale=SCALE,
        context=context,
        batch_size=8,
        seed=0,
        columns=("image", *label_columns(terms, index)),
        **fields,
    )
    stream = reader.batches()
    batch = next(stream)
    stream.close()
    return PairMaker(build_degradation(DEGRADATION, SCALE), SCALE, context, 3, torch.device("cpu"))(batch)


def live(pair):
    return replace(pair, teacher_sr=None, teacher_features=None, zoom=None)


def gradients(pair, terms, *, teacher=None, index=None):
    """Of the student, with what is stored when `index` is given, or with a live teacher."""
    student = network(STUDENT, 2).requires_grad_(True)
    torch.manual_seed(3)
    stored = stored_ranks(terms, index) if index else {}
    objective = build_objective(student, terms, teacher=teacher, scale=SCALE, stored=stored)
    torch.manual_seed(4)
    sum(objective(pair).values()).backward()
    reached = [parameter.grad.flatten() for parameter in student.parameters() if parameter.grad is not None]
    return torch.cat(reached)


def apart(one, other):
    return ((one - other).norm() / other.norm()).item()


class Rounded(nn.Module):
    """A teacher that answers in 8 bits."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, lr):
        return (self.model(lr).clamp(0, 1) * 255).round() / 255


# ---------------------------------------------------------------- the same gradients


def test_stored_outputs_pull_like_a_live_teacher_that_answers_in_8_bits(place):
    pair = batch_of(place, place.label(), OUTPUT)
    teacher = Rounded(place.model)
    # What is halfway between two levels may fall to either side where sums are made in another order.
    levels_apart = (255 * (pair.teacher_sr - teacher(pair.lr))).abs().round()
    assert levels_apart.max() <= 1 and levels_apart.mean() < 1e-3
    assert apart(gradients(pair, OUTPUT), gradients(live(pair), OUTPUT, teacher=teacher)) < 1e-3


@pytest.mark.parametrize("term", TAPPED, ids=lambda term: f"{term.kind}-{getattr(term, 'over', '')}")
def test_features_of_full_rank_pull_like_a_live_teacher(place, term):
    """All that differs is float16."""
    index = place.label(ALL)
    pair = batch_of(place, index, [term])
    assert (
        apart(gradients(pair, [term], index=index), gradients(live(pair), [term], teacher=place.model)) < 0.01
    )


def test_reduced_features_are_the_live_ones_in_the_stored_directions(place):
    index = place.label(FEW)
    pair = batch_of(place, index, AFFINITY)
    directions = read_directions(place.target, index.labels.basis)
    _, seen = Observer(place.model, ["trunk.0", "trunk"])._pass(pair.lr)
    for stored in index.labels.taps:
        basis = directions[stored.tap].vectors[:, : stored.rank]
        expected = torch.einsum("fr,bfhw->brhw", basis, seen[stored.tap])
        assert torch.allclose(pair.teacher_features[stored.tap], expected, rtol=2e-3, atol=2e-3)
        assert torch.allclose(basis.T @ basis, torch.eye(stored.rank), atol=1e-5)
        energy = expected.square().sum() / seen[stored.tap].square().sum()
        assert energy.item() == pytest.approx(stored.kept, abs=0.1) and 0.5 < stored.kept < 1


def test_a_stored_answer_to_a_zoomed_in_input_is_the_live_one(place):
    index = place.label(zoom=ZOOM)
    pair = batch_of(place, index, ZOOM_IN, patch_size=12)
    assert pair.zoom.lr.shape == (8, 3, 10, 10)
    expected = Rounded(place.model)(pair.zoom.lr)
    assert torch.allclose(pair.zoom.teacher_sr, expected, atol=1.01 / 255)
    assert expected.std() > 0.01


def test_a_stored_answer_is_what_zooming_in_learns(place):
    pair = batch_of(place, place.label(zoom=ZOOM), ZOOM_IN)
    white = replace(pair, zoom=replace(pair.zoom, teacher_sr=torch.ones_like(pair.zoom.teacher_sr)))
    assert apart(gradients(pair, ZOOM_IN), gradients(white, ZOOM_IN)) > 0.1


@pytest.mark.parametrize("context", [2, 3])
def test_what_is_stored_is_cut_and_turned_with_the_patch(place, context):
    place.model = pixelwise()
    terms = [*OUTPUT, *AFFINITY[1:], *ZOOM_IN[1:]]
    index = place.label(ALL, ZOOM)
    pair = batch_of(place, index, terms, patch_size=8, context=context, augment=True)
    _, seen = Observer(place.model, ["trunk.0", "trunk"])._pass(pair.lr)
    for tap, features in pair.teacher_features.items():
        assert features.shape == (8, 8, 8, 8)
        assert torch.allclose(features, seen[tap], rtol=2e-3, atol=2e-3)
    answer = Rounded(place.model)
    assert torch.allclose(pair.teacher_sr, answer(pair.lr), atol=1.01 / 255)
    assert torch.allclose(pair.zoom.teacher_sr, answer(pair.zoom.lr), atol=1.01 / 255)


def test_the_patches_do_not_depend_on_what_is_read_beside_them(place):
    index = place.label(ALL, ZOOM)
    found = [batch_of(place, index, terms, patch_size=8, augment=True) for terms in ([], AFFINITY, ZOOM_IN)]
    assert torch.equal(found[0].hr, found[1].hr) and torch.equal(found[0].hr, found[2].hr)
    assert found[0].teacher_features is None and found[1].zoom is None and found[1].teacher_sr is None
    again = batch_of(place, index, ZOOM_IN, patch_size=8, augment=True)
    assert torch.equal(again.zoom.lr, found[2].zoom.lr)


def test_patches_begin_where_coarse_features_have_a_place(place):
    place.model = network(UnetSpec(scale=2, num_features=4, num_levels=2), 1)
    index = place.label([StoredFeatures(tap="bottom", rank=3)])
    (stored,) = index.labels.taps
    assert (stored.stride, stored.rank, stored.width) == (4, 3, 16)
    terms = [AttentionTerm(taps=(TapPair(student="body.1", teacher="bottom"),))]
    pair = batch_of(place, index, terms, patch_size=8, context=2)
    assert pair.teacher_features["bottom"].shape == (8, 3, 2, 2)
    with pytest.raises(RequestError, match="choose a multiple of 4"):
        batch_of(place, index, terms, patch_size=9)


# ---------------------------------------------------------------- what is made, and made again


def test_labels_are_described_in_the_index_and_survive_their_store(place):
    index = place.label(FEW, ZOOM)
    assert read_index(place.target) == index
    assert [(tap.tap, tap.rank, tap.width) for tap in index.labels.taps] == [
        ("trunk.0", 3, 8),
        ("trunk", 3, 8),
    ]
    assert index.labels.zoom == ZOOM and index.labels.degradation == "bicubic"
    own = read_row_group(place.target, index.shards[0], 0)[0]
    assert shards.row_features(own, "trunk").shape == (3, 16, 16)
    places = zoom_places(own, ZOOM)
    assert [(crop.y, crop.x) for crop in own.zoom] == [(box.top, box.left) for box in places]


def test_an_index_from_before_features_still_reads(place):
    old = place.label().model_dump(exclude={"labels"})
    index = ShardIndex.model_validate(old)
    assert index.labels is None and index.carried.taps == () and index.carried.degradation == "bicubic"


def test_a_rerun_changes_no_byte_and_other_labels_lie_beside_the_first(place):
    def files():
        return {info.key: (info.etag, place.target.get(info.key)) for info in place.target.list()}

    def without_index():
        return {key: data for key, data in files().items() if key != "index.json"}

    first = place.label(FEW, ZOOM)
    before = without_index()
    assert place.label(FEW, ZOOM) == first and without_index() == before
    keys = {entry.key for entry in first.shards}
    for features, zoom in ((FEW, None), (FEW[:1], ZOOM), (ALL, ZOOM), ((), None)):
        others = {entry.key for entry in place.label(features, zoom).shards}
        assert not keys & others
        keys |= others
        assert files().items() >= before.items()
    assert place.label(FEW, ZOOM) == first


def test_broken_directions_are_refused(place):
    basis = place.label(FEW).labels.basis
    place.target.put(basis.key, place.target.get(basis.key)[:-1] + b"x")
    with pytest.raises(DataError, match="not the directions that the labels name"):
        read_directions(place.target, basis)


@pytest.mark.parametrize(
    ("spec", "tap", "words"),
    [
        (TEACHER, "nowhere", "the teacher has no tap 'nowhere'; it has head, trunk.0"),
        (EdsrSpec(scale=2, num_features=8, num_blocks=1), "trunk.5", "has no tap"),
    ],
)
def test_taps_that_cannot_be_stored_are_refused_by_name(place, spec, tap, words):
    place.model = network(spec)
    with pytest.raises(RequestError, match=words):
        place.label([StoredFeatures(tap=tap)])


def test_features_on_a_finer_grid_than_lr_are_refused(place):
    layers = nn.Sequential(nn.Conv2d(3, 12, 3, padding=1), nn.PixelShuffle(2))
    place.model = Imported(ImportedSpec(scale=2, architecture="plain"), layers)
    with pytest.raises(
        RequestError, match=r"'network.1' of the teacher gives features of 64 x 64 for LR of 32"
    ):
        place.label([StoredFeatures(tap="network.1")])


def test_features_beyond_float16_are_refused(place):
    with torch.no_grad():
        place.model.head.weight.mul_(1e6)
    with pytest.raises(DataError, match="float16 ends at 65504"):
        place.label([StoredFeatures(tap="head", rank=8)])


# ---------------------------------------------------------------- who must be live


def test_labels_say_for_which_terms_the_teacher_is_not_needed(place):
    index = place.label(FEW, ZOOM)
    for terms in (OUTPUT, AFFINITY, ZOOM_IN, [AdversarialTerm(real="teacher")]):
        assert not needs_live_teacher(terms, index)
    other = [AttentionTerm(taps=(TapPair(student="body.1", teacher="head"),))]
    assert list(why_live([*AFFINITY, *other], index)) == ["features of head"]
    assert stored_ranks([*AFFINITY, *other], index) == {}
    assert "zoom_out" in "".join(why_live([UpcyclingTerm()], index))
    assert list(why_live(OUTPUT, place.index)) == ["its output"]


def test_only_columns_that_terms_ask_for_are_read(place):
    index = place.label(FEW, ZOOM)
    assert label_columns(OUTPUT, index) == ("teacher_sr",)
    assert label_columns(AFFINITY, index) == ("teacher_features/trunk.0", "teacher_features/trunk")
    assert label_columns(ZOOM_IN, index) == ("zoom",)
    assert label_columns([PixelTerm()], index) == ()


def distilling(place, tmp_path, terms, **fields):
    return DistillConfig(
        data=DataConfig(shards=place.target.uri, patch_size=8, patches_per_row=4),
        student=STUDENT,
        teacher=TeacherConfig(uri=f"{tmp_path}/teacher"),
        terms=terms,
        output=str(tmp_path / "runs"),
        batch_size=4,
        num_steps=2,
        num_validation_images=0,
        **fields,
    )


@pytest.fixture
def forgotten(place, tmp_path):
    """Shards that are labelled by a teacher whose weights are gone; its card is left."""
    store = open_store(f"file://{tmp_path}/teacher")
    place.card = save_model(store, place.model, CARD)
    place.label(FEW, ZOOM)
    store.delete("model.safetensors")
    return place


def test_a_run_whose_terms_are_all_stored_needs_no_weights_of_the_teacher(forgotten, tmp_path):
    terms = (*OUTPUT, *AFFINITY[1:], *ZOOM_IN[1:], FeatureTerm(taps=TAPS))
    *_, last = train(distilling(forgotten, tmp_path, terms, name="all"))
    assert {"affinity", "features_l1", "upcycling", "output_l1"} <= last.metrics.keys()


def test_a_tap_that_is_not_stored_asks_for_the_teacher_itself(forgotten, tmp_path):
    other = AttentionTerm(taps=(TapPair(student="body.1", teacher="head"),))
    with pytest.raises(KdsrError, match=r"model\.safetensors"):
        check(distilling(forgotten, tmp_path, (PixelTerm(), other), name="other"))


def test_a_degradation_is_named_by_all_that_it_does():
    names = {degradation_name(RealWorldDegradation()), degradation_name(DEGRADATION)}
    assert len(names) == 2 and "bicubic" in names
