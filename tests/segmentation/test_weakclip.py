"""WeakCLIP's network: what learns, what a checkpoint holds, when texts are encoded, what is refused."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.weakclip import plain_head
from tests.segmentation.conftest import CONFIG, Make, changed, other_clip
from wsss_pipeline.clip.trunk import Trunk
from wsss_pipeline.clip.weights import Clip
from wsss_pipeline.errors import CheckpointError, ConfigError, NetworkError
from wsss_pipeline.segmentation import trainer as trainer_module
from wsss_pipeline.segmentation import weakclip as weakclip_module
from wsss_pipeline.segmentation.checkpoint import decoder_digest, load_network, save_network
from wsss_pipeline.segmentation.inference import Segmenter, network_digest
from wsss_pipeline.segmentation.networks import build_network
from wsss_pipeline.segmentation.train_config import NetworkConfig, TrainConfig
from wsss_pipeline.segmentation.weakclip import WeakClip
from wsss_pipeline.stages.export_model import export_model
from wsss_pipeline.stages.train_seg import train_seg

NAMES = ("cat", "dog")
FORMS = ["frozen", "published"]
each_form = pytest.mark.parametrize("form", FORMS)


def config(**weakclip: Any) -> NetworkConfig:
    own = {"width": 32, "channels": 16, **weakclip}
    return NetworkConfig.model_validate(
        {"name": "weakclip", "encoder": "demo", "weights": "none", "weakclip": own}
    )


def made(loaded: Clip, /, **weakclip: Any) -> WeakClip:
    torch.manual_seed(0)
    network = build_network(config(**weakclip), 3, class_names=NAMES, clip=loaded)
    assert isinstance(network, WeakClip)
    return network.eval()


def answer(network: WeakClip, images: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = network(images)
    return logits


@pytest.mark.parametrize("sides", [(64, 64), (48, 80)])  # even and odd numbers of patches
def test_classes_are_told_before_levels_are_enlarged_to_the_same_result(
    demo_clip: Clip, sides: tuple[int, int]
) -> None:
    head = made(demo_clip, dropout=0.4).model["decoder"].head.double().train()
    grid = [side // 16 for side in sides]
    maps = [
        torch.randn(2, 16, *(math.floor(side * times) for side in grid), dtype=torch.float64)
        for times in (4, 2, 1, 0.5)
    ]
    found = []
    for forward in (type(head).forward, plain_head):
        torch.manual_seed(1)  # of the dropout
        found.append(forward(head, maps))
    assert found[0].shape == (2, 3, *maps[0].shape[-2:])
    assert (found[0] - found[1]).abs().max() < 1e-12


@each_form
def test_an_update_changes_what_learns_and_never_the_clip_it_was_built_on(demo_clip: Clip, form: str) -> None:
    towers = {"vision": demo_clip.vision, "text": demo_clip.text}
    given = {name: copy.deepcopy(tower.state_dict()) for name, tower in towers.items()}
    network = made(demo_clip, clip=form).train()
    before = copy.deepcopy(network.state_dict())
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    outputs = network.training_outputs(torch.randn(2, 3, 64, 64))
    assert outputs["logits"].shape == (2, 3, 32, 32)
    assert outputs["score"].shape == (2, 3, 8, 8)
    assert (outputs["score"].abs() <= 1 + 1e-6).all()
    (outputs["logits"].square().mean() + outputs["score"].square().mean()).backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    after = network.state_dict()
    parts = {name.split(".")[1] for name in after}
    assert parts == ({"decoder"} if form == "frozen" else {"decoder", "vision", "text"})
    assert not [name for name, value in before.items() if torch.equal(value, after[name])]
    for name, tower in towers.items():
        assert all(torch.equal(value, given[name][key]) for key, value in tower.state_dict().items())
        assert not any(value.requires_grad for value in tower.parameters())


@each_form
def test_clip_and_the_adapter_start_at_a_rate_of_0_where_they_learn_as_published(
    demo_clip: Clip, form: str
) -> None:
    network = made(demo_clip, clip=form, adapter=form if form == "published" else "full")
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    groups = network.parameter_groups(1e-4, 3e-5, 10)
    assert {group["weight_decay"] for group in groups} == {3e-5}
    rates = {names[id(value)]: group["lr"] for group in groups for value in group["params"]}
    slow = {
        name
        for name in rates
        if form == "published" and (not name.startswith("model.decoder.") or ".adapter." in name)
    }
    assert rates == {name: 0.0 if name in slow else 1e-4 for name in names.values()}


@each_form
def test_a_checkpoint_gives_the_same_answer_on_the_same_clip_alone(
    demo_clip: Clip, tmp_path: Path, form: str
) -> None:
    network, images = made(demo_clip, clip=form), torch.randn(1, 3, 61, 47)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(1.01)
    save_network(network, tmp_path / "last", config(clip=form), NAMES)
    stored = load_file(tmp_path / "last" / "model.safetensors")
    assert stored.keys() == network.state_dict().keys()
    loaded = load_network(tmp_path / "last")
    assert loaded.class_names == NAMES
    assert isinstance(loaded.network, WeakClip)
    assert torch.equal(answer(loaded.network, images), answer(network, images))
    assert network_digest(loaded.network) == network_digest(network)
    with pytest.raises(CheckpointError, match="was trained on another CLIP than"):
        load_network(tmp_path / "last", clip=str(other_clip(tmp_path / "other")))
    with pytest.raises(CheckpointError, match="holds no network on a frozen CLIP"):
        decoder_digest(tmp_path / "last")


HOSTILE: dict[str, Callable[[dict[str, Any]], object]] = {
    "a name beyond CLIP": lambda values: values["id2label"].update({"1": "cat " * 100}),
    "a name more": lambda values: values["id2label"].update({"3": "cow"}),
    "an enormous pyramid": lambda values: values["network"]["weakclip"].update(channels=10**6),
    "heads that don't fit": lambda values: values["network"]["weakclip"].update(heads=5),
    "another form": lambda values: values["network"]["weakclip"].update(clip="published"),
    "no digest": lambda values: values.pop("frozen"),
    "no such CLIP": lambda values: values["network"].update(encoder="nowhere/else"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_checkpoint_is_one_line(demo_clip: Clip, tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "last"
    save_network(made(demo_clip), folder, config(), NAMES)
    values = json.loads((folder / "config.json").read_text())
    HOSTILE[kind](values)
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError) as caught:
        load_network(folder)
    assert str(caught.value).isprintable()
    assert str(folder) in str(caught.value)


def test_names_that_clip_cannot_read_are_refused(demo_clip: Clip) -> None:
    longest = demo_clip.text.config.max_position_embeddings
    with pytest.raises(
        NetworkError, match=rf"the class 'cat cat.*tokens with a context of 8, CLIP reads {longest}"
    ):
        build_network(config(), 2, class_names=["cat " * longest], clip=demo_clip)
    with pytest.raises(NetworkError, match="prompts of its classes: 2, with 0 names"):
        build_network(config(), 3, clip=demo_clip)


@each_form
def test_texts_are_encoded_once_and_again_when_a_weight_changes(
    demo_clip: Clip, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    calls: list[int] = []
    encode = weakclip_module.text_features
    monkeypatch.setattr(weakclip_module, "text_features", lambda *given: calls.append(1) or encode(*given))
    network, images = made(demo_clip, clip=form), torch.randn(1, 3, 32, 32)
    first = answer(network, images)
    assert torch.equal(answer(network, images), first)
    assert len(calls) == 1
    other = copy.deepcopy(network)
    weight = "decoder.contexts" if form == "frozen" else "text.text_projection.weight"
    with torch.no_grad():
        network.model.get_parameter(weight).add_(0.5)
    assert not torch.equal(answer(network, images), first)
    state = {name: value.clone() for name, value in network.state_dict().items()}
    other.load_state_dict(state)
    assert torch.equal(answer(other, images), answer(network, images))
    seen = len(calls)
    for _ in range(2):
        network.training_outputs(images)
    assert len(calls) == seen + 2


def test_a_class_is_what_its_name_says(demo_clip: Clip) -> None:
    """Names reach the texts, the background's first; a class's row doesn't hang on the names beside it."""
    texts = []
    for names in (["cat", "dog"], ["dog", "cat"], ["cat", "a far longer name"]):
        torch.manual_seed(0)
        network = WeakClip(config().weakclip, names, demo_clip)
        with torch.no_grad():
            texts.append(network.text())
    assert torch.allclose(texts[0][[0, 2, 1]], texts[1], atol=1e-5)
    assert torch.allclose(texts[0][:2], texts[2][:2], atol=1e-5)
    assert not torch.allclose(texts[0][1], texts[0][2], atol=1e-2)


