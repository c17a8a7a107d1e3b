"""The networks given to other engines compute what the integer program computes."""
from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tests.deploy.random_programs import random_artifact, random_images
from tests.deploy.small_artifact import small

from bitspike.benching.lower import PeerError, unit_of
from bitspike.deploy import Net, load
from bitspike.deploy.artifact import encode, parse

torch = pytest.importorskip("torch")

from bitspike.benching.to_torch import PeerModule, compare  # noqa: E402


def peers_of_random_programs(count: int) -> list[tuple[int, Net, PeerModule]]:
    """Those programs whose ops other engines are given."""
    found = []
    for seed in range(count):
        net = Net(parse(encode(*random_artifact(seed, 8))))
        if net.input_steps > 1:
            continue
        try:
            found.append((seed, net, PeerModule(net).eval()))
        except PeerError as error:
            assert "bench without --peers" in str(error)
    return found


def test_each_op_computes_the_same_on_random_programs():
    pairs = peers_of_random_programs(300)
    assert len(pairs) >= 10
    assert {op.name for _, net, _ in pairs for op in net.program.ops} >= {
        "conv", "quantize", "affine", "add", "attention", "maxpool", "mean", "lif", "ielif"}
    for seed, net, module in pairs:
        found = compare(module, net, random_images(net.header, 2, seed))
        unit = unit_of(net.program, net.header["fraction_bits"]) / 2.0 ** net.header["fraction_bits"]
        # an integer potential is rounded at most a few times on its way; float32 adds its own relative error
        assert found.largest_potential <= 4 * unit + 1e-5 * 2**31 * unit or _saturates(net, seed), (seed, found)
        assert found.different <= 0.1 * found.codes + 2 or _saturates(net, seed), (seed, found)


def _saturates(net: Net, seed: int) -> bool:
    """sat32 is the one thing left out of the float network."""
    values = net.trace(random_images(net.header, 2, seed), 1)
    return any(np.abs(values[name].astype(np.int64)).max() >= 2**31 - 1 for name, v in net.program.values.items()
               if v.kind == "i32")


def test_a_trained_network_agrees_layer_by_layer_and_in_its_answers():
    net = load("cifar10")
    images = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3)).astype(np.uint8)
    module = PeerModule(net).eval()
    found = compare(module, net, images)
    assert found.largest_potential < 1e-4 and found.different < 1e-3 * found.codes
    with torch.inference_mode():
        logits = module(torch.from_numpy(np.moveaxis(images, 3, 1).astype(np.float32))).numpy()
    ours = net(images, 1)
    assert (logits.argmax(1) == ours.argmax(1)).mean() >= 0.75  # noise is not what it was trained on
    assert np.corrcoef(logits.ravel(), ours.ravel())[0, 1] > 0.98


@pytest.mark.parametrize("tanh", [False, True])
def test_potentials_of_few_bits_are_kept_as_in_the_program(tanh: bool):
    """In equal steps, or in equal steps of their tanh; other steps are refused."""
    header, tensors = small()
    op = next(op for op in header["program"] if op["op"] == "lif")
    number = np.arange(-6, 8) - 0.5
    edges = np.arctanh(number / 7.5) if tanh else number * 0.3
    tensors["edges"] = np.round(edges * 2 ** header["fraction_bits"]).astype(np.int32)
    op.update(op="lif_packed", bits=4, table="edges", decay=[2 ** header["fraction_bits"], 4])
    net = Net(parse(encode(header, tensors)))
    found = compare(PeerModule(net).eval(), net, random_images(net.header, 4))
    assert found.different <= 0.02 * found.codes
    tensors["edges"] = np.sort(tensors["edges"] ** 3)
    with pytest.raises(PeerError, match="neither"):
        PeerModule(Net(parse(encode(header, tensors))))


@pytest.mark.parametrize("gain", [-7, 0, 4, 300])
def test_any_gain_of_a_neuron_behind_a_convolution_is_as_in_the_program(gain: int):
    header, tensors = small()
    program = {op["out"]: op for op in header["program"]}
    del program["x"]["pad_value"], tensors["pad"]
    program["r"]["in"] = ["a", "a"]  # the neuron is all that reads the convolution
    program["n"]["m"] = gain
    net = Net(parse(encode(header, tensors)))
    found = compare(PeerModule(net).eval(), net, random_images(net.header, 4))
    assert np.isfinite(found.largest_potential) and found.different <= 0.02 * found.codes


def test_a_network_with_maps_of_attention_can_be_laid_out_channels_last():
    """PyTorch refuses modules with tensors of five axes."""
    laid_out = [module.to(memory_format=torch.channels_last) for _, net, module in peers_of_random_programs(300)
                if any(op.name == "attention_read" for op in net.program.ops)]
    assert laid_out


def test_compare_sees_a_wrong_weight():
    net = load("cifar10")
    module = PeerModule(net).eval()
    name = next(name for name, value in module.constants.items() if value.dim() == 4 and value.shape[0] == 64)
    with torch.no_grad():
        module.constants[name][3, 2, 0, 0] += 1.0
    assert compare(module, net, np.full((1, 32, 32, 3), 90, np.uint8)).largest_potential > 0.1


@pytest.mark.parametrize("form", ["float", "counts", "all"])
def test_onnx_computes_the_same(form: str, tmp_path: Path):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    from bitspike.benching.engines import PEERS, write_files

    net = load("cifar10")
    images = np.random.default_rng(1).integers(0, 256, (2, 32, 32, 3)).astype(np.uint8)
    file = f"{form}.onnx"
    engine = next(e for e in PEERS if e.name == "onnxruntime float32")
    write_files(net, tmp_path, tmp_path, images, {"x": type(engine)("x", (), file, engine.open, "")})
    opened = engine.open(tmp_path / file, 1)
    logits, ours = opened.run(opened.prepare(images)), net(images, 1)
    least = 0.9 if form == "all" else 0.98  # "all": 8 bits for sums, too
    assert np.corrcoef(logits.ravel(), ours.ravel())[0, 1] > least
