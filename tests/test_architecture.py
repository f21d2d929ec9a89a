"""Who may import whom, and what no code of ours may do, checked on the syntax tree.

Every import counts: absolute or relative, at the top or inside a function, for type checking only, or
by ``importlib.import_module`` and ``__import__`` with a literal name.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "rtdmd"


@dataclass(frozen=True)
class Rule:
    """What a part of the package may import of ours, besides itself; names are relative to ``rtdmd``."""

    may_import: tuple[str, ...] = ()
    only_inside_functions: tuple[str, ...] = ()
    outside: tuple[str, ...] | None = None  # packages besides the standard library; None is any


MATHEMATICS = ("flow", "schedules", "objectives")
BASICS = (*MATHEMATICS, "errors", "files", "randomness", "transfer")
PARTS = ("images", "models", "rewards", "prompts", "rollout", "recipe")
EVERYTHING = (*BASICS, *PARTS, "scheduler", "distributed", "stages", "training")
TOOLS = ("sample", "evaluation", "export", "plan", "doctor")

# The longest matching name decides.
RULES: dict[str, Rule] = {
    **{name: Rule(outside=("torch",)) for name in MATHEMATICS},
    "errors": Rule(outside=()),
    "transfer": Rule(outside=("torch",)),
    "randomness": Rule(("transfer",), outside=("torch", "numpy", "triton")),
    "processes": Rule(("errors",), outside=("torch",)),
    "files": Rule(("errors",), outside=()),
    "runs": Rule(("errors", "files"), outside=()),
    "termination": Rule(outside=("psutil",)),
    "images": Rule(outside=("torch", "PIL")),
    "shapes": Rule(("errors",), outside=("numpy", "scipy")),
    "recipe.schema": Rule(outside=()),
    "recipe": Rule(
        (*MATHEMATICS, "errors"), only_inside_functions=("models", "rewards", "prompts", "evaluation")
    ),
    **{name: Rule((*BASICS, "recipe.schema")) for name in ("models", "prompts", "distributed")},
    "rewards": Rule((*BASICS, "recipe.schema", "images", "shapes")),
    "rollout": Rule((*MATHEMATICS, "models.protocol", "models.guidance")),
    "scheduler": Rule((*MATHEMATICS, "errors")),
    "stages": Rule((*BASICS, *PARTS, "distributed")),
    "training": Rule(
        (*BASICS, *PARTS, "runs", "termination", "scheduler", "evaluation", "sample", "distributed", "stages")
    ),
    # DeepSpeed is optional for these: what leads to it is imported where it is used.
    **{
        name: Rule(
            (*BASICS, *PARTS, "scheduler", "processes", "runs", *TOOLS),
            only_inside_functions=("distributed", "stages", "training"),
        )
        for name in TOOLS
    },
    "cli": Rule(
        (*BASICS, *PARTS, "scheduler", "processes", "runs", *TOOLS), only_inside_functions=EVERYTHING
    ),
    "": Rule(),  # rtdmd/__init__.py
}

# The one part that may import these packages.
OWNERS = {"deepspeed": "distributed"}

# Importing anything else must not import DeepSpeed: sampling, evaluating, exporting work without it.
WITH_DEEPSPEED = ("distributed", "stages", "training")

FORBIDDEN_MODULES = ("pickle", "dill", "cloudpickle")  # loading runs code from the file
MASKED = "numbers that are not finite stop the run; nothing is masked"
FORBIDDEN_NAMES = {"nan_to_num": MASKED, "nan_to_num_": MASKED}
FORBIDDEN_SETTINGS: dict[str, tuple[bool, str]] = {
    "weights_only": (False, "loading would run code from the file"),
    "trust_remote_code": (True, "loading would run code from the hub"),
    "shell": (True, "arguments would be read as shell code"),
    "use_reentrant": (True, "gives wrong gradients under ZeRO-3 with several forwards before a backward"),
}


@dataclass(frozen=True)
class Import:
    """One imported name: ``from a.b import c`` is ``a.b.c``."""

    target: str
    line: int
    inside_function: bool


def within(name: str, prefix: str) -> bool:
    """Whether ``name`` is ``prefix`` or lies below it, by whole dotted parts."""
    return name == prefix or name.startswith(f"{prefix}.")


def absolute_base(node: ast.ImportFrom, module: str, is_package: bool) -> str:
    """The module that ``from … import`` names, with leading dots resolved against ``module``."""
    if node.level == 0:
        return node.module or ""
    parts = module.split(".")
    package = parts if is_package else parts[:-1]
    package = package[: len(package) - (node.level - 1)]
    return ".".join([*package, *([node.module] if node.module else [])])


def imports_of(tree: ast.AST, module: str, is_package: bool = False) -> list[Import]:
    """All imports of a module, also those made by literal name at run time."""

    def visit(node: ast.AST, inside_function: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, inside_function)
        elif isinstance(node, ast.ImportFrom):
            base = absolute_base(node, module, is_package)
            for alias in node.names:
                yield Import(f"{base}.{alias.name}", node.lineno, inside_function)
        elif isinstance(node, ast.Call) and called_name(node) in ("import_module", "__import__"):
            name = node.args[0] if node.args else None
            if isinstance(name, ast.Constant) and isinstance(name.value, str):
                package = module if is_package else module.rpartition(".")[0]
                dots = len(name.value) - len(name.value.lstrip("."))
                parts = package.split(".")
                above = [*parts[: len(parts) - (dots - 1)]] if dots else []
                yield Import(".".join([*above, name.value.lstrip(".")]), node.lineno, inside_function)
        deeper = inside_function or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, deeper)

    return list(visit(tree, inside_function=False))


def called_name(call: ast.Call) -> str:
    """The last part of what is called: ``load`` of ``torch.load(...)``."""
    function = call.func
    if isinstance(function, ast.Attribute):
        return function.attr
    return function.id if isinstance(function, ast.Name) else ""


def rule_for(part: str) -> tuple[str, Rule] | None:
    """The rule with the longest name that holds for ``part`` (a module's name relative to ``rtdmd``)."""
    if not part:
        return "", RULES[""]
    names = [name for name in RULES if name and within(part, name)]
    return (max(names, key=len), RULES[max(names, key=len)]) if names else None


def import_faults(source: str, module: str, is_package: bool = False) -> list[str]:
    """What ``module`` imports against the rules, one sentence each."""
    part = module.removeprefix(PACKAGE).removeprefix(".")
    found = rule_for(part)
    if found is None:
        return [f"{module}: no rule says what it may import; add one to RULES"]
    own_name, rule = found
    own = own_name.split(".")[0]
    faults = []
    for item in imports_of(ast.parse(source), module, is_package):
        where = f"{module}:{item.line}: imports {item.target}"
        top = item.target.split(".")[0]
        owner = OWNERS.get(top)
        if owner is not None and not within(part, owner):
            faults.append(f"{where}, but only {PACKAGE}.{owner} imports {top}")
        if top != PACKAGE:
            known = rule.outside is None or top in rule.outside or top in sys.stdlib_module_names
            if not known:
                faults.append(f"{where}, but may import only {rule.outside} and the standard library")
            continue
        target = item.target.removeprefix(PACKAGE).removeprefix(".")
        if target == "__version__" or (own and within(target, own) and own_name == own):
            continue
        if any(within(target, allowed) for allowed in rule.may_import):
            continue
        if any(within(target, allowed) for allowed in rule.only_inside_functions):
            if not item.inside_function:
                faults.append(f"{where} at the top; allowed only inside a function")
            continue
        faults.append(f"{where}, which {PACKAGE}.{own_name} may not know")
    return faults


def practice_faults(source: str, module: str) -> list[str]:
    """Uses of what is forbidden everywhere, one sentence each."""
    faults = []

    def check_setting(name: str | None, value: ast.expr, line: int) -> None:
        if name in FORBIDDEN_SETTINGS and isinstance(value, ast.Constant):
            forbidden, reason = FORBIDDEN_SETTINGS[name]
            if value.value is forbidden:
                faults.append(f"{module}:{line}: {name}={forbidden}: {reason}")

    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            for keyword in node.keywords:
                check_setting(keyword.arg, keyword.value, node.lineno)
        elif isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                if isinstance(key, ast.Constant):
                    check_setting(key.value if isinstance(key.value, str) else None, value, node.lineno)
        elif isinstance(node, ast.Attribute | ast.Name):
            name = node.attr if isinstance(node, ast.Attribute) else node.id
            if name in FORBIDDEN_NAMES:
                faults.append(f"{module}:{node.lineno}: {name}: {FORBIDDEN_NAMES[name]}")
    for item in imports_of(tree, module):
        top, last = item.target.split(".")[0], item.target.split(".")[-1]
        if top in FORBIDDEN_MODULES:
            faults.append(f"{module}:{item.line}: imports {top}: loading runs code from the file")
        if last in FORBIDDEN_NAMES:
            faults.append(f"{module}:{item.line}: {last}: {FORBIDDEN_NAMES[last]}")
    return faults


def modules_imported_with(
    start: str, sources: Mapping[str, ast.Module], packages: set[str]
) -> dict[str, str]:
    """Every name that importing ``start`` imports, directly or not, with the module that asked for it.

    ``sources`` holds our modules. A module's parent packages are imported with it.
    """
    asked_by: dict[str, str] = {start: "the command line"}
    queue = [start]
    while queue:
        module = queue.pop()
        targets = [module.rpartition(".")[0]]
        targets += [
            item.target
            for item in imports_of(sources[module], module, module in packages)
            if not item.inside_function
        ]
        for target in targets:
            # `from a.b import c` names the module a.b.c or a name in the module a.b.
            name = target if target in sources else target.rpartition(".")[0]
            name = name if name in sources else target
            if name and name not in asked_by:
                asked_by[name] = module
                if name in sources:
                    queue.append(name)
    return asked_by


def our_modules() -> dict[str, Path]:
    """Dotted name and file of every module of the package."""
    modules = {}
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return modules


MODULES = our_modules()


@cache
def syntax_trees() -> dict[str, ast.Module]:
    """Every module of the package, parsed."""
    return {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}


@pytest.mark.parametrize("module", MODULES)
def test_imports_follow_the_rules(module: str) -> None:
    path = MODULES[module]
    faults = import_faults(path.read_text(encoding="utf-8"), module, path.name == "__init__.py")
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("path", [*MODULES.values(), ROOT / "train_ds.py"], ids=lambda path: path.stem)
def test_nothing_forbidden_is_used(path: Path) -> None:
    faults = practice_faults(path.read_text(encoding="utf-8"), str(path.relative_to(ROOT)))
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize(
    "module",
    [name for name in MODULES if not any(within(name, f"{PACKAGE}.{part}") for part in WITH_DEEPSPEED)],
)
def test_imports_without_deepspeed(module: str) -> None:
    packages = {name for name, path in MODULES.items() if path.name == "__init__.py"}
    asked_by = modules_imported_with(module, syntax_trees(), packages)
    chains = [f"{by} imports {name}" for name, by in asked_by.items() if within(name, "deepspeed")]
    assert not chains, "\n".join(chains)


def test_every_folder_of_the_package_is_a_package() -> None:
    """A folder without ``__init__.py`` would be left out of a wheel."""
    folders = {path.parent for path in (ROOT / PACKAGE).rglob("*.py")}
    missing = [str(folder.relative_to(ROOT)) for folder in folders if not (folder / "__init__.py").exists()]
    assert not missing


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("flow", "import numpy"),
        ("flow", "from rtdmd.schedules import sd3_sigmas"),
        ("flow", "from . import errors"),
        ("objectives.policy", "from ..flow import add_noise"),
        ("objectives.policy", "from rtdmd import errors"),
        ("errors", "import rtdmd.flow"),
        ("randomness", "def f():\n    from rtdmd.recipe.schema import Recipe"),
        ("recipe.schema", "import torch"),
        ("recipe.schema", "from rtdmd.recipe.loading import load_recipe"),
        ("recipe.checks", "from rtdmd.models import get_family"),
        ("recipe.checks", "def f():\n    from rtdmd.stages import rtdmd"),
        ("models.flux2", "from rtdmd.rewards.protocol import Reward"),
        ("models.flux2", "def f():\n    from ..distributed import gather"),
        ("models.flux2", "import importlib\nimportlib.import_module('rtdmd.stages.rtdmd')"),
        ("models.flux2", "from importlib import import_module\nimport_module('..training', 'rtdmd.models')"),
        ("models.flux2", "from rtdmd.recipe import load_recipe"),
        ("rewards.clip", "if TYPE_CHECKING:\n    from rtdmd.models.protocol import ModelFamily"),
        ("prompts", "from rtdmd import rewards"),
        ("prompts", "import rtdmd"),
        ("distributed.engine", "from rtdmd.models.lora import Adapter"),
        ("stages.rtdmd", "import deepspeed"),
        ("stages.rtdmd", "def f():\n    from deepspeed.zero import Init"),
        ("stages.rtdmd", "from rtdmd.training.ema import Ema"),
        ("stages.rtdmd", "from rtdmd import cli"),
        ("rollout", "from rtdmd.models.flux2 import Flux2"),
        ("rollout", "from rtdmd.randomness import draw"),
        ("training.loop", "__import__('deepspeed')"),
        ("training.loop", "from rtdmd.cli import main"),
        ("sample", "from rtdmd.distributed import start"),
        ("cli", "from rtdmd.training.loop import run"),
        ("doctor", "class A:\n    async def f(self):\n        import deepspeed"),
        ("newcomer", "import torch"),
    ],
)
def test_checker_finds_a_forbidden_import(module: str, source: str) -> None:
    assert len(import_faults(source, f"{PACKAGE}.{module}")) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("flow", "from __future__ import annotations\nimport math\nimport torch.nn.functional as F"),
        ("objectives.policy", "from rtdmd.objectives.reduction import weighted_mean"),
        ("objectives.policy", "from .reduction import weighted_mean"),
        ("recipe.checks", "from . import schema\nfrom rtdmd.schedules import sd3_sigmas"),
        ("recipe.checks", "def f():\n    from rtdmd.models import get_family"),
        ("models.flux2", "from rtdmd.recipe.schema import Recipe\nfrom diffusers import DiffusionPipeline"),
        ("rollout", "from rtdmd.models import protocol\nfrom rtdmd.models.guidance import guide"),
        ("distributed.engine", "import deepspeed\nfrom deepspeed.zero import Init"),
        ("stages.rtdmd", "from rtdmd import rollout\nfrom ..distributed.engine import Engine"),
        ("cli", "from rtdmd import __version__\ndef f():\n    from rtdmd.training.loop import run"),
    ],
)
def test_checker_accepts_an_allowed_import(module: str, source: str) -> None:
    assert import_faults(source, f"{PACKAGE}.{module}") == []