@each_form
def test_what_it_sees_in_an_image_is_the_same_in_any_batch(demo_clip: Clip, form: str) -> None:
    network, images = made(demo_clip, clip=form), torch.randn(2, 3, 43, 61)
    together = answer(network, images)
    for number in range(2):
        assert (answer(network, images[number, None])[0] - together[number]).abs().max() < 1e-4


def test_heads_reach_the_network(demo_clip: Clip) -> None:
    images, scores = torch.randn(1, 3, 56, 72), []
    for heads in (4, 2):
        network = made(demo_clip, heads=heads)
        with torch.no_grad():
            for parameter in network.model.get_submodule("decoder.coattention").parameters():
                parameter.mul_(20)  # so that attention prefers anything
            scores.append(network.decode(images)["score"])
    assert (scores[1] - scores[0]).abs().max() > 1e-4
    with pytest.raises(
        NetworkError, match=r"weakclip\.width 32 isn't a multiple of network\.weakclip\.heads 5"
    ):
        made(demo_clip, heads=5)


@each_form
def test_an_average_of_the_weights_answers_by_its_own(demo_clip: Clip, form: str) -> None:
    network, images = made(demo_clip, clip=form), torch.randn(1, 3, 32, 32)
    ema = torch.optim.swa_utils.get_ema_multi_avg_fn(0.5)  # type: ignore[no-untyped-call]
    average = torch.optim.swa_utils.AveragedModel(network, multi_avg_fn=ema, use_buffers=True)
    first = answer(network, images)
    average.update_parameters(network)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1)
    kept: Any = average.module
    assert torch.equal(answer(kept, images), first)
    average.update_parameters(network)
    middle = answer(kept, images)
    assert not torch.equal(middle, first)
    assert not torch.equal(middle, answer(network, images))
    assert torch.equal(kept.tokens, network.tokens)


