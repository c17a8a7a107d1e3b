"""A searched spec of every scheme becomes a file of the predicted size, and the integer runtime runs it."""
import numpy as np
import pytest
import torch

from bitspike.deploy import artifact, load
from bitspike.exporting import calibrate_norms, explain, export_model
from bitspike.layers import quantize_
from bitspike.models.compact_spikeformer import compact
from bitspike.searching import SearchData, make_space, search
from bitspike.searching.costs import Costs
from bitspike.spec import QuantSpec, Scheme

PIXELS = np.random.default_rng(0).integers(0, 256, (40, 32, 32, 3), np.uint8)
MIXED = [Scheme("uniform", 8, options={"step": "normal"}), Scheme("pow2", 3, options={"scale": "normal"}),
         Scheme("pow2", 2), Scheme("binary", options={"scale": "mean"}), Scheme("pow2", 4, options={"scale": "normal"}),
         Scheme("uniform", 2), Scheme("uniform", 5), Scheme("uniform", 3), Scheme("lsq", 6), Scheme("pow2_scale", 4),
         Scheme("max", 7), Scheme("uniform", 4)]


def small():
    torch.manual_seed(0)
    return compact(widths=(8, 16, 16))


def export(net, path, **more):
    return export_model(net, path, mean=[0.5] * 3, std=[0.25] * 3, image_size=32, classes=list("abcdefghij"),
                        calibration_images=PIXELS, name="mixed", **more)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    net = small()
    space = make_space(net, MIXED)
    choice = dict(zip(space.layers, MIXED, strict=True))
    quantize_(net, space.spec(choice))
    calibrate_norms(net, PIXELS, [0.5] * 3, [0.25] * 3)
    path = tmp_path_factory.mktemp("mixed") / "mixed.bitspike"
    return net.eval(), choice, export(net, path, min_agreement=0.9)


def test_mixed_specs_export_pack_and_run(mixed):
    net, choice, report = mixed
    rows = [r for r in explain(report.path) if r["weights"]]
    assert {r["layer"]: r["bits"] for r in rows} == {n: s.bits for n, s in choice.items()}
    assert {layer.name: layer.scheme for layer in report.layers}["groups.0.conv"] == "pow2"
    assert report.agreement >= 0.97
    logits = load(report.path)(PIXELS[:8])
    with torch.no_grad():
        x = (torch.from_numpy(PIXELS[:8]).permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.25
        assert np.abs(logits - net(x).numpy()).max() < 0.5
    assert np.array_equal(logits, load(report.path)(PIXELS[:8], threads=1))


def test_stored_codes_are_those_of_the_quantizers(mixed):
    from bitspike.layers import codes, quantizable

    net, choice, report = mixed
    found = artifact.read(report.path)
    for op, entry in zip(found.program.ops, found.header["program"], strict=True):
        if op.name == "conv" and choice[op.layer].kind in ("pow2", "binary"):
            expected = codes(quantizable(net)[op.layer])[0]
            stored = np.asarray(op.attributes["weight"]).astype(int)
            assert sorted(stored.reshape(-1).tolist()) == sorted(expected.reshape(-1).tolist())
            assert set(np.abs(stored).reshape(-1)) <= {0, 1, 2, 4, 8, 16, 32, 64}
            assert entry["scheme"]["kind"] == choice[op.layer].kind


def test_predicted_bytes_are_the_file_s(mixed, tmp_path):
    """Packed codes and two tables a layer; the rest of the file is the same for every spec, but for some text."""
    _, choice, report = mixed
    net = small()
    space = make_space(net, MIXED)
    plain = {n: Scheme("uniform", 4) for n in space.layers}
    other = quantize_(small(), QuantSpec({"*": Scheme("uniform", 4)}))
    calibrate_norms(other, PIXELS, [0.5] * 3, [0.25] * 3)
    reference = export(other.eval(), tmp_path / "four.bitspike", min_agreement=0)
    costs = Costs(net.eval(), torch.randn(2, 3, 32, 32), space)
    difference = costs.of(choice).bytes - costs.of(plain).bytes
    assert report.bytes - reference.bytes == pytest.approx(difference, abs=32 * len(choice))


def test_search_on_the_compact_network_ends_in_a_file(tmp_path):
    net = small()
    calibrate_norms(net, PIXELS, [0.5] * 3, [0.25] * 3)
    x = (torch.from_numpy(PIXELS).permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.25
    data = SearchData(x, torch.randint(10, (len(x),)), 20)
    few = [Scheme("uniform", 8), Scheme("uniform", 2), Scheme("pow2", 3), Scheme("binary", options={"scale": "mean"})]
    spec, report = search(net.eval(), few, "bits=3", data)
    assert report.searched.totals.bits <= 3
    tuned = quantize_(small(), spec)
    calibrate_norms(tuned, PIXELS, [0.5] * 3, [0.25] * 3)
    found = export(tuned.eval(), tmp_path / "found.bitspike", min_agreement=0.9)
    assert found.weights == sum(make_space(net, few).weights.values())