def test_relative_imports_of_a_package_start_at_itself() -> None:
    source = "from .policy import policy_loss\nfrom . import reduction"
    assert import_faults(source, f"{PACKAGE}.objectives", is_package=True) == []
    assert len(import_faults("from ..errors import UserError", f"{PACKAGE}.objectives", is_package=True)) == 1


@pytest.mark.parametrize(
    "source",
    [
        "torch.load(path, weights_only=False)",
        "options = {'weights_only': False}",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "subprocess.run(command, shell=True)",
        "x = torch.nan_to_num(x)",
        "x.nan_to_num_(0)",
        "from torch import nan_to_num as clean",
        "checkpoint(f, x, use_reentrant=True)",
        "model.gradient_checkpointing_enable({'use_reentrant': True})",
        "import pickle",
        "def f():\n    from pickle import load",
    ],
)
def test_checker_finds_a_forbidden_practice(source: str) -> None:
    assert len(practice_faults(source, "example")) == 1


def test_checker_accepts_the_safe_settings() -> None:
    source = "torch.load(path, weights_only=True)\ncheckpoint(f, x, use_reentrant=False)\nrun(c, shell=False)"
    assert practice_faults(source, "example") == []


def test_checker_follows_imports_through_parent_packages() -> None:
    """Importing a.b runs a/__init__.py, which may import what a.b itself does not."""
    sources = {
        "a": ast.parse("from .c import x"),
        "a.b": ast.parse("def f():\n    import late"),
        "a.c": ast.parse("import deepspeed"),
    }
    asked_by = modules_imported_with("a.b", sources, packages={"a"})
    assert asked_by["deepspeed"] == "a.c"
    assert "late" not in asked_by
