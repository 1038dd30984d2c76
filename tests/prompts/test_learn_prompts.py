"""learn-prompts on drawn scenes: resuming, faults, what its settings reach; and the published updates."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from wsss_pipeline.cache import MaskCache
from wsss_pipeline.cli import main
from wsss_pipeline.clip.learned_prompts import LearnedPrompts, text_tower_digest
from wsss_pipeline.clip.sources import locate_clip
from wsss_pipeline.clip.trunk import Trunk
from wsss_pipeline.clip.weights import load_clip
from wsss_pipeline.config import ClipConfig
from wsss_pipeline.data.classes import load_class_set
from wsss_pipeline.data.transforms import CLIP_STATISTICS, normalise
from wsss_pipeline.demo.voc_folder import write_voc_folder
from wsss_pipeline.errors import ConfigError, TrainingError
from wsss_pipeline.prompts.config import RECIPES, PromptConfig, load_prompt_config
from wsss_pipeline.prompts.trainer import PROMPTS, PromptTrainer, learning_rate
from wsss_pipeline.pseudo_masks.job import MaskJob
from wsss_pipeline.segmentation.checkpoint import TrainingState
from wsss_pipeline.stages.generate_masks import generate_masks
from wsss_pipeline.stages.learn_prompts import PromptJob, learn_prompts

GOLDEN = Path(__file__).parent.parent / "golden" / "fma"
LARGE = Path(os.environ.get("WSSS_GOLDEN", "nowhere"))
SMALL = {
    "clip.weights": "demo",
    "clip.precision": "fp32",
    "context.length": 4,
    "optimisation.iterations": 4,
    "optimisation.warm_up": 1,
    "optimisation.batch": 2,
    "optimisation.lr": 0.1,
    "augmentation.crop": 32,
    "augmentation.long_min": 160,
    "augmentation.long_max": 176,
}
Make = Callable[..., PromptJob]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    write_voc_folder(folder / "voc", seed=5, scenes={"train": 6}, size=(96, 72))
    settings = {"clip.weights": "demo", "clip.precision": "fp32", "refine": "none"}
    job = MaskJob.read(settings, voc=folder / "voc", split="train", classes="demo", cache=folder / "cache")
    generate_masks(replace(job, device="cpu"))
    return folder


@pytest.fixture
def make(world: Path, tmp_path: Path) -> Make:
    def made(objective: str = "contrastive", out: str = "run", **settings: Any) -> PromptJob:
        keys = {key.replace("__", "."): value for key, value in settings.items()}
        given = {**SMALL, "objective": objective, **keys}
        paths: dict[str, Any] = {"voc": world / "voc", "split": "train", "classes": "demo"}
        if objective == "cam":
            paths = {"images": world / "voc/JPEGImages", "masks": world / "cache"}
        return replace(PromptJob.read(tmp_path / out, given, **paths), device="cpu")

    return made


def context(job: PromptJob) -> torch.Tensor:
    return LearnedPrompts.load(learn_prompts(job).prompts).context


@pytest.mark.parametrize("objective", ["contrastive", "cam"])
def test_a_run_that_was_interrupted_ends_bit_equal(
    make: Make, objective: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = context(make(objective))
    job, update, done = make(objective, "other"), PromptTrainer._update, []

    def interrupted(self: PromptTrainer, batches: Any) -> Any:
        done.append(update(self, batches))
        if len(done) == 2:
            signal.raise_signal(signal.SIGINT)
        return done[-1]

    monkeypatch.setattr(PromptTrainer, "_update", interrupted)
    result = learn_prompts(job)
    assert (result.steps, result.interrupted) == (2, True)
    assert result.prompts.exists(), "what was learned so far can be used"
    result = learn_prompts(job)
    assert (result.steps, result.interrupted) == (4, False)
    assert torch.equal(LearnedPrompts.load(result.prompts).context, whole)
    assert len(done) == 4
    learn_prompts(job)
    assert len(done) == 4, "a run that has ended isn't done again"
    log = [json.loads(line) for line in (job.out / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == [1, 2, 3, 4]
    assert any(line["pairs"] > 0 for line in log)


def test_what_is_learned_depends_on_each_setting(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A setting that reaches nothing would give the same context."""
    own_pixels = tmp_path / "clip"
    shutil.copytree(str(resources.files("wsss_pipeline") / "demo" / "clip"), own_pixels)
    values = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (own_pixels / "preprocessor_config.json").write_text(json.dumps(values))
    monkeypatch.setitem(SMALL, "optimisation.iterations", 3)
    monkeypatch.setitem(SMALL, "labels", "image")  # so that each crop counts
    base = context(make("cam", "base"))
    assert torch.equal(context(make("cam", "again")), base)
    for number, (key, value) in enumerate(
        {
            "seed": "真",
            "clip.weights": str(own_pixels),
            "labels": "mask",
            "context.layout": "front",
            "context.per_class": True,
            "context.std": 0.1,
            "context.free_background": 3,
            "augmentation.colours": False,
            "augmentation.flip": False,
            "augmentation.crop": 24,
            "augmentation.long_min": 168,
            "optimisation.lr": 0.2,
            "optimisation.warm_up": 2,
            "optimisation.warm_up_lr": 0.5,
            "optimisation.accumulate": 2,
            "optimisation.momentum": 0.5,
            "optimisation.weight_decay": 0.1,
        }.items()
    ):
        found = context(make("cam", f"run{number}", **{key.replace(".", "__"): value}))
        is_same = found.shape == base.shape and torch.equal(found, base)
        assert not is_same, key