def test_stochastic_depth_leaves_out_places_the_same_in_all_images(demo_clip: Clip) -> None:
    trunk, image = Trunk(demo_clip.vision, rounded_positions=False), torch.randn(1, 3, 64, 64)
    depth, images = trunk.depth, image.expand(2, -1, -1, -1)
    torch.manual_seed(0)

    def taps(rate: float) -> Any:
        return trunk.encode(images, range(depth), attention="none", stochastic_depth=rate).taps

    plain, drawn, again = taps(0.0), taps(0.9), taps(0.9)
    assert torch.equal(drawn[0], plain[0])
    assert torch.equal(drawn[depth - 1][0], drawn[depth - 1][1])
    assert not torch.equal(drawn[depth - 1], again[depth - 1])
    still = [(drawn[block][0] == drawn[block - 1][0]).all(dim=-1).double().mean() for block in (1, depth - 1)]
    assert float(still[1]) == pytest.approx(0.81, abs=0.15)  # neither attention nor MLP
    assert float(still[0]) == pytest.approx((0.9 / (depth - 1)) ** 2, abs=0.1)
    # what is kept is as much larger: the mean is that without
    places = trunk.encode(torch.zeros(1, 3, 8, 1600), [1], attention="none", stochastic_depth=0.9).taps[1]
    assert places.isfinite().all()


@pytest.mark.slow
def test_an_exported_network_takes_any_number_and_size_of_images(demo_clip: Clip) -> None:
    network, dynamic = made(demo_clip), torch.export.Dim.DYNAMIC
    answer(network, torch.zeros(1, 3, 32, 32))
    shapes = ({0: dynamic, 2: dynamic, 3: dynamic},)
    program = torch.export.export(network, (torch.zeros(2, 3, 64, 48),), dynamic_shapes=shapes)
    assert len(program.range_constraints) >= 3


