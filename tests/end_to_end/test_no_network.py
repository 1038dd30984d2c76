"""With weights that are on this machine no command looks for another one; --offline holds for all libraries."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from wsss_pipeline.cli import COMMANDS
from wsss_pipeline.demo.voc_folder import write_voc_folder
from wsss_pipeline.runtime.output import check_replaceable
from wsss_pipeline.segmentation.checkpoint import load_network, save_network
from wsss_pipeline.segmentation.networks import build_network
from wsss_pipeline.segmentation.train_config import NetworkConfig

ROOT = Path(__file__).parent.parent.parent
DATA = ("--voc", "voc", "--split", "train", "--classes", "demo")
CLIP = ("--clip", "demo", "--device", "cpu")
RUN = ("--checkpoint", "run", "--device", "cpu")
NETWORK = (
    "--network",
    "segformer",
    "--encoder",
    "tiny",
    "--weights",
    "none",
    "--crop",
    "48",
    "--workers",
    "0",
)
# every command in the order of work, for each reads what one before it wrote
LINES: list[tuple[str, ...]] = [
    ("generate-masks", *DATA, *CLIP, "--workers", "0"),
    (
        *("learn-prompts", *DATA, *CLIP, "--out", "prompts", "--workers", "0"),
        *("--iterations", "1", "--batch-size", "2", "--set", "augmentation.crop=48"),
    ),
    (
        *("generate-masks", *DATA, *CLIP, "--workers", "0", "--method", "fma", "--refine", "none"),
        *("--prompts", "prompts/prompts.safetensors", "--cache", "prompted"),
    ),
    ("attributes", "check", "--classes", "demo", *CLIP),
    ("select-prompt", *DATA, *CLIP, "--template", "a {}.", "--limit", "4"),
    ("cache", "ls"),
    ("cache", "status"),
    ("cache", "verify"),
    ("cache", "gc"),
    ("cache", "merge", "cache", "--into", "merged"),
    ("preview", "--cache", "cache", "--images", "voc/JPEGImages"),
    ("preview", "--cache", "cache", "--images", "voc/JPEGImages", "--html", "look"),
    ("export-masks", "--cache", "cache", "--out", "masks"),
    (
        *("train-seg", "--cache", "cache", "--images", "voc/JPEGImages", "--out", "run", *NETWORK),
        *("--iterations", "1", "--batch-size", "2", "--device", "cpu"),
    ),
    (
        *("train-seg", "--online", "weclip", "--classes", "demo", "--labels", "voc/Annotations"),
        *("--images", "voc/JPEGImages", "--out", "online", "--crop", "48", "--workers", "0"),
        *("--iterations", "1", "--batch-size", "2", "--device", "cpu"),
    ),
    ("evaluate", *RUN, "--images", "voc/JPEGImages", "--gt", "voc/SegmentationClass", "--crf"),
    ("evaluate", "--cache", "cache", "--gt", "voc/SegmentationClass"),
    ("predict", *RUN, "--images", "voc/JPEGImages", "--out", "predictions"),
    ("compare", "cache", "run", "--images", "voc/JPEGImages", "--device", "cpu", "--report", "compare.html"),
    ("relabel", *RUN, "--images", "voc/JPEGImages", "--labels", "voc/Annotations", "--cache", "relabelled"),
    (
        *("propose-regions", "--sam", str(ROOT / "tests/golden/fma/sam_tiny"), "--images", "voc/JPEGImages"),
        *("--out", "regions", "--set", "points=[3]", "--device", "cpu"),
    ),
    ("cache", "verify", "regions"),
    ("export-model", "--checkpoint", "run", "--out", "hf", "--format", "huggingface"),
    ("export-model", "--checkpoint", "run", "--out", "network.onnx"),
    ("config", "show"),
    ("run", "clip-es/demo", "out=chain", "--dry-run"),
    ("doctor", "--clip", "demo"),
]
# run in a process of its own, for a hook can't be taken out again
GUARDED = """
import os, sys
def watch(event, arguments):
    if event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr", "socket.sendto") or (
        event == "socket.connect" and not isinstance(arguments[1], (str, bytes))  # of AF_UNIX a path
    ):
        sys.__stderr__.write(f"NETWORK {event} {arguments[1:]}\\n")
        sys.__stderr__.flush()
        os._exit(77)
sys.addaudithook(watch)
"""
RUNS = """
import json
from wsss_pipeline.cli import main
def run(line):  # the commands that never fetch anything put the whole process offline
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        os.environ.pop(name, None)
    if "huggingface_hub.constants" in sys.modules:
        sys.modules["huggingface_hub.constants"].HF_HUB_OFFLINE = False
    try:
        main(line, prog_name="wsss")
    except SystemExit as end:
        print(json.dumps([line[:2], end.code]), flush=True)
for line in json.loads(sys.argv[1]):
    run(line)
