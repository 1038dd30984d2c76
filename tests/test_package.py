"""What holds for the package as a whole: exports, import direction, help, light imports, README."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

import wsss_pipeline
from wsss_pipeline.cli import COMMANDS, main

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "wsss_pipeline"

# Data flows one way: a part imports only itself and what stands before it.
ORDER = ["errors", "config", "runtime", "data", "clip", "cam", "cache", "regions", "refine", "methods"]
ORDER += [
    "pseudo_masks",
    "segmentation",
    "evaluation",
    "pictures",
    "demo",
    "stages",
    "commands",
    "cli",
    "__main__",
]
MODULES = sorted(PACKAGE.rglob("*.py"))


def imported(module: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(module.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import"
            names.add(node.module or "")
        elif isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
    return {name for name in names if name.startswith("wsss_pipeline.")}


@pytest.mark.parametrize("module", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(module: Path) -> None:
    part = module.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if part == "__init__":
        assert not imported(module)
        return
    allowed = ORDER[: ORDER.index(part) + 1]
    assert {name.split(".")[1] for name in imported(module)} <= set(allowed)


def test_exports_exist() -> None:
    for name in wsss_pipeline.__all__:
        assert hasattr(wsss_pipeline, name)


def test_the_documented_cache_interface_is_exported() -> None:
    from wsss_pipeline import cache

    assert {"MaskCache", "PseudoMask"} <= set(cache.__all__)
    for name in cache.__all__:
        assert hasattr(cache, name)


def commands(group: click.Group, prefix: str = "") -> list[tuple[str, click.Command]]:
    context = click.Context(group)
    found: list[tuple[str, click.Command]] = []
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        found.append((f"{prefix}{name}", command))
        if isinstance(command, click.Group):
            found += commands(command, f"{prefix}{name} ")
    return found


@pytest.mark.parametrize(("name", "command"), commands(main), ids=[name for name, _ in commands(main)])
def test_every_command_has_help_with_an_example_and_is_in_the_readme(
    name: str, command: click.Command
) -> None:
    result = CliRunner().invoke(main, [*name.split(), "--help"])
    assert result.exit_code == 0
    assert f"wsss {name}" in result.output, "an example that can be copied"
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.help, f"{name} {parameter.opts} has no help"
    assert f"wsss {name}" in (ROOT / "README.md").read_text("utf-8")


def test_help_lists_all_commands() -> None:
    output = CliRunner().invoke(main, ["--help"]).output
    assert all(name in output for name in COMMANDS)


def test_the_command_line_imports_nothing_heavy() -> None:
    code = (
        "import sys; from click.testing import CliRunner; from wsss_pipeline.cli import main; "
        "assert CliRunner().invoke(main, ['--help']).exit_code == 0; "
        "print([name for name in ('torch', 'cv2', 'h5py', 'numpy', 'transformers', 'PIL') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "module", ["wsss_pipeline.cache", "wsss_pipeline.refine", "wsss_pipeline.stages.label_pixels"]
)
def test_worker_processes_and_cache_readers_need_no_torch(module: str) -> None:
    code = f"import sys, {module}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("arguments", [["nonsense"], ["generate-masks", "--nonsense"], ["evaluate"]])
def test_wrong_usage_exits_with_2(arguments: list[str]) -> None:
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2
    assert "Traceback" not in result.output


def test_every_error_is_a_wsss_error() -> None:
    from wsss_pipeline import errors

    classes = [item for item in vars(errors).values() if isinstance(item, type)]
    assert all(issubclass(item, errors.WsssError) and item.__doc__ for item in classes)
