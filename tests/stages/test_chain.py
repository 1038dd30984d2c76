"""Chains: what a file of commands asks for, what it comes to, and how it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import click
import pytest
import yaml
from click.testing import CliRunner

from wsss_pipeline.cli import COMMANDS, main
from wsss_pipeline.config import recipe_names
from wsss_pipeline.errors import ConfigError
from wsss_pipeline.methods import method_names, preset_names
from wsss_pipeline.stages.chain import Chain, chain_names, commands, load_chain
from wsss_pipeline.stages.relabel import PRESETS

INPUTS = {"out": {"about": "folder"}, "seed": {"about": "number", "default": "0"}}


def chain(tmp_path: Path, stages: dict[str, str], inputs: dict[str, object] | None = None) -> Chain:
    file = tmp_path / "chain.yaml"
    file.write_text(
        yaml.safe_dump({"about": "Test.", "inputs": inputs or INPUTS, "stages": stages}, sort_keys=False)
    )
    return load_chain(str(file))


@pytest.mark.parametrize("name", chain_names())
def test_every_chain_consists_of_commands_as_they_are(name: str) -> None:
    """Each parses, and its presets and recipes are there."""
    loaded = load_chain(name)
    values = {key: "x" if given.default is None else given.default for key, given in loaded.inputs.items()}
    for stage, words in commands(loaded, values).items():
        assert words[0] in COMMANDS, stage
        command = main.get_command(click.Context(main), words[0])
        assert command is not None
        # below the group, for a command remembers the names of its help option
        group = click.Context(main, **main.context_settings)
        command.make_context(words[0], [*words[1:], "--offline"], parent=group)
        presets = PRESETS if words[0] == "relabel" else preset_names()
        for option, known in (("--recipe", recipe_names()), ("--preset", presets)):
            if option in words and words[0] not in ("propose-regions", "learn-prompts"):
                assert words[words.index(option) + 1] in known, stage


def test_every_published_system_has_a_chain_for_each_data_set() -> None:
    systems = (*method_names(), "weakclip")  # which is a network, on the masks of a method
    assert {f"{system}/{data}" for system in systems for data in ("voc12", "coco14", "demo")} == set(
        chain_names()
    )


def test_a_path_with_a_space_stays_one_word(tmp_path: Path) -> None:
    loaded = chain(
        tmp_path, {"data": "demo --out {out}", "masks": "preview --cache '{data}/my cache' --out {out}/a"}
    )
    words = commands(loaded, loaded.values(["out=my folder"]))
    assert words["data"] == ["demo", "--out", "my folder"]
    assert words["masks"] == ["preview", "--cache", "<data>/my cache", "--out", "my folder/a"]


def test_a_default_may_name_other_inputs(tmp_path: Path) -> None:
    inputs = {
        "out": {"about": "folder", "default": "runs/{seed}"},
        "seed": {"about": "number", "default": "3"},
    }
    assert chain(tmp_path, {"data": "demo --out {out}"}, inputs).values([]) == {"out": "runs/3", "seed": "3"}


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ({"data": "demo --out {elsewhere}"}, "stage 'data': nothing before it is called {elsewhere}"),
        ({"one": "demo --out {two}", "two": "demo"}, "stage 'one': nothing before it is called {two}"),
        ({"data": "run clip-es/demo"}, "other than run"),
        ({"data": ""}, "must begin with a command"),
        ({"data": "demo --out 'x"}, "quotes"),
        ({"out": "demo"}, "name of an input"),
        ({}, "stages"),
    ],
)
def test_a_chain_that_cannot_be_is_refused(tmp_path: Path, stages: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        chain(tmp_path, stages)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], r"needs out=\.\.\. \(folder\)"),
        (["out"], "NAME=VALUE"),
        (["out="], "NAME=VALUE"),
        (["out=a", "sed=1"], "did you mean 'seed'"),
        (["out=a", "out=b"], "twice"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(tmp_path: Path, given: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        chain(tmp_path, {"data": "demo --out {out}"}).values(given)


def test_an_empty_chain_is_refused_with_what_it_lacks(tmp_path: Path) -> None:
    (tmp_path / "chain.yaml").write_text("")
    with pytest.raises(ConfigError, match=r"chain .*chain\.yaml: 'about' is missing"):
        load_chain(str(tmp_path / "chain.yaml"))


def test_an_unknown_chain_is_a_line_with_the_known_ones() -> None:
    result = CliRunner().invoke(main, ["run", "clip-es/dem"])
    assert result.exit_code == 2
    assert "did you mean 'clip-es/demo'?" in result.output


def test_without_a_name_all_are_listed_and_with_one_its_inputs() -> None:
    listed = CliRunner().invoke(main, ["run"])
    assert listed.exit_code == 0
    assert all(name in listed.output for name in chain_names())
    asked = CliRunner().invoke(main, ["run", "clip-es/voc12"])
    assert asked.exit_code == 2
    assert "voc=..." in asked.output


def run(*arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "wsss_pipeline", "run", *map(str, arguments)]
    return subprocess.run(words, capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload,no-any-return]


def test_stages_get_what_those_before_them_made_and_the_first_that_fails_ends_it(tmp_path: Path) -> None:
    chain(
        tmp_path,
        {
            "data": "demo --data-only --out {out}",
            "masks": "evaluate --cache {data} --gt {data}/SegmentationClass",
            "never": "demo --out {out}/never",
        },
    )
    done = run(tmp_path / "chain.yaml", f"out={tmp_path / 'my out'}", "--offline")
    assert done.returncode == 2
    last = str(tmp_path / "my out" / "data")
    assert done.stdout.splitlines()[-1] == last
    assert (
        f"2/3 masks: wsss evaluate --cache '{last}' --gt '{last}/SegmentationClass' --offline" in done.stderr
    )
    assert "stage masks could not do its work (exit code 2)" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "my out" / "never").exists()


@pytest.fixture
def acted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """In place of every command ``acts.sh``, which gets its words; what was called stands in ``calls``."""
    script = tmp_path / "python"
    script.write_text(f'#!/bin/sh\nshift 2\necho "$*" >> {tmp_path}/calls\n. {tmp_path}/acts.sh\n')
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    return tmp_path


STAGES = {"data": "demo --out {out}", "masks": "preview --cache {data}", "seen": "compare {masks}"}


def test_a_stage_that_fails_ends_the_chain_and_the_same_line_goes_on_there(acted: Path) -> None:
    chain(acted, STAGES)
    (acted / "acts.sh").write_text("[ $1 = preview ] && exit 139; echo $1-made")
    words = ["run", str(acted / "chain.yaml"), "out=here"]
    ended = CliRunner().invoke(main, words)
    assert ended.exit_code == 139
    assert "stage masks could not do its work (exit code 139)" in ended.stderr
    assert (acted / "calls").read_text().splitlines() == ["demo --out here", "preview --cache demo-made"]
    (acted / "acts.sh").write_text("echo $1-made; [ $1 != preview ]")  # some images of which failed
    again = CliRunner().invoke(main, words)
    assert again.exit_code == 1
    assert (acted / "calls").read_text().splitlines()[2:] == [
        *("demo --out here", "preview --cache demo-made", "compare preview-made")
    ]


def test_no_stage_gets_an_empty_path(acted: Path) -> None:
    chain(acted, STAGES)
    (acted / "acts.sh").write_text("[ $1 = preview ] || echo made")
    ended = CliRunner().invoke(main, ["run", str(acted / "chain.yaml"), "out=here"])
    assert ended.exit_code == 2
    assert "stage seen can't begin: masks printed nothing that {masks} could stand for" in ended.stderr
    assert "compare" not in (acted / "calls").read_text()


def test_an_interrupted_stage_ends_the_chain_with_the_line_that_goes_on(tmp_path: Path) -> None:
    chain(tmp_path, {"data": "demo --out {out}", "again": "demo --out {out}"})
    words = [
        sys.executable,
        "-m",
        "wsss_pipeline",
        "run",
        str(tmp_path / "chain.yaml"),
        f"out={tmp_path / 'out'}",
    ]
    process = subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    until = time.monotonic() + 60
    while not (tmp_path / "out" / "cache").exists() and time.monotonic() < until:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert "interrupted in stage data; go on with: wsss run" in output
    assert "2/2" not in output
    assert "Traceback" not in output
