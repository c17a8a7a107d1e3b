"""Detectors: measured strides, spiking everywhere, graphs that can be exported, losses and boxes as torchvision's."""
from __future__ import annotations

from functools import partial

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("torchvision")

from torch import fx, nn  # noqa: E402
from torchvision.models.detection.retinanet import RetinaNet as Reference  # noqa: E402
from torchvision.models.detection.retinanet import RetinaNetHead  # noqa: E402

from bitspike.layers import quantizable, quantize_, quantizers  # noqa: E402
from bitspike.models import detection as det  # noqa: E402
from bitspike.models.blocks import LayerScale, NormPad  # noqa: E402
from bitspike.models.compact_spikeformer import CompactSpikeformer  # noqa: E402
from bitspike.models.meta_spikeformer import MetaSpikeFormer  # noqa: E402
from bitspike.models.pyramid import Maps, Pyramid, measure, published_neuron, without_classifier  # noqa: E402
from bitspike.neurons import IELIF, LIF  # noqa: E402
from bitspike.spec import QuantSpec, Scheme  # noqa: E402

NEURON = partial(IELIF, 4, 2.0)


def backbone(time_steps=1):
    return det.small_backbone((8, 8, 16, 16), time_steps=time_steps)


def make(kind, seed=0, **options):
    torch.manual_seed(seed)
    options = {"width": 8, "levels": 3, "finest": 8, "neuron": NEURON, **options}
    if kind == "retinanet":
        return det.retinanet(backbone(), 5, convs=2, **options)
    return det.mask_rcnn(backbone(options.get("time_steps", 1)), 5, hidden=16, mask_convs=1, region_levels=2, canonical=56,
                         regions_sampled=16, candidates=(60, 60), proposals=(20, 20), masks=kind == "mask_rcnn", **options)


def awake(net):
    """In eval mode, with the statistics of these pictures and scores of which some pass the threshold."""
    torch.manual_seed(5)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    net.train()
    for _ in range(2):
        net(pictures(), targets())
    nn.init.normal_(net.dense.head.scores.weight, std=0.3)
    nn.init.zeros_(net.dense.head.scores.bias)
    return net.eval()


KINDS = ("mask_rcnn", "faster_rcnn", "retinanet")


def targets(size=64):
    masks = torch.zeros(2, size, size, dtype=torch.uint8)
    masks[0, 8:40, 4:36], masks[1, 20:60, 30:62] = 1, 1
    one = {"boxes": torch.tensor([[4.0, 8, 36, 40], [30, 20, 62, 60]]), "labels": torch.tensor([2, 5]), "masks": masks}
    none = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64),
            "masks": torch.zeros(0, size, size, dtype=torch.uint8)}
    return [one, none]


def pictures(count=2, size=64):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(3)) * 4 - 2


def test_strides_are_measured():
    assert measure(backbone()) == Maps((8, 8, 16, 16), (4, 8, 16, 16))
    net = make("mask_rcnn")
    assert net.strides == (8, 16, 32)
    assert net.regions.box_roi_pool.scales == net.regions.mask_roi_pool.scales == [1 / 8, 1 / 16]
    maps, scores, deltas = net.eval().dense(pictures())
    assert [m.shape[-1] for m in maps] == [s.shape[-1] for s in scores] == [8, 4, 2]
    assert [tuple(d.shape[:2]) for d in deltas] == [(2, 12)] * 3
    # both maps of stride 16 take part, in one level
    assert net.dense.neck.sources == ((1,), (2, 3))


def test_default_pyramid_is_the_published_one():
    neck = Pyramid(Maps((64, 128, 256, 360), (4, 8, 16, 16)))
    assert neck.strides == (4, 8, 16, 32, 64)
    assert {c.conv.out_channels for c in neck.smooth} == {256}
    net = det.mask_rcnn(MetaSpikeFormer((8, 8, 16, 16), (1, 1), 2), width=8)
    assert net.anchors.sizes == ((32,), (64,), (128,), (256,), (512,))
    assert net.regions.box_head.fc1.conv.out_channels == 1024
    assert len(net.regions.mask_head.convs) == 4


@pytest.mark.parametrize("training", [True, False])
def test_neck_has_the_published_range_in_both_modes(training):
    neck = Pyramid(Maps((4,), (8,)), 4, levels=1).train(training)
    counts = neck.smooth[0].neuron(torch.tensor([[-1.0, 0.4, 0.6, 2.4, 3.6, 9.0]]))
    assert counts.tolist() == [[0, 0, 1, 2, 4, 4]]
    assert published_neuron().levels == 4