"""
DEMO = """
from pathlib import Path
import huggingface_hub.constants
from wsss_pipeline.stages.demo import run_demo
huggingface_hub.constants.HF_HUB_OFFLINE = False
settings = ["optimisation.iterations=1", "optimisation.batch=2", "augmentation.crop=48"]
report = run_demo(Path("demo"), recipe="demo/segformer", scenes=(4, 2), overrides=settings)
assert report.scores
"""
# each command in a fork, for what is once offline stays so; torch has nothing to do with it, but takes seconds
OFFLINE = """
import torch
assert "huggingface_hub" not in sys.modules
for line in json.loads(sys.argv[2]):
    child = os.fork()
    if child:
        assert os.waitpid(child, 0)[1] == 0
        continue
    if line[0] == "generate-masks":
        import huggingface_hub.constants
    run(line)
    import huggingface_hub.constants as constants
    from transformers.utils.hub import is_offline_mode
    print(constants.HF_HUB_OFFLINE, is_offline_mode(), os.environ["HF_HUB_OFFLINE"], flush=True)
    os._exit(0)
"""


def guarded(folder: Path, code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Python code in ``folder`` that ends with 77 once it looks for another machine, though it is free to."""
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("HF_", "COVERAGE_"))
    }
    return subprocess.run(
        [sys.executable, "-c", GUARDED + code, *arguments],
        cwd=folder,
        env={
            **environment,
            "PYTHONPATH": str(ROOT),
            "HOME": str(folder),
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        },
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_the_guard_sees_what_it_should(tmp_path: Path) -> None:
    for call in ("create_connection(('127.0.0.1', 9))", "getaddrinfo('localhost', 80)", "gethostbyname('x')"):
        assert guarded(tmp_path, f"import socket; socket.{call}").returncode == 77, call
    assert guarded(tmp_path, "import socket; socket.socketpair()").returncode == 0


def strange_lines(place: Path) -> list[list[str]]:
    """Commands on a checkpoint whose config.json, which may be anybody's, names a place in the hub as its encoder."""
    config = NetworkConfig(name="segformer", encoder="tiny", weights="none")
    checkpoint = place / "strange" / "best"
    save_network(build_network(config, 3), checkpoint, config, ["cat", "dog"])
    named = json.loads((checkpoint / "config.json").read_text())
    named["network"] |= {"name": "unet", "encoder": "tu-hf_hub:owner/x"}
    (checkpoint / "config.json").write_text(json.dumps(named))
    images = ("--images", "voc/JPEGImages", "--device", "cpu")
    further = {
        "predict": [*images, "--out", "out"],
        "evaluate": [*images, "--gt", "voc/SegmentationClass"],
        "export-model": ["--out", "net.onnx"],
    }
    return [[command, "--checkpoint", "strange", *rest] for command, rest in further.items()]


def check_exported(folder: Path) -> None:
    """What export-model wrote of the network in ``run`` computes what that does, with its names of classes."""
    import onnxruntime
    from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation

    check_replaceable(folder / "network.onnx")  # as this program's own
    # the producer stands at the beginning, however long the names of the classes behind it are
    assert b"wsss-pipeline" in (folder / "network.onnx").read_bytes()[:100]
    images = torch.randn(2, 3, 50, 81)
    session = onnxruntime.InferenceSession(str(folder / "network.onnx"), providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"images": images.numpy()})
    with torch.no_grad():
        expected = load_network(folder / "run").network(images).numpy()
    assert np.abs(logits - expected).max() < 1e-3
    names = json.loads(session.get_modelmeta().custom_metadata_map["id2label"])
    assert (names["0"], names["10"]) == ("background", "starfish")

    model = AutoModelForSemanticSegmentation.from_pretrained(folder / "hf")
    processor = AutoImageProcessor.from_pretrained(folder / "hf")
    with Image.open(folder / "voc/JPEGImages/train_00000.jpg") as picture:
        inputs = processor(picture, return_tensors="pt")
    assert model(**inputs).logits.shape[1] == 11
    assert model.config.id2label[0] == "background"
    assert model.config.id2label[10] == "starfish"


def test_no_command_looks_for_another_machine(tmp_path: Path) -> None:
    """All of them in one process, for its start takes long; what is exported is looked at, for so does that."""
    assert {line[0] for line in LINES} | {"demo"} == set(COMMANDS)
    write_voc_folder(tmp_path / "voc", seed=5, scenes={"train": 4}, size=(64, 48))
    refused = strange_lines(tmp_path)
    done = guarded(tmp_path, RUNS + DEMO, json.dumps([*LINES, *refused]))
    assert "NETWORK" not in done.stderr, done.stderr
    ends = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[[")]
    assert ends == [*([list(line[:2]), 0] for line in LINES), *([line[:2], 2] for line in refused)], (
        done.stderr
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("can't have the encoder 'tu-hf_hub:owner/x'") == len(refused)
    assert "checked against torch on 2 shapes" in done.stderr
    check_exported(tmp_path)


def test_offline_holds_for_all_that_is_imported(tmp_path: Path) -> None:
    """The commands themselves end at once: nothing that they name is there."""
    lines = [
        f"{arguments} --offline".split()
        for arguments in (
            "predict --checkpoint x --images x --out y",
            "evaluate --checkpoint x --images x --gt x",
            "export-model --checkpoint x --out y",
            "generate-masks --images x --labels x --classes cat,dog",
            "train-seg --cache x --images x --out y",
        )
    ]
    done = guarded(tmp_path, RUNS + OFFLINE, "[]", json.dumps(lines))
    assert done.returncode == 0, done.stderr
    said = iter(done.stdout.splitlines())
    for line, end, offline in zip(lines, said, said, strict=True):
        assert json.loads(end) == [line[:2], 2], "refused, and not for --offline"
        assert offline == "True True 1", line[0]
    assert "No such option" not in done.stderr