def test_accumulated_batches_are_as_one_of_all_their_images(make: Make) -> None:
    together = context(make(optimisation__batch=4, optimisation__iterations=2))
    apart = make(out="apart", optimisation__batch=2, optimisation__accumulate=2, optimisation__iterations=2)
    # a mean over pairs in each batch: equal where the batches have as many
    assert torch.allclose(context(apart), together, atol=5e-3)


def test_one_bad_image_is_left_out_and_too_many_end_the_run(make: Make, tmp_path: Path) -> None:
    job = make(optimisation__batch=6, optimisation__iterations=1, max_unusable=0.5)
    (tmp_path / "bad.jpg").write_bytes(b"no image")
    first = next(iter(job.images))
    result = learn_prompts(replace(job, images={**job.images, first: tmp_path / "bad.jpg"}))
    assert json.loads((job.out / "log.jsonl").read_text())["damaged"] == 1
    assert result.steps == 1
    all_bad = replace(job, out=tmp_path / "none", images=dict.fromkeys(job.images, tmp_path / "bad.jpg"))
    with pytest.raises(TrainingError, match="6 of 6 samples couldn't be used"):
        learn_prompts(all_bad)


def test_a_loss_that_is_no_number_ends_the_run_and_keeps_the_context(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    from wsss_pipeline.prompts import trainer

    monkeypatch.setattr(trainer, "contrastive_loss", lambda logits, present: logits.sum() * torch.nan)
    job = make()
    with pytest.raises(
        TrainingError, match=r"no number at update 1; .*prompts\.safetensors, the images were"
    ):
        learn_prompts(job)
    assert LearnedPrompts.load(job.out / PROMPTS).context.isfinite().all()


def test_another_run_in_the_folder_is_refused_and_overwritten_if_asked(make: Make) -> None:
    learn_prompts(make(optimisation__iterations=1))
    with pytest.raises(TrainingError, match=r"other settings \(.*seed: 0, 1"):
        learn_prompts(make(optimisation__iterations=1, seed="1"))
    again = replace(make(optimisation__iterations=1, seed="1"), overwrite=True)
    assert learn_prompts(again).steps == 1


def test_inputs_that_contradict_the_objective(world: Path, tmp_path: Path) -> None:
    cases: list[tuple[str, dict[str, Any], str]] = [
        ("cam", {}, "needs --cache"),
        ("cam", {"masks": world / "cache", "images": world / "voc", "labels": world}, "--labels isn't for"),
        (
            "contrastive",
            {"masks": world / "cache", "images": world / "voc"},
            "--cache is for --objective cam",
        ),
    ]
    for objective, paths, message in cases:
        with pytest.raises(ConfigError, match=message):
            PromptJob.read(tmp_path, {"objective": objective}, **paths)


def test_the_command_learns_and_its_prompts_make_masks(world: Path, tmp_path: Path) -> None:
    settings = [f"--set={key}={value}" for key, value in SMALL.items() if not key.startswith("clip")]
    data = ["--voc", str(world / "voc"), "--split", "train", "--classes", "demo", "--clip", "demo"]
    data += ["--device", "cpu", "--precision", "fp32", "--workers", "0"]
    run = CliRunner().invoke(main, ["learn-prompts", *data, "--out", str(tmp_path / "run"), *settings])
    assert run.exit_code == 0, run.output
    file = run.stdout.splitlines()[-1]
    assert LearnedPrompts.load(Path(file)).context.shape == (4, 128)
    made = CliRunner().invoke(
        main,
        [
            *("generate-masks", *data, "--method", "fma", "--refine", "none"),
            *("--prompts", file, "--cache", str(tmp_path / "cache")),
        ],
    )
    assert made.exit_code == 0, made.output
    assert len(MaskCache.open(tmp_path / "cache")) == 6


def test_recipes_resolve_and_a_class_set_brings_its_own() -> None:
    for name, values in RECIPES.items():
        classes, objective = name.split("-")
        config = load_prompt_config(classes, flags={"objective": objective})
        assert config == load_prompt_config(recipe_name=name)
        assert config.seed == values.get("seed", "0")
    assert load_prompt_config("voc12", overrides=["seed=5"]).seed == "5"
    assert load_prompt_config("cats") == PromptConfig()
    with pytest.raises(ConfigError, match="unknown recipe 'x'; known: voc12-contrastive"):
        load_prompt_config(recipe_name="x")


@pytest.mark.parametrize(
    ("run", "recipe"),
    [
        ("voc_cls", "voc12-contrastive"),
        ("voc_seg", "voc12-cam"),
        ("coco_cls", "coco14-contrastive"),
        ("coco_seg", "coco14-cam"),
    ],
)
def test_rates_are_the_published_ones(run: str, recipe: str) -> None:
    config = load_prompt_config(recipe_name=recipe).optimisation
    with np.load(GOLDEN / "initial_and_schedule.npz") as stored:
        for step, expected in zip(stored[f"lr_{run}_iteration"], stored[f"lr_{run}"], strict=True):
            assert learning_rate(int(step), config) == pytest.approx(float(expected), rel=1e-12)


@pytest.mark.skipif(not LARGE.is_dir(), reason="set WSSS_GOLDEN to the folder with the golden photographs")
@pytest.mark.parametrize("task", ["cls", "seg"])
def test_six_updates_are_those_of_the_published_code(
    task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = locate_clip(ClipConfig(weights=str(LARGE / "clip_es" / "model")), offline=True)
    clip = load_clip(files, torch.device("cpu"))
    with np.load(LARGE / "fma" / f"train_{task}.npz") as file:
        stored = {key: torch.from_numpy(file[key]) for key in file.files}
    voc, is_cls = load_class_set("voc12"), task == "cls"
    texts = tuple(entry.texts() for entry in voc.classes)
    words = voc.background if is_cls else ("",) * 25
    prompts = LearnedPrompts(
        stored["ctx"], "end" if is_cls else "front", voc.names, texts, words, text_tower_digest(clip)
    )
    present = torch.cat([torch.zeros(4, 1), stored["y"]], dim=1).bool()

    class Crops:
        """The same four in each update, whatever their order."""

        def __len__(self) -> int:
            return 4

        def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
            number = key[1]
            image = normalise(stored["crops"][number].numpy(), CLIP_STATISTICS)
            return {
                "image": image,
                "mask": stored["labels"][number].long(),
                "present": present[number],
                "image_id": str(number),
                "damaged": False,
            }

    config = PromptConfig.model_validate(
        {
            "objective": "contrastive" if is_cls else "cam",
            "labels": "mask",
            "optimisation": {"iterations": 6, "warm_up": 2, "batch": 4},
        }
    )
    after: dict[int, torch.Tensor] = {}
    save = TrainingState.save

    def keep(state: TrainingState, folder: Path) -> None:
        after[state.step] = next(state.network.parameters()).detach().clone()
        save(state, folder)

    monkeypatch.setattr(TrainingState, "save", keep)
    crops: Any = Crops()
    trunk = Trunk(clip.vision, rounded_positions=False)
    every = config.model_copy(update={"save_every": 1})
    assert PromptTrainer(every, clip, trunk, prompts, crops, tmp_path).run()
    for step, expected in zip((2, 3, 6), stored["steps_ctx"], strict=True):
        assert float((after[step] - expected).abs().max() / expected.abs().max()) < 1e-5, step
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in log] == pytest.approx(stored["steps_loss"].tolist(), rel=2e-5)
    assert [line["lr"] for line in log] == pytest.approx(stored["steps_lr"].tolist(), rel=1e-9)