def test_backbones_that_do_not_fit():
    with pytest.raises(TypeError, match=r"Linear has no forward_features"):
        det.retinanet(nn.Linear(3, 3))
    with pytest.raises(ValueError, match=r"CompactSpikeformer: its maps of a picture of 64 pixels have sides \[31, 15, 7\]"):
        det.retinanet(CompactSpikeformer((8, 8, 8), heads=2))
    with pytest.raises(ValueError, match=r"strides \(4, 16\); each must be twice"):
        Pyramid(Maps((4, 4), (4, 16)))
    with pytest.raises(ValueError, match="finest=64"):
        Pyramid(Maps((4, 4), (4, 8)), finest=64)
    with pytest.raises(ValueError, match=r"region_levels=4; allowed: 1\.\.3"):
        det.mask_rcnn(backbone(), levels=3)


def test_classifier_is_taken_off():
    net = without_classifier(backbone())
    assert isinstance(net.head, nn.Identity)
    assert isinstance(net.neuron, nn.Identity)
    assert not any(name.startswith("head") for name in quantizable(net))


@pytest.mark.parametrize("bits", [4, 32])
@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_gets_a_finite_gradient(kind, bits):
    net = make(kind)
    if bits < 32:
        quantize_(net, QuantSpec({"*": Scheme("lsq", bits)}))
        assert {name for name, _ in quantizers(net)} == set(quantizable(net))
    losses = net(pictures(), targets())
    assert set(losses) >= {"loss_classifier", "loss_box_reg"}
    assert ("loss_mask" in losses) == (kind == "mask_rcnn")
    sum(losses.values()).backward()
    for name, p in net.named_parameters():
        if p.requires_grad:
            assert p.grad is not None and torch.isfinite(p.grad).all(), name


@pytest.mark.parametrize("kind", KINDS)
def test_pictures_without_objects_train(kind):
    net = make(kind)
    losses = net(pictures(1), targets()[1:])
    sum(losses.values()).backward()
    assert all(torch.isfinite(v) for v in losses.values())
    assert all(p.grad is not None for p in net.parameters() if p.requires_grad)


def test_crowds_are_left_out():
    one = targets()[0]
    alone = {name: value[:1] for name, value in one.items()}
    losses = []
    for target in ({**one, "iscrowd": torch.tensor([0, 1])}, alone):
        torch.manual_seed(1)
        losses.append(make("mask_rcnn")(pictures(1), [target]))
    assert losses[0] == losses[1]


@pytest.mark.parametrize("kind", KINDS)
def test_products_have_counts_on_one_side(kind):
    net = quantize_(make(kind), QuantSpec({"*": Scheme("uniform", 4)}))
    seen = []

    def look(name):
        def hook(module, inputs):
            counts = inputs[0] * 2  # the neuron's gain
            assert torch.equal(counts, counts.round()), name
            assert counts.min() >= 0 and counts.max() <= 4, name
            seen.append(name)
        return hook

    layers = quantizable(net)
    for name, layer in layers.items():
        if name != "dense.backbone.stem.conv":
            layer.register_forward_pre_hook(look(name))
    net(pictures(), targets())
    assert set(seen) == set(layers) - {"dense.backbone.stem.conv"}


class Tracer(fx.Tracer):
    def is_leaf_module(self, module, name):
        return isinstance(module, LIF | IELIF | NormPad | LayerScale) or super().is_leaf_module(module, name)


@pytest.mark.parametrize("kind", KINDS)
def test_parts_are_graphs(kind):
    net = make(kind).eval()
    parts = [net.dense]
    if kind != "retinanet":
        parts.append(net.regions.box_head)
    if kind == "mask_rcnn":
        parts.append(net.regions.mask_head)
    for part in parts:
        graph = Tracer().trace(part)
        functions = {n.target.__name__ for n in graph.nodes if n.op == "call_function"}
        assert functions <= {"add", "mul", "as_sequence", "spike_attention", "interpolate"}
        assert {n.target for n in graph.nodes if n.op == "call_method"} <= {"mean", "flatten"}
        modules = {type(part.get_submodule(n.target)).__name__ for n in graph.nodes if n.op == "call_module"}
        assert modules <= {"Conv2d", "BatchNorm2d", "IELIF", "LayerScale"}
        assert {n.target for n in graph.nodes if n.op == "call_module"} >= set(quantizable(part))
        # the first thing that happens to a region is a neuron
        if part is not net.dense:
            first = next(n for n in graph.nodes if n.op == "call_module")
            assert isinstance(part.get_submodule(first.target), IELIF)


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_of_two_is_two_batches_of_one(kind):
    net = awake(make(kind))
    x = pictures()
    with torch.no_grad():
        both, single = net(x), [net(x[i : i + 1])[0] for i in range(2)]
        listed = net([x[0], x[1]])
    for a, b, c in zip(both, single, listed, strict=True):
        assert len(a["scores"]) > 0
        for key in a:
            assert torch.allclose(a[key].float(), b[key].float(), atol=1e-4), key
            assert torch.equal(a[key], c[key])


