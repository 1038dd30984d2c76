"""SAM and its kin: beside the published code's numbers, beside transformers, and from files that may be anybody's."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file, save_file

from wsss_pipeline.errors import WeightsError
from wsss_pipeline.regions.proposals import ProposalConfig, propose
from wsss_pipeline.regions.regions import Regions
from wsss_pipeline.regions.sam import SamPredictor, load_predictor

GOLDEN = Path(__file__).parents[1] / "golden" / "fma"
TINY = dict(np.load(GOLDEN / "sam_tiny.npz"))
IMAGE: NDArray[np.uint8] = TINY["image"]
PROMPTS = {"hidden_size": 32, "image_size": 64, "patch_size": 16, "mask_input_channels": 4}
DECODER = {"hidden_size": 32, "mlp_dim": 32, "num_attention_heads": 2, "iou_head_hidden_dim": 16}
SIZES: dict[str, dict[str, Any]] = {
    "SamHQ": {
        "vision_config": {
            "hidden_size": 32,
            "output_channels": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 64,
            "patch_size": 16,
            "window_size": 2,
            "global_attn_indexes": [1],
            "num_pos_feats": 16,
            "mlp_ratio": 2.0,
        },
        "prompt_encoder_config": PROMPTS,
        "mask_decoder_config": {**DECODER, "vit_dim": 32},
    },
    "Sam2": {
        "vision_config": {
            "backbone_config": {
                "model_type": "sam2_hiera_det_model",
                "hidden_size": 8,
                "image_size": [64, 64],
                "blocks_per_stage": [1, 1, 2, 1],
                "embed_dim_per_stage": [8, 16, 24, 32],
                "num_attention_heads_per_stage": [1, 1, 1, 1],
                "window_size_per_stage": [4, 4, 4, 2],
                "global_attention_blocks": [3],
                "window_positional_embedding_background_size": [2, 2],
            },
            "backbone_channel_list": [32, 24, 16, 8],
            "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
            "fpn_hidden_size": 32,
        },
        "prompt_encoder_config": PROMPTS,
        "mask_decoder_config": DECODER,
    },
}


def load(folder: Path) -> SamPredictor:
    predictor = load_predictor(str(folder), torch.device("cpu"), offline=True)
    assert isinstance(predictor, SamPredictor)
    return predictor


def write(folder: Path, kind: str) -> Any:
    """A random model as transformers writes it, whose predicted IoU rises from sub-part to whole."""
    import transformers as library

    transformers: Any = library
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}Model")(
        getattr(transformers, f"{kind}Config")(**SIZES[kind])
    ).eval()
    with torch.no_grad():
        for value in model.parameters():
            if value.dim() > 1:
                value.normal_(std=0.3)
        last = model.mask_decoder.iou_prediction_head.proj_out
        last.weight.mul_(0.01)
        last.bias.copy_(torch.tensor([0.0, 0.3, 0.6, 0.9]))
    model.save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def tiny() -> SamPredictor:
    return load(GOLDEN / "sam_tiny")


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    return Path(shutil.copytree(GOLDEN / "sam_tiny", tmp_path / "sam"))


def edit(file: Path, **changes: Any) -> None:
    values = json.loads(file.read_text())
    for key, value in changes.items():
        *outer, last = key.split("__")
        inner = values
        for part in outer:
            inner = inner[part]
        inner[last] = value
    file.write_text(json.dumps(values))


def test_answers_are_the_published_ones(tiny: SamPredictor) -> None:
    tiny.encode(IMAGE)
    embedding = tiny._embeddings["image_embeddings"][0].numpy()
    assert np.abs(embedding - TINY["embedding"]).max() < 1e-5
    logits, iou = tiny.predict(TINY["points"])
    scale = np.abs(TINY["low_res_logits"]).max()
    assert np.abs(logits.numpy() - TINY["low_res_logits"]).max() < 5e-3 * scale
    assert np.abs(iou.numpy() - TINY["iou"]).max() < 1e-4
    masks = (tiny.enlarge(logits.flatten(0, 1)) > 0).unflatten(0, (4, 3)).numpy()
    assert (masks != (TINY["logits"] > 0)).sum(axis=(2, 3)).max() <= 20


@pytest.mark.parametrize(("run", "part_filter"), [("nofilter", False), ("fma", True)])
def test_proposals_are_the_published_ones(tiny: SamPredictor, run: str, part_filter: bool) -> None:
    regions = propose(IMAGE, tiny, ProposalConfig(points=(12, 6), part_filter=part_filter))
    levels, iou, stability, points = (
        TINY[f"{run}_{name}"] for name in ("level", "iou", "stability", "point")
    )
    published = Regions(
        regions.size, TINY[f"{run}_rle_counts"], TINY[f"{run}_rle_lengths"], levels, iou, stability, points
    )
    assert len(regions) == len(published)
    assert (regions.masks() != published.masks()).sum(axis=(1, 2)).max() <= 20
    assert regions.levels.tolist() == levels.tolist()
    assert np.abs(regions.points - points).max() < 1e-4
    assert np.abs(regions.iou - iou).max() < 1e-4
    assert np.abs(regions.stability - stability).max() < 0.02


def test_points_of_a_batch_move_answers_by_rounding_alone(tiny: SamPredictor) -> None:
    config = ProposalConfig(points=(6,))
    one, other = (propose(IMAGE, tiny, config, points_per_batch=batch) for batch in (1, 36))
    assert one.points.tolist() == other.points.tolist()
    assert (one.masks() != other.masks()).sum() <= 20
    again = propose(IMAGE, tiny, config, points_per_batch=36)
    assert np.array_equal(again.counts, other.counts)
    assert np.array_equal(again.iou, other.iou)


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1), (3, 2)])
def test_images_of_few_pixels_are_seen(tiny: SamPredictor, size: tuple[int, int]) -> None:
    for image in (IMAGE[60 : 60 + size[0], : size[1]], np.full((*size, 3), 7, np.uint8)):
        tiny.encode(np.resize(image, (*size, 3)))
        logits, _ = tiny.predict(np.array([[0.5, 0.5]]))
        assert tiny.enlarge(logits[0]).shape == (3, *size)
        propose(np.resize(image, (*size, 3)), tiny, ProposalConfig(points=(2, 1))).check("it")


def test_one_colour_is_looked_at_as_any_other(tiny: SamPredictor) -> None:
    propose(np.full((40, 60, 3), 90, np.uint8), tiny, ProposalConfig(points=(4, 2))).check("it")


@pytest.mark.parametrize("kind", ["SamHQ", "Sam2"])
def test_answers_are_those_of_transformers(kind: str, tmp_path: Path) -> None:
    """Levels keep their places, though SAM-HQ gives the mask of the highest predicted IoU first."""
    model = write(tmp_path, kind)
    predictor = load(tmp_path)
    predictor.encode(IMAGE)
    points = np.array([[30.0, 20.0], [171.5, 100.25], [90.0, 60.0]])
    logits, iou = predictor.predict(points)
    height, width = (64, 64) if kind == "Sam2" else (43, 64)
    seen = np.array(Image.fromarray(IMAGE).resize((width, height), Image.Resampling.BILINEAR))
    pixels = (torch.from_numpy(seen).float() / 255 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor(
        [0.229, 0.224, 0.225]
    )
    pixels = F.pad(pixels.permute(2, 0, 1), (0, 0, 0, 64 - height))[None]
    scaled = torch.from_numpy(points * [width / 180, height / 120]).float()
    with torch.no_grad():
        found = model(pixel_values=pixels, input_points=scaled[None, :, None])
    order = [2, 1, 0] if kind == "SamHQ" else [0, 1, 2]
    torch.testing.assert_close(iou, found.iou_scores[0][:, order], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(logits, found.pred_masks[0][:, order], atol=1e-3, rtol=1e-3)
    assert (iou[:, 0] < iou[:, 1]).all()
    assert (iou[:, 1] < iou[:, 2]).all()
    enlarged = predictor.enlarge(logits[0])
    if kind == "Sam2":
        expected = F.interpolate(logits[:1], (120, 180), mode="bilinear")[0]
    else:
        full = F.interpolate(logits[:1], (64, 64), mode="bilinear")[..., :43, :]
        expected = F.interpolate(full, (120, 180), mode="bilinear")[0]
    torch.testing.assert_close(enlarged, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["SamHQ", "Sam2"])
def test_other_models_propose_regions(kind: str, tmp_path: Path) -> None:
    write(tmp_path, kind)
    config = ProposalConfig(points=(4, 2), iou_threshold=0.0, stability_threshold=0.3, level="area")
    regions = propose(IMAGE, load(tmp_path), config)
    regions.check("it")
    assert len(regions)


def test_a_sam_2_stored_for_video_is_read(tmp_path: Path) -> None:
    write(tmp_path, "Sam2")
    plain = load(tmp_path)
    edit(tmp_path / "config.json", model_type="sam2_video", memory_attention_num_layers=4, num_maskmem=7)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({**tensors, "memory_encoder.weight": torch.zeros(3)}, tmp_path / "model.safetensors")
    predictor = load(tmp_path)
    answers = []
    for each in (plain, predictor):
        each.encode(IMAGE)
        answers.append(each.predict(TINY["points"])[0])
    assert torch.equal(*answers)


def test_pixel_statistics_are_the_models_own(copied: Path, tiny: SamPredictor) -> None:
    edit(copied / "preprocessor_config.json", image_mean=[0.5, 0.5, 0.5])
    other = load(copied)
    tiny.encode(IMAGE)
    other.encode(IMAGE)
    assert not torch.equal(tiny._embeddings["image_embeddings"], other._embeddings["image_embeddings"])
    assert other.digest != tiny.digest
    (copied / "preprocessor_config.json").rename(copied / "processor_config.json")
    edit(
        copied / "processor_config.json",
        image_processor={"image_mean": [0.5] * 3, "image_std": [0.229, 0.224, 0.225]},
    )
    assert load(copied).digest == other.digest
    # a file that doesn't say both is passed over
    (copied / "preprocessor_config.json").write_text('{"image_mean": [0.1, 0.1, 0.1]}')
    assert load(copied).digest == other.digest
    (copied / "preprocessor_config.json").unlink()
    (copied / "processor_config.json").unlink()
    assert load(copied).digest == tiny.digest


def test_the_digest_is_that_of_what_determines_answers(copied: Path, tiny: SamPredictor) -> None:
    edit(
        copied / "config.json",
        transformers_version="9",
        dtype="float16",
        vision_config__initializer_range=0.5,
    )
    assert load(copied).digest == tiny.digest
    assert str(copied) in load(copied).description
    edit(copied / "config.json", vision_config__layer_norm_eps=1e-5)
    assert load(copied).digest != tiny.digest
    shutil.copy(GOLDEN / "sam_tiny" / "config.json", copied)
    tensors = load_file(copied / "model.safetensors")
    tensors["mask_decoder.iou_token.weight"] += 1
    save_file(tensors, copied / "model.safetensors")
    assert load(copied).digest != tiny.digest


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "clip"}, "is of type clip; known are sam, sam_hq, sam2, sam2_video"),
        ({"model_type": None}, "is of type None; known are"),
        ({"vision_config__num_hidden_layers": 10**9}, "has 1000000000 for num_hidden_layers"),
        ({"vision_config__hidden_size": -1}, "has -1 for hidden_size"),
        ({"vision_config__hidden_act": "../../evil/code"}, "for hidden_act"),
        ({"vision_config__hidden_size": 64}, "has shape"),
        ({"vision_config__num_attention_heads": 3}, "don't fit|has shape"),
        ({"vision_config__image_size": 64}, "don't fit|has shape"),
        ({"mask_decoder_config__num_multimask_outputs": 2}, "2 masks a point|has shape"),
        ({"prompt_encoder_config__image_size": "many"}, "image_size"),
    ],
)
def test_models_that_are_none_are_refused_in_one_line(
    copied: Path, changes: dict[str, Any], words: str
) -> None:
    edit(copied / "config.json", **changes)
    with pytest.raises(WeightsError, match=words) as caught:
        load(copied)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


def test_parts_for_different_sizes_are_refused(copied: Path) -> None:
    """Before any weights are read, for a model of billions would be in memory by then."""
    edit(
        copied / "config.json",
        prompt_encoder_config__image_size=256,
        prompt_encoder_config__image_embedding_size=16,
    )
    with pytest.raises(WeightsError, match=r"the parts of its config\.json don't fit"):
        load(copied)


@pytest.mark.parametrize("value", [[0.1, 0.2], "text", [0, 0, 0], [1, 1, None], [1, 1, 1e30]])
def test_impossible_pixel_statistics_are_refused(copied: Path, value: Any) -> None:
    edit(copied / "preprocessor_config.json", image_std=value)
    with pytest.raises(WeightsError, match="preprocessor_config"):
        load(copied)


def test_folders_without_a_model_are_refused(copied: Path, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="is a file"):
        load(copied / "config.json")
    with pytest.raises(WeightsError, match="doesn't exist; give a folder or a hub id"):
        load(tmp_path / "nowhere")
    tensors = load_file(copied / "model.safetensors")
    save_file(
        {key: value for key, value in tensors.items() if "iou_token" not in key}, copied / "model.safetensors"
    )
    with pytest.raises(WeightsError, match=r"lacks 1 tensors, such as mask_decoder\.iou_token\.weight"):
        load(copied)
    (copied / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(WeightsError, match="can't be read"):
        load(copied)
    (copied / "model.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"no model\.safetensors"):
        load(copied)
    (copied / "config.json").unlink()
    with pytest.raises(WeightsError, match=r"no config\.json"):
        load(copied)


@pytest.mark.usefixtures("no_hub")
def test_a_hub_id_that_is_not_here_is_said_to_be_missing() -> None:
    with pytest.raises(WeightsError, match="facebook/sam-vit-base"):
        load_predictor("facebook/sam-vit-base", torch.device("cpu"), offline=True)
