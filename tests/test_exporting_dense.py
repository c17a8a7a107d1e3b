"""Segmenters and detectors as integer files: the same pixels and boxes as torch's."""
from __future__ import annotations

import json
from functools import partial

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("torchvision")

from PIL import Image  # noqa: E402
from torch import nn  # noqa: E402

from bitspike.deploy import Detector, Segmenter, load  # noqa: E402
from bitspike.deploy.preprocess import letterbox, on_canvas  # noqa: E402
from bitspike.deploy.tasks import Letterbox  # noqa: E402
from bitspike.exporting import ExportError, export_detector, export_segmenter  # noqa: E402
from bitspike.layers import latent_weight, norms_anew, quantize_  # noqa: E402
from bitspike.models import detection as det  # noqa: E402
from bitspike.models.blocks import SpikeConv  # noqa: E402
from bitspike.models.segmentation import predicted_logits, semantic_fpn_small, slide  # noqa: E402
from bitspike.neurons import IELIF  # noqa: E402
from bitspike.profiling import profile  # noqa: E402
from bitspike.spec import QuantSpec, Scheme  # noqa: E402

HOW = Letterbox(64, 96, 32, (128, 128, 128))
MEAN, STD = [128 / 255] * 3, [0.25]
FOUR_BITS = QuantSpec([("*", Scheme("lsq", 4))])


def pictures(count: int = 4) -> list[np.ndarray]:
    """Soft random pictures, two of them upright."""
    rng = np.random.default_rng(0)
    soft = [Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8)).resize((100, 70)) for _ in range(count)]
    return [np.array(p.transpose(Image.Transpose.ROTATE_90) if i % 2 else p) for i, p in enumerate(soft)]


def inputs() -> list[torch.Tensor]:
    scenes = [letterbox(p, HOW).pixels for p in pictures()]
    return [(torch.from_numpy(s.copy()).permute(2, 0, 1)[None].float() / 255 - MEAN[0]) / STD[0] for s in scenes]


def livened(layer: nn.Module, std: float) -> None:
    nn.init.normal_(latent_weight(layer), std=std)


@pytest.fixture(scope="module")
def segmenter() -> nn.Module:
    torch.manual_seed(0)
    net = semantic_fpn_small(5, widths=(8, 8, 16, 16), heads=2, width=8)
    quantize_(net, FOUR_BITS)
    with torch.no_grad(), norms_anew(net):
        net.train()
        for x in inputs():
            net(x)
    livened(net.classes.conv, 0.3)
    return net.eval()


def detector(kind: str) -> nn.Module:
    torch.manual_seed(0)
    options = {"width": 8, "levels": 3, "finest": 8, "neuron": partial(IELIF, 4, 2.0)}
    back = det.small_backbone((8, 8, 16, 16))
    net = (det.retinanet(back, 5, convs=1, **options) if kind == "retinanet" else
           det.mask_rcnn(back, 5, hidden=16, mask_convs=1, region_levels=2, canonical=56, regions_sampled=16,
                         candidates=(60, 60), proposals=(20, 20), masks=kind == "mask_rcnn", **options))
    quantize_(net, FOUR_BITS)
    target = {"boxes": torch.tensor([[5.0, 8, 40, 50]]), "labels": torch.tensor([2]),
              "masks": torch.ones(1, 96, 96, dtype=torch.uint8)}
    with torch.no_grad(), norms_anew(net):
        net.train()
        for x in inputs():
            net(x, [{**target, "masks": target["masks"][:, : x.shape[2], : x.shape[3]]}])
    torch.manual_seed(1)  # however much was drawn for the sampling
    livened(net.dense.head.scores, 0.5)
    livened(net.dense.head.deltas, 0.1)
    nn.init.normal_(net.dense.head.scores.bias)  # few scores are equal
    if kind != "retinanet":
        livened(net.regions.box_head.classes, 2.0)
        livened(net.regions.box_head.deltas, 0.3)
    return net.eval()


def written(model: nn.Module, path, **more):
    export = export_segmenter if hasattr(model, "branches") else export_detector
    return export(model, path, mean=MEAN, std=STD, letterbox=HOW, classes=[f"class {i}" for i in range(5)],
                  calibration_images=pictures(), name="small", **more)


def test_a_segmenter_gives_torchs_pixels(segmenter, tmp_path):
    report = written(segmenter, tmp_path / "a.bitspike")
    assert report.agreement >= 0.99 and "the pixels of 4 pictures" in str(report)
    net = load(tmp_path / "a.bitspike")
    assert isinstance(net, Segmenter) and net.header["stride"] == 4
    stored = net.header["provenance"]["agreement"]
    assert stored["share"] == report.agreement and stored["number"] == 4 * 7000
    assert {op.name for op in net.program.ops} >= {"upsample", "conv", "quantize", "add"}
    for picture, x in zip(pictures(), inputs(), strict=True):
        with torch.no_grad():
            expected = segmenter(x)[0].permute(1, 2, 0).numpy()
        assert np.abs(net.outputs(net.scene(picture))[0] - expected).max() < 1e-4
        assert net([picture])[0].shape == picture.shape[:2]