def test_detections_stay_in_the_picture():
    net = awake(make("mask_rcnn"))
    with torch.no_grad():
        inside = net(pictures(1), [{"size": torch.tensor([40, 50])}])[0]
        raw = net.detect(pictures(1), [{"size": torch.tensor([40, 50])}])[0]
        odd = net([pictures(1)[0, :, :40, :50]])[0]
    assert inside["boxes"][:, 2].max() <= 50 and inside["boxes"][:, 3].max() <= 40
    assert tuple(inside["masks"].shape[1:]) == (1, 40, 50)
    assert tuple(raw["masks"].shape[1:]) == (1, 28, 28)
    assert tuple(odd["masks"].shape[1:]) == (1, 40, 50)
    assert (inside["scores"].diff() <= 0).all() and set(inside["labels"].tolist()) <= set(range(1, 6))


def test_nothing_found():
    net = make("mask_rcnn").eval()
    net.regions.score_thresh = 1.0
    with torch.no_grad():
        found = net(pictures(1))[0]
    assert tuple(found["boxes"].shape) == (0, 4)
    assert tuple(found["masks"].shape) == (0, 1, 64, 64)


def test_time_steps():
    net = make("mask_rcnn", time_steps=2).eval()
    with torch.no_grad():
        assert [m.shape[0] for m in net.dense(pictures())[0]] == [2] * 3
        film = pictures()[None].expand(2, -1, -1, -1, -1)
        a, b = net(pictures()), net(film)
    assert torch.equal(a[0]["boxes"], b[0]["boxes"])


def test_errors():
    net = make("mask_rcnn")
    good = targets()
    with pytest.raises(ValueError, match="2 pictures but 1 targets"):
        net(pictures(), good[:1])
    with pytest.raises(ValueError, match="needs targets"):
        net(pictures())
    for key, value, message in (("labels", torch.tensor([0, 2]), r"labels 0\.\.2; allowed: 1\.\.5"),
                                ("labels", torch.tensor([1]), r"boxes \[2, 4\] and labels \[1\]"),
                                ("boxes", torch.tensor([[1.0, 1, 5, 5], [5, 5, 5, 9]]), "box without area")):
        with pytest.raises(ValueError, match=message):
            net(pictures(), [{**good[0], key: value}, good[1]])


class _Backbone(nn.Module):
    out_channels = 8


@pytest.mark.parametrize("seed", range(3))
def test_retinanet_computes_torchvisions_losses_and_boxes(seed):
    net = awake(make("retinanet", seed))
    batch = net._batch(pictures(), None)
    with torch.no_grad():
        logits, deltas, levels = net._predict(batch)
        anchors = [torch.cat(levels)] * 2
        # torchvision has a class more: its labels count from 0, here with the background
        dull = [torch.cat([x.new_full((*x.shape[:2], 1), -1e4), x], 2) for x in logits]
        said = {"cls_logits": torch.cat(dull, 1), "bbox_regression": torch.cat(deltas, 1)}
        theirs = Reference(_Backbone(), 6, anchor_generator=net.anchors, head=RetinaNetHead(8, 9, 6))
        expected = theirs.compute_loss(targets(), said, anchors)
        ours = net._losses(batch, targets())
        assert torch.allclose(ours["loss_classifier"], expected["classification"], rtol=1e-5)
        assert torch.allclose(ours["loss_box_reg"], expected["bbox_regression"], rtol=1e-5)
        theirs.detections_per_img = net.most
        found = theirs.postprocess_detections({"cls_logits": dull, "bbox_regression": deltas}, [list(levels)] * 2,
                                              batch.image_sizes)
        for a, b in zip(net._detect(batch), found, strict=True):
            assert len(a["scores"]) > 0
            for key in a:
                assert torch.equal(a[key], b[key])
