"""With weights that are on this machine no command looks for another one; --offline holds for all libraries."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from wsss_pipeline.cli import COMMANDS

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
for line in json.loads(sys.argv[1]):
    try:
        main(line, prog_name="wsss")
    except SystemExit as end:
        print(json.dumps([line[:2], end.code]), flush=True)
"""
DEMO = """
from pathlib import Path
from wsss_pipeline.stages.demo import run_demo
settings = ["optimisation.iterations=1", "optimisation.batch=2", "augmentation.crop=48"]
report = run_demo(Path("demo"), recipe="demo/segformer", scenes=(4, 2), overrides=settings)
assert report.scores
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


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from wsss_pipeline.demo.voc_folder import write_voc_folder

    folder = tmp_path_factory.mktemp("place")
    write_voc_folder(folder / "voc", seed=5, scenes={"train": 4}, size=(64, 48))
    return folder


def test_the_guard_sees_what_it_should(tmp_path: Path) -> None:
    for call in ("create_connection(('127.0.0.1', 9))", "getaddrinfo('localhost', 80)", "gethostbyname('x')"):
        assert guarded(tmp_path, f"import socket; socket.{call}").returncode == 77, call
    assert guarded(tmp_path, "import socket; socket.socketpair()").returncode == 0


def test_no_command_looks_for_another_machine(place: Path) -> None:
    assert {line[0] for line in LINES} | {"demo"} == set(COMMANDS)
    done = guarded(place, RUNS, json.dumps(LINES))
    assert "NETWORK" not in done.stderr, done.stderr
    ends = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[[")]
    assert ends == [[list(line[:2]), 0] for line in LINES], done.stderr
    assert done.returncode == 0, done.stderr


def test_the_demo_looks_for_no_other_machine(tmp_path: Path) -> None:
    done = guarded(tmp_path, DEMO)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", ["predict", "evaluate", "export-model", "generate-masks", "train-seg"])
def test_offline_holds_for_all_that_is_imported(tmp_path: Path, command: str) -> None:
    """The command itself ends at once: nothing that it names is there."""
    inputs = {"export-model": "--checkpoint x --out y", "evaluate": "--checkpoint x --images x --gt x"}
    arguments = {
        **inputs,
        "predict": "--checkpoint x --images x --out y",
        "generate-masks": "--images x --labels x --classes cat,dog",
        "train-seg": "--cache x --images x --out y",
    }[command].split()
    code = RUNS + (
        "import os, huggingface_hub.constants as constants\n"
        "from transformers.utils.hub import is_offline_mode\n"
        "print(constants.HF_HUB_OFFLINE, is_offline_mode(), os.environ['HF_HUB_OFFLINE'])"
    )
    before = "import huggingface_hub.constants\n" if command == "generate-masks" else ""
    done = guarded(tmp_path, before + code, json.dumps([[command, *arguments, "--offline"]]))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "True True 1"
    assert json.loads(done.stdout.splitlines()[0])[1] == 2, "refused, and not for --offline"
    assert "No such option" not in done.stderr


def test_an_encoder_that_names_a_place_in_the_hub_is_refused(place: Path, tmp_path: Path) -> None:
    """A checkpoint may be anybody's: what its config.json names isn't asked for."""
    config = {
        "model_type": "wsss-segmentation",
        "network": {"name": "unet", "encoder": "tu-hf_hub:owner/x", "weights": "none"},
        "id2label": {"0": "background", "1": "cat"},
        "label2id": {"background": 0, "cat": 1},
    }
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    (tmp_path / "run" / "model.safetensors").write_bytes(b"")
    images = ("--images", str(place / "voc/JPEGImages"), "--device", "cpu")
    further = {
        "predict": [*images, "--out", "out"],
        "evaluate": [*images, "--gt", str(place / "voc/SegmentationClass")],
        "export-model": ["--out", "net.onnx"],
    }
    lines = [[command, "--checkpoint", "run", *rest] for command, rest in further.items()]
    done = guarded(tmp_path, RUNS, json.dumps(lines))
    assert "NETWORK" not in done.stderr, done.stderr
    ends = [json.loads(line)[1] for line in done.stdout.splitlines()]
    assert ends == [2, 2, 2], done.stderr
