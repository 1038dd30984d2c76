"""``make demo``: the main job on the embedded pictures, offline, with a CLIP made on the spot.

The CLIP is the golden vision tower with a text tower of seeded random weights: what it finds means nothing,
but every step is the real one.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import transformers

from tests.tiny_clip import write_golden_clip

GOLDEN = Path(__file__).parent / "golden"


def main() -> None:
    """Run the commands that a user would, and say where to look."""
    out = Path(sys.argv[1])
    transformers.utils.logging.disable_progress_bar()
    clip = write_golden_clip(out / "clip", GOLDEN)
    labels = {name: item["labels"] for name, item in json.loads((GOLDEN / "labels.json").read_text()).items()}
    (out / "labels.json").write_text(json.dumps(labels, indent=1))
    images = GOLDEN / "images"
    done = wsss(
        *("generate-masks", "--images", images, "--labels", out / "labels.json", "--classes", "voc12"),
        *("--clip", clip, "--cache", out / "cache", "--offline", "--store-cams"),
    )
    masks = done.splitlines()[-1]
    wsss(
        "export-masks",
        "--cache",
        masks,
        "--out",
        out / "masks",
        "--format",
        "voc",
        "--min-confidence",
        "0.95",
    )
    wsss("preview", "--cache", masks, "--images", images, "--out", out / "preview.png")
    print(
        f"\nLook at {out / 'preview.png'} (pictures, masks, confidence, CAMs) and the PNGs in {out / 'masks'}."
    )
    print(f"The masks are in {masks}; run `make demo` again and nothing is computed twice.")
    print("The CLIP of this demo has random weights: the masks show that all works, not what CLIP can do.")


def wsss(*arguments: object) -> str:
    """Run one command as a user would; its stdout."""
    command = ["wsss", *(str(argument) for argument in arguments)]
    print(f"$ {shlex.join(command)}", flush=True)
    wsss_here = [sys.executable, "-m", "wsss_pipeline", *command[1:]]
    done = subprocess.run(wsss_here, stdout=subprocess.PIPE, text=True, check=False)
    print(done.stdout, end="", flush=True)
    if done.returncode:
        sys.exit(done.returncode)
    return done.stdout


if __name__ == "__main__":
    main()