@pytest.mark.slow
def test_onnx_computes_the_same(demo_clip: Clip, tmp_path: Path) -> None:
    """The export itself compares on other sizes."""
    save_network(made(demo_clip), tmp_path / "last", config(), NAMES)
    assert export_model(tmp_path / "last", tmp_path / "network.onnx", "onnx").stat().st_size > 0


@each_form
def test_half_precision_is_close(demo_clip: Clip, form: str) -> None:
    network, images = made(demo_clip, clip=form), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        exact = network.decode(images)
        with torch.autocast("cpu", torch.bfloat16):
            half = network.decode(images)
    assert half["score"].dtype == torch.float32
    for name, value in exact.items():
        difference = (half[name].float() - value).abs().max()
        assert 0 < difference < 0.05 * value.abs().max(), name


@each_form
def test_all_of_it_goes_to_the_networks_device(demo_clip: Clip, form: str) -> None:
    own = replace(demo_clip, text=copy.deepcopy(demo_clip.text))
    network = made(own, clip=form).to("meta")
    tensors = [network.tokens, network.ends, *network.state_dict().values()]
    for module in network.frozen.modules:
        tensors += module.state_dict().values()
    assert {value.device.type for value in tensors} == {"meta"}
    assert len(network.frozen.modules) == (2 if form == "frozen" else 0)


def test_a_frozen_clip_computes_in_the_precision_it_was_given(demo_clip: Clip) -> None:
    network, images = made(demo_clip), torch.randn(1, 3, 64, 64)
    torch.manual_seed(0)
    half = WeakClip(config().weakclip, NAMES, demo_clip, "bf16").eval()
    half.load_state_dict(network.state_dict())
    exact = answer(network, images)
    difference = (answer(half, images) - exact).abs().max()
    assert 0 < difference < 0.05 * exact.abs().max()
    assert {value.dtype for value in demo_clip.vision.parameters()} == {torch.float32}


class Killed(BaseException):
    """As the end of the process."""


class DiesAtThree(trainer_module.Progress):
    def advance(self, *arguments: Any, **named: Any) -> None:
        super().advance(*arguments, **named)
        if self.done == 3:
            raise Killed


def run_config(**weakclip: Any) -> TrainConfig:
    done: TrainConfig = changed(
        CONFIG, network=config(**weakclip), optimisation__iterations=4, validate_every=100
    )
    return done


@pytest.mark.parametrize(
    ("form", "ema"), [("published", 0.9), pytest.param("frozen", 0.0, marks=pytest.mark.slow)]
)
def test_a_run_goes_on_bit_for_bit_and_predicts(
    make: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, form: str, ema: float
) -> None:
    caplog.set_level("INFO")
    settings = changed(run_config(clip=form), optimisation__ema=ema)
    whole = train_seg(make("whole", settings))
    told = "network: weakclip, demo (frozen)," if form == "frozen" else "network: weakclip, demo,"
    assert told in caplog.text
    with monkeypatch.context() as patch:
        patch.setattr(trainer_module, "Progress", DiesAtThree)
        with pytest.raises(Killed):
            train_seg(make("parts", settings))
    parts = train_seg(make("parts", settings))
    assert (whole.steps, parts.steps) == (4, 4)
    one, other = (load_file(result.checkpoint / "model.safetensors") for result in (whole, parts))
    assert all(torch.equal(one[key], other[key]) for key in one)
    mask = Segmenter.load(whole.checkpoint.parent, "cpu")(np.zeros((50, 70, 3), np.uint8)).mask
    assert mask.shape == (50, 70)


def test_a_crop_that_is_too_small_for_the_pyramid_is_refused(make: Make) -> None:
    with pytest.raises(
        ConfigError, match=r"--crop 8 isn't a multiple of 8, the patch of this CLIP, from 16 on"
    ):
        train_seg(make("run", changed(run_config(), augmentation__crop=8)))
