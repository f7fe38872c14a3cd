"""Lower layers never import higher ones, optional packages are imported in one place each."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import rlt

PACKAGE = Path(rlt.__file__).parent
LAYERS = [
    {"errors"},
    {"checks", "structures", "files", "assets"},
    {"video", "tokens", "weights", "plots"},
    {"network"},
    {"checkpoints", "adapters"},
    {"export", "measure", "pretrained"},
    {"data"},
    {"conf"},
    {"loading"},
    {"compare", "benchmark", "inspection", "training", "evaluation", "encoding", "streaming"},
    {"frontier"},
    {"calibrate"},
    {"app"},
    {"cli", "__main__"},
]
"""From low to high. A module may import its own layer and those before it."""
OPTIONAL = (
    "av",
    "matplotlib",
    "gradio",
    "PIL",
    "torchcodec",
    "transformers",
    "kornia",
    "pyarrow",
    "ray",
    "wandb",
    "hydra",
    "cv2",
    "numba",
    "triton",
    "flash_attn",
    "xformers",
    "timm",
)


def imports(path: Path) -> set[str]:
    """Dotted names of all modules that a file imports, inside functions too, but not for type checkers alone."""
    found = set()
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} uses a relative import"
            found.add(node.module or "")
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def part(path: Path) -> str:
    relative = path.relative_to(PACKAGE)
    return relative.parts[0].removesuffix(".py")


def sources() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def test_every_module_has_a_layer() -> None:
    known = set.union(*LAYERS)
    assert {part(path) for path in sources()} <= known
    assert sum(map(len, LAYERS)) == len(known)


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down(path: Path) -> None:
    level = {name: index for index, names in enumerate(LAYERS) for name in names}
    for name in imports(path):
        head, _, rest = name.partition(".")
        if head == "rlt" and rest.split(".")[0] in level:
            assert level[rest.split(".")[0]] <= level[part(path)], f"{part(path)} imports {name}"


@pytest.mark.parametrize("package", OPTIONAL)
def test_optional_packages_are_imported_in_one_place(package: str) -> None:
    users = [path.name for path in sources() if any(name.split(".")[0] == package for name in imports(path))]
    assert len(users) <= 1, f"{package} is imported in {users}"


def test_public_names() -> None:
    assert sorted(rlt.__all__) == sorted(
        [
            "Budget",
            "Clip",
            "Drawn",
            "Encoder",
            "Everything",
            "PackedTokens",
            "PatchSpec",
            "Random",
            "Rule",
            "RunLengthTokens",
            "Segments",
            "Threshold",
            "TokenGrid",
            "TokenStream",
            "UniformFrames",
            "ViTConfig",
            "VisionTransformer",
            "create_model",
            "keep_mask",
            "list_models",
            "pack",
            "patch",
            "read_clip",
            "register_adapter",
            "register_rule",
            "run_lengths",
            "select_tokens",
            "stream",
            "tokenize",
            "unpatch",
        ]
    )
    assert all(hasattr(rlt, name) for name in rlt.__all__)


def test_public_names_are_what_type_checkers_see() -> None:
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    imported = [
        (node.module, alias.name) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names
    ]
    seen = {name: getattr(importlib.import_module(module), name) for module, name in imported if module[:3] == "rlt"}
    assert seen.keys() == set(rlt.__all__)
    assert all(getattr(rlt, name) is value for name, value in seen.items())
    assert set(rlt.__all__) <= set(dir(rlt))
    assert rlt.__version__[0].isdigit()
    assert rlt.video is importlib.import_module("rlt.video")
    with pytest.raises(AttributeError, match="module 'rlt' has no attribute 'read_clips'"):
        _ = rlt.read_clips


@pytest.mark.parametrize(
    ("code", "left_out"),
    [
        ("import rlt", ["torch", "numpy", "av", "typer", "rich"]),
        ("import rlt.cli", ["torch", "numpy", "av", "transformers", "lightning", "matplotlib", "pyarrow", "hydra"]),
        (
            "import rlt; [getattr(rlt, name) for name in rlt.__all__]",
            ["torch._dynamo", "torch._inductor", "transformers", "lightning", "matplotlib", "typer", "rich"],
        ),
    ],
)
def test_what_is_imported_only_where_it_is_needed(code: str, left_out: list[str]) -> None:
    loaded = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys\nprint(*sys.modules)"], capture_output=True, text=True, check=True
    )
    assert not set(left_out) & set(loaded.stdout.split())
