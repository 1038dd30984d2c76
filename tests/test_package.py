"""What holds for the package as a whole: exports, import direction, help, light imports, README."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

import wsss_pipeline
from wsss_pipeline.cli import COMMANDS, main

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "wsss_pipeline"

# Data flows one way: a part imports only itself and what stands before it.
ORDER = [
    "errors",
    "files",
    "config",
    "runtime",
    "data",
    "clip",
    "cam",
    "cache",
    "regions",
    "refine",
    "segmentation",
    "prompts",
]
ORDER += [
    "methods",
    "pseudo_masks",
    "evaluation",
    "pictures",
    "demo",
    "stages",
    "commands",
    "cli",
    "__main__",
]
MODULES = sorted(PACKAGE.rglob("*.py"))


def name_of(module: Path) -> str:
    """``wsss_pipeline.cam.scores`` for its file; a package is its ``__init__``."""
    parts = ("wsss_pipeline", *module.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


NAMES = {name_of(module) for module in MODULES}


def is_for_types_alone(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def imported(module: Path) -> set[str]:
    """Modules of this package that a module imports when it runs, those inside its functions included.

    A name out of a package is the package's own or a module in it. What only type checkers follow takes no part.
    """
    found: set[str] = set()
    waiting: list[ast.AST] = [ast.parse(module.read_text("utf-8"))]
    while waiting:
        node = waiting.pop()
        if is_for_types_alone(node):
            assert isinstance(node, ast.If)
            waiting += node.orelse
            continue
        waiting += ast.iter_child_nodes(node)
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import"
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= inside & NAMES
            if inside - NAMES:
                found.add(node.module or "")
        elif isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
    return {name for name in found if name.startswith("wsss_pipeline.")}


@pytest.mark.parametrize("module", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(module: Path) -> None:
    part = module.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if part == "__init__":
        assert not imported(module)
        return
    allowed = ORDER[: ORDER.index(part) + 1]
    assert {name.split(".")[1] for name in imported(module)} <= set(allowed)


def test_no_module_imports_itself_by_way_of_others() -> None:
    """Inside a folder too; importing a module runs the ``__init__`` of each folder above it first."""
    graph = {}
    for module in MODULES:
        name, targets = name_of(module), imported(module)
        above = {target.rpartition(".")[0] for target in targets} - {"wsss_pipeline", name.rpartition(".")[0]}
        graph[name] = (targets | above) - {name}
    unknown = set().union(*graph.values()) - NAMES
    assert not unknown
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"a circle of imports: {' <- '.join(error.args[1])}")


def test_the_public_interface_is_there_and_importing_it_is_light() -> None:
    """Who uses a part of it pays for that part alone: seconds of torch are for those who need torch."""
    heavy = ("torch", "numpy", "pydantic", "click", "yaml", "h5py", "cv2", "PIL", "transformers")
    code = (
        "import sys, wsss_pipeline; from wsss_pipeline import WsssError; "
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    wanted = {"MaskGenerator", "Segmenter", "MaskCache", "generate_masks", "train_seg", "evaluate"}
    assert wanted | {"load_class_set", "WsssError"} <= set(wsss_pipeline.__all__)
    assert dir(wsss_pipeline) == wsss_pipeline.__all__
    for name in wsss_pipeline.__all__:
        assert getattr(wsss_pipeline, name) is not None
    with pytest.raises(AttributeError, match="nonsense"):
        wsss_pipeline.nonsense  # noqa: B018


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
    assert f"`wsss {name.split()[0]}`" in (ROOT / "README.md").read_text("utf-8")


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


def test_reading_a_cache_needs_no_torch() -> None:
    code = "import sys, wsss_pipeline.cache, wsss_pipeline.stages.export_masks; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("arguments", [["nonsense"], ["generate-masks", "--nonsense"], ["evaluate"]])
def test_wrong_usage_exits_with_2(arguments: list[str]) -> None:
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2
    assert "Traceback" not in result.output


def test_a_mistake_of_ours_is_no_work_done(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 1 is for failed images; with a traceback Python would have ended so."""
    monkeypatch.setattr("wsss_pipeline.commands.doctor.command.callback", lambda **options: {}["x"])
    with pytest.raises(SystemExit) as ended:
        main(["doctor"], prog_name="wsss")
    assert ended.value.code == 2
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith("Traceback")
    assert said[-1].startswith("error: KeyError, a mistake of wsss itself")


def test_every_error_is_a_wsss_error() -> None:
    from wsss_pipeline import errors

    classes = [item for item in vars(errors).values() if isinstance(item, type)]
    assert all(issubclass(item, errors.WsssError) and item.__doc__ for item in classes)