@pytest.mark.parametrize("how", [Letterbox(150, 0, 32, (128, 128, 128)), Letterbox(61, 87, 32, (128, 128, 128))])
def test_windows_give_torchs_pixels(segmenter, tmp_path, how):
    """Several windows each way, and pictures that are smaller than one."""
    window, given = 96, [*pictures(3), pictures(1)[0][:37, :41]]
    report = export_segmenter(segmenter, tmp_path / "a.bitspike", mean=MEAN, std=STD, letterbox=how,
                              classes=[f"class {i}" for i in range(5)], calibration_images=given, name="small", window=window)
    assert report.agreement >= 0.99
    net = load(tmp_path / "a.bitspike")
    assert net.header["windows"] == {"side": 96, "step": 64}
    counts, same, pixels = set(), 0, 0
    for picture in given:
        scene = net.scene(picture)
        counts.add(len(list(net.in_windows(scene))))
        x = (torch.from_numpy(scene.pixels.copy()).permute(2, 0, 1)[None].float() / 255 - MEAN[0]) / STD[0]
        logits = slide(segmenter, x, window)
        found = net.logits(scene)
        np.testing.assert_allclose(found, logits[0].permute(1, 2, 0), atol=1e-4)
        wanted = predicted_logits(logits[0], scene.pixels.shape[:2], scene.size, scene.original).argmax(0).numpy()
        answer = net([picture])[0]
        assert answer.shape == picture.shape[:2]
        same, pixels = same + int((answer == wanted).sum()), pixels + wanted.size
    assert same / pixels >= 0.99
    assert counts == {6 if how.short == 150 else 1}


def test_a_profile_counts_windows(segmenter, tmp_path):
    for name, more in (("whole", {}), ("windows", {"window": 64})):
        written(segmenter, tmp_path / name, min_agreement=0, **more)
    whole, windows = (profile(tmp_path / name, pictures(1)) for name in ("whole", "windows"))
    for one, many in zip(whole.layers, windows.layers, strict=True):  # the canvas is 64 x 96: two windows
        assert (many.macs, many.weights) == (one.macs * 2 * 64 // 96, one.weights)


def test_a_window_must_fit_the_borders(segmenter, tmp_path):
    with pytest.raises(ExportError, match=r"window=70: it must be a multiple of 32"):
        written(segmenter, tmp_path / "a.bitspike", window=70)


@pytest.mark.parametrize("kind", ["mask_rcnn", "faster_rcnn", "retinanet"])
def test_a_detector_gives_torchs_boxes(kind, tmp_path):
    model = detector(kind)
    report = written(model, tmp_path / "a.bitspike", min_agreement=0.9)
    assert report.agreement >= 0.9 and "detections" in str(report)
    net = load(tmp_path / "a.bitspike")
    assert isinstance(net, Detector)
    assert set(net.parts) == {"mask_rcnn": {"box", "mask"}, "faster_rcnn": {"box"}, "retinanet": set()}[kind]
    assert net.program.ops[0].layer.startswith("dense.backbone")
    picture, x = pictures()[0], inputs()[0]
    scene = net.scene(picture)
    with torch.no_grad():
        (expected,) = model.detect(x, [{"size": torch.tensor(scene.size)}])
    found = net.detect(scene)
    n = 3  # the best ones; at the end of the list equal scores decide who stays
    assert len(found["scores"]) >= n
    np.testing.assert_allclose(found["scores"][:n], expected["scores"][:n], atol=1e-4)
    np.testing.assert_allclose(found["boxes"][:n], expected["boxes"][:n], atol=1e-2)
    assert found["labels"][:n].tolist() == (expected["labels"][:n] - 1).tolist()
    if kind == "mask_rcnn":
        assert found["masks"].shape[1:] == (28, 28)
        np.testing.assert_allclose(found["masks"][:n], expected["masks"][:n, 0], atol=1e-3)


def test_shared_convolutions_are_stored_once(tmp_path):
    model = detector("retinanet")
    written(model, tmp_path / "a.bitspike", min_agreement=0)
    net = load(tmp_path / "a.bitspike")
    conv = [op for op in net.header["program"] if op.get("layer") == "dense.head.scores"]
    assert len(conv) == 3 and len({op["weight"] for op in conv}) == 1
    report = profile(net, pictures())
    assert sum(layer.weights for layer in report.layers) == sum(p.numel() for name, p in model.dense.named_parameters()
                                                               if p.dim() == 4 and "alpha" not in name)


def test_profile_counts_regions(tmp_path):
    model = detector("mask_rcnn")
    written(model, tmp_path / "a.bitspike", min_agreement=0)
    net = load(tmp_path / "a.bitspike")
    report = profile(tmp_path / "a.bitspike", pictures())
    # a profile shows every picture on the canvas of the header, not on its own
    traces = [net.trace(on_canvas(p, *net.input_shape[:2], net.letterbox.border)) for p in pictures()]
    seen = {name: sum(t[name]["pixels"].shape[1] for t in traces if name in t) / len(traces) for name in ("box", "mask")}
    assert 0 < seen["mask"] != seen["box"] <= 20
    for name, part, each, weights in (("regions.box_head.fc1.conv", "box", 7 * 7 * 8 * 16, 7 * 7 * 8 * 16),
                                      ("regions.mask_head.masks", "mask", 28 * 28 * 8 * 6, 8 * 6)):
        layer = next(layer for layer in report.layers if layer.name == name)
        assert (layer.macs, layer.weights) == (round(seen[part] * each), weights)
    assert json.dumps(report.to_dict())


def test_refusals(segmenter, tmp_path):
    with pytest.raises(ExportError, match=r"of 5; found|channels; with 4|must give"):
        export_segmenter(segmenter, tmp_path / "a.bitspike", mean=MEAN, std=STD, letterbox=HOW, classes=["a"] * 4,
                         calibration_images=pictures(), name="x")
    with pytest.raises(ExportError, match="at least one picture"):
        export_segmenter(segmenter, tmp_path / "a.bitspike", mean=MEAN, std=STD, letterbox=HOW, classes=["a"] * 5,
                         calibration_images=[], name="x")
    with pytest.raises(ExportError, match=r"uint8 \[H, W, 3\]"):
        export_segmenter(segmenter, tmp_path / "a.bitspike", mean=MEAN, std=STD, letterbox=HOW, classes=["a"] * 5,
                         calibration_images=[np.zeros((4, 4, 1), np.uint8)], name="x")
    with pytest.raises(ExportError, match="border has 1"):
        export_segmenter(segmenter, tmp_path / "a.bitspike", mean=MEAN, std=STD, letterbox=Letterbox(64, 0, 32, (0,)),
                         classes=["a"] * 5, calibration_images=pictures(), name="x")
    model = detector("retinanet")
    with pytest.raises(ExportError, match="tells 5 classes apart"):
        export_detector(model, tmp_path / "a.bitspike", mean=MEAN, std=STD, letterbox=HOW, classes=["a"],
                        calibration_images=pictures(), name="x")
    with pytest.raises(ExportError, match="coarsest stride"):
        export_detector(model, tmp_path / "a.bitspike", mean=MEAN, std=STD, letterbox=Letterbox(64, 96, 16, (1, 2, 3)),
                        classes=["a"] * 5, calibration_images=pictures(), name="x")
    assert not list(tmp_path.iterdir())


def test_too_little_agreement_writes_nothing(tmp_path):
    """Classes whose float weights differ by less than a step of the 8 bits that they are deployed with."""
    torch.manual_seed(1)
    net = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.BatchNorm2d(8), nn.Conv2d(8, 5, 1))
    with torch.no_grad():
        net[2].weight.copy_(net[2].weight[:1] + 1e-4 * torch.randn(5, 8, 1, 1))
        net[2].bias.zero_()
    with pytest.raises(ExportError, match="nothing was written"):
        export_segmenter(net, tmp_path / "a.bitspike", mean=MEAN, std=STD, letterbox=HOW, classes=["a"] * 5,
                         calibration_images=pictures(), name="x", min_agreement=1.0, inner_bits=8)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["retinanet", "mask_rcnn"])
def test_a_detector_that_finds_nothing(kind, tmp_path):
    model = detector(kind)
    if kind == "retinanet":
        model.score = 1.0
    else:
        model.regions.score_thresh = 1.0
    with pytest.raises(ExportError, match=r"finds nothing in the \d+ pictures to compare on, so .* lower the score threshold"):
        written(model, tmp_path / "a.bitspike")
    assert not list(tmp_path.iterdir())


def test_a_head_of_regions_must_begin_with_a_neuron(tmp_path):
    model = detector("faster_rcnn")
    first = model.regions.box_head.fc1
    assert isinstance(first, SpikeConv)
    first.neuron = nn.Identity()
    with pytest.raises(ExportError, match="must begin with an IELIF neuron"):
        written(model, tmp_path / "a.bitspike", min_agreement=0)


@pytest.mark.parametrize(("options", "message"), [
    ({"scale_factor": 3, "mode": "bilinear", "align_corners": False}, "bilinear by 3"),
    ({"scale_factor": 2, "mode": "bilinear", "align_corners": True}, "align_corners=True"),
    ({"size": (20, 24)}, "one whole factor"),
    ({"scale_factor": 2, "mode": "bicubic"}, "'bicubic'"),
])
def test_enlargements_without_an_integer_form(options, message, tmp_path):
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 5, 8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.interpolate(self.conv(x), **options)

    with pytest.raises(ExportError, match=message):
        export_segmenter(Odd(), tmp_path / "a.bitspike", mean=MEAN, std=STD, letterbox=HOW, classes=["a"] * 5,
                         calibration_images=pictures()[:1], name="x", min_agreement=0)
