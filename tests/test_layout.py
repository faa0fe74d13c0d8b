"""The shape of the house: imports point one way, every folder is in the wheel, every test file has a subject."""

import ast
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = {
    "mtp_mlx": ROOT / "mtp_mlx",
    "mtp_mlx.models": ROOT / "models",
    "mtp_mlx.cli": ROOT / "cli",
    "mtp_mlx.server": ROOT / "mtp_mlx" / "server",
}

# What each module of ours may import of ours. One direction: nothing below imports anything above.
ALLOWED = {
    "mtp_mlx.errors": set(),
    "mtp_mlx.programs": set(),
    "mtp_mlx.agreement": {"errors"},
    "mtp_mlx.types": {"agreement", "programs"},
    "mtp_mlx.cache": {"types"},
    "mtp_mlx.memory": {"cache"},
    "mtp_mlx.admission": {"", "errors", "memory", "types"},
    "mtp_mlx.ngram": {"cache", "types"},
    "mtp_mlx.draft_model": {"cache", "types"},
    "mtp_mlx.copying": set(),
    "mtp_mlx.models.base": set(),
    "mtp_mlx.models.parts": set(),
    "mtp_mlx.models.gemma4": {"cache", "memory", "types", "models"},
    "mtp_mlx.models.gemma4_assistant": {"cache", "memory", "types", "models.base", "models.gemma4"},
    "mtp_mlx.models.qwen3_5": {"cache", "memory", "types", "models"},
    "mtp_mlx.models.qwen3_5_mtp": {"cache", "memory", "types", "models", "models.qwen3_5"},
    "mtp_mlx.sampling": {"errors"},
    "mtp_mlx.penalties": {"errors"},
    "mtp_mlx.accept": {"sampling", "types"},
    "mtp_mlx.choosing": {"accept", "agreement", "penalties", "sampling", "types"},
    "mtp_mlx.steps": {"cache", "choosing", "types"},
    "mtp_mlx.chances": set(),
    "mtp_mlx.costs": set(),
    "mtp_mlx.depth": {"chances", "costs", "errors"},
    "mtp_mlx.clock": set(),
    "mtp_mlx.batch": {"", "cache", "choosing", "clock", "programs", "types"},
    "mtp_mlx.sequence": {"batch", "cache", "choosing", "errors", "types"},
    "mtp_mlx.rounds": {"batch", "cache", "copying", "depth", "sequence"},
    "mtp_mlx.snapshots": {"sequence", "cache", "choosing", "types"},
    "mtp_mlx.trie": set(),
    "mtp_mlx.sealing": {"checkpoint", "errors"},
    "mtp_mlx.manifest": {"sealing"},
    "mtp_mlx.store": {"manifest", "sealing", "snapshots", "trie"},
    "mtp_mlx.prefixes": {"sequence", "", "admission", "memory", "choosing", "snapshots", "store", "trie", "types"},
    "mtp_mlx.stats": {
        "batch",
        "depth",
    },
    "mtp_mlx.options": {"choosing", "grammar", "penalties", "sampling"},
    "mtp_mlx.stock": {"cache", "errors", "types"},
    "mtp_mlx.model": {"", "errors", "types"},
    "mtp_mlx.attach": {"checkpoint", "drafter_bits", "errors", "hub", "loading", "model", "types"},
    "mtp_mlx.mlx_lm": {
        "attach",
        "batches",
        "drafter_bits",
        "errors",
        "generate",
        "generation",
        "hub",
        "loading",
        "model",
        "sampling",
    },
    "mtp_mlx.prompt_cache": {
        "sequence",
        "stock",
        "admission",
        "cache",
        "choosing",
        "draft_model",
        "errors",
        "snapshots",
        "types",
    },
    "mtp_mlx.generate": {
        "cache",
        "choosing",
        "draft_model",
        "errors",
        "generation",
        "model",
        "options",
        "penalties",
        "prompt_cache",
        "sampling",
        "types",
    },
    "mtp_mlx.generation": {
        "sequence",
        "batch",
        "admission",
        "choosing",
        "copying",
        "depth",
        "errors",
        "ngram",
        "options",
        "penalties",
        "prefixes",
        "programs",
        "prompts",
        "prompt_cache",
        "rounds",
        "sampling",
        "stats",
        "types",
    },
    "mtp_mlx.stops": set(),
    "mtp_mlx.together": {"sequence", "batch", "", "depth", "errors", "generation", "rounds", "types"},
    "mtp_mlx.batches": {
        "model",
        "prompt_cache",
        "errors",
        "generation",
        "ngram",
        "options",
        "penalties",
        "prefixes",
        "sampling",
        "stats",
        "together",
        "types",
    },
    "mtp_mlx.engine": {"depth", "together", "errors", "generation", "options", "prefixes", "stats", "stops", "types"},
    "mtp_mlx.bench": {
        "sequence",
        "cache",
        "choosing",
        "conversation",
        "errors",
        "generate",
        "generation",
        "ngram",
        "options",
        "programs",
        "sampling",
        "stats",
        "types",
    },
    "mtp_mlx.verify": {
        "accept",
        "cache",
        "choosing",
        "errors",
        "generate",
        "ngram",
        "options",
        "sampling",
        "stats",
        "types",
    },
    "mtp_mlx.checkpoint": {"errors"},
    "mtp_mlx.hub": {"checkpoint", "errors"},
    "mtp_mlx.pairs": {"checkpoint", "errors", "hub", "models.base"},
    "mtp_mlx.adapters": {"checkpoint", "errors", "models.base"},
    "mtp_mlx.drafter_bits": {"", "cache", "errors", "memory", "quantise"},
    "mtp_mlx.sharding": {"checkpoint", "errors", "models.parts"},
    "mtp_mlx.loading": {
        "",
        "adapters",
        "agreement",
        "checkpoint",
        "draft_model",
        "drafter_bits",
        "errors",
        "hub",
        "memory",
        "model",
        "models",
        "ngram",
        "pairs",
        "sharding",
        "types",
    },
    "mtp_mlx.inventory": {"checkpoint", "errors", "hub", "loading", "pairs"},
    "mtp_mlx.quantise": {"errors"},
    "mtp_mlx.extract": {"checkpoint", "errors", "hub", "loading", "quantise"},
    "mtp_mlx.convert": {"checkpoint", "errors", "extract", "hub", "loading", "pairs", "quantise"},
    "mtp_mlx.doctor": {"programs"},
    "mtp_mlx.marks": set(),
    "mtp_mlx.dialects": {"marks"},
    "mtp_mlx.cursor": set(),
    "mtp_mlx.schemas": set(),
    "mtp_mlx.loose_json": {"cursor", "marks", "schemas"},
    "mtp_mlx.tool_calls": {"cursor", "dialects", "loose_json", "marks", "schemas"},
    "mtp_mlx.speech": {"dialects", "marks", "tool_calls"},
    "mtp_mlx.replay": set(),
    "mtp_mlx.infill": {"errors"},
    "mtp_mlx.prompts": {"errors"},
    "mtp_mlx.messages": {"errors"},
    "mtp_mlx.declarations": {"errors"},
    "mtp_mlx.templates": {"declarations", "errors", "messages"},
    "mtp_mlx.conversation": {"dialects", "errors", "marks", "messages", "prompts", "replay", "templates"},
    "mtp_mlx.keywords": {"errors"},
    "mtp_mlx.call_grammar": {"dialects", "errors", "marks", "schemas", "tool_calls"},
    "mtp_mlx.grammar": {"call_grammar", "dialects", "errors", "keywords", "marks", "tool_calls"},
    "mtp_mlx.cli.display": {"generation", "loading", "stats"},
    "mtp_mlx.cli.group": {"errors"},
    "mtp_mlx.sketch": {"checkpoint", "errors", "memory", "models.base"},
    "mtp_mlx.hollow": {"checkpoint", "errors", "hub", "models.base"},
    "mtp_mlx.forecast": {"errors"},
    "mtp_mlx.outline": {
        "",
        "checkpoint",
        "errors",
        "forecast",
        "hollow",
        "hub",
        "loading",
        "memory",
        "pairs",
        "sketch",
    },
    "mtp_mlx.cli.options": {
        "",
        "cli.display",
        "cli.group",
        "drafter_bits",
        "errors",
        "loading",
        "memory",
        "prefixes",
        "store",
    },
    "mtp_mlx.cli.generate": {
        "choosing",
        "cli.display",
        "cli.group",
        "cli.options",
        "conversation",
        "errors",
        "generate",
        "generation",
        "hub",
        "loading",
        "options",
        "penalties",
        "prompts",
        "sampling",
    },
    "mtp_mlx.cli.chat": {
        "cli.display",
        "cli.options",
        "conversation",
        "dialects",
        "engine",
        "errors",
        "hub",
        "loading",
        "options",
        "prefixes",
        "prompts",
        "sampling",
        "speech",
    },
    "mtp_mlx.cli.inspect": {"cli.display", "cli.options", "errors", "forecast", "outline"},
    "mtp_mlx.cli.bench": {"bench", "cli.display", "cli.options", "errors", "hub"},
    "mtp_mlx.cli.verify": {
        "cli.display",
        "cli.options",
        "conversation",
        "errors",
        "generation",
        "hub",
        "loading",
        "sampling",
        "verify",
    },
    "mtp_mlx.cli.pull": {"checkpoint", "cli.display", "errors", "hub", "loading", "pairs"},
    "mtp_mlx.cli.models": {"cli.display", "hub", "inventory", "pairs"},
    "mtp_mlx.cli.extract": {"cli.display", "errors", "extract", "quantise"},
    "mtp_mlx.cli.convert": {"cli.display", "cli.options", "convert", "errors"},
    "mtp_mlx.cli.doctor": {"cli.display", "doctor"},
    "mtp_mlx.server.limits": set(),
    "mtp_mlx.server.refusal": {"errors"},
    "mtp_mlx.server.body": {"server.refusal"},
    "mtp_mlx.server.wire": set(),
    "mtp_mlx.server.guard": {"server.body", "server.limits", "server.refusal"},
    "mtp_mlx.server.service": {
        "conversation",
        "dialects",
        "engine",
        "errors",
        "grammar",
        "infill",
        "loading",
        "server.refusal",
    },
    "mtp_mlx.server.asking": {
        "conversation",
        "engine",
        "grammar",
        "marks",
        "options",
        "penalties",
        "prompts",
        "sampling",
        "server.limits",
        "server.refusal",
        "server.service",
        "server.wire",
        "tool_calls",
    },
    "mtp_mlx.server.reply": {"dialects", "engine", "generation", "server.asking", "speech", "stats"},
    "mtp_mlx.server.figures": {"server.asking", "server.reply", "stats"},
    "mtp_mlx.server.spelling": set(),
    "mtp_mlx.server.shape": {"engine", "server.asking", "server.figures", "server.reply", "server.wire"},
    "mtp_mlx.server.chat": {
        "engine",
        "server.figures",
        "server.reply",
        "server.shape",
        "server.spelling",
        "server.wire",
        "speech",
    },
    "mtp_mlx.server.completions": {
        "engine",
        "server.asking",
        "server.figures",
        "server.reply",
        "server.shape",
        "server.spelling",
        "server.wire",
    },
    "mtp_mlx.server.infills": {"server.asking", "server.figures", "server.reply", "server.shape"},
    "mtp_mlx.server.source": {"engine", "errors", "server.refusal"},
    "mtp_mlx.server.metrics": {"engine", "server.reply"},
    "mtp_mlx.server.ledger": {"server.metrics", "server.reply"},
    "mtp_mlx.server.answer": {
        "errors",
        "server.asking",
        "server.ledger",
        "server.limits",
        "server.refusal",
        "server.reply",
        "server.service",
        "server.shape",
        "server.source",
    },
    "mtp_mlx.server.writing": {
        "server.answer",
        "server.asking",
        "server.chat",
        "server.completions",
        "server.infills",
        "server.limits",
        "server.refusal",
        "server.reply",
        "server.service",
        "server.shape",
        "server.spelling",
        "server.wire",
    },
    "mtp_mlx.server.telling": {
        "generation",
        "prompts",
        "server.asking",
        "server.metrics",
        "server.refusal",
        "server.service",
        "server.spelling",
        "server.wire",
    },
    "mtp_mlx.server.app": {
        "errors",
        "server.answer",
        "server.asking",
        "server.guard",
        "server.ledger",
        "server.limits",
        "server.metrics",
        "server.refusal",
        "server.service",
        "server.telling",
        "server.writing",
    },
    "mtp_mlx.server.run": {"engine", "errors", "server.limits", "server.refusal"},
    "mtp_mlx.cli.serve": {"cli.options", "cli.serving", "engine", "hub", "server.service"},
    "mtp_mlx.cli.serving": {
        "cli.display",
        "cli.options",
        "engine",
        "errors",
        "loading",
        "sampling",
        "server.app",
        "server.guard",
        "server.limits",
        "server.run",
        "server.service",
    },
    "mtp_mlx.cli.main": {"cli", "errors"},
    "mtp_mlx": {
        "attach",
        "batches",
        "choosing",
        "errors",
        "generate",
        "generation",
        "loading",
        "model",
        "penalties",
        "sampling",
        "stats",
        "types",
    },
    "mtp_mlx.models": set(),
    "mtp_mlx.cli": set(),
    "mtp_mlx.server": set(),
}


def _modules() -> dict[str, Path]:
    return {
        package if path.stem == "__init__" else f"{package}.{path.stem}": path
        for package, folder in FOLDERS.items()
        for path in sorted(folder.glob("*.py"))
    }


def _imports_of_ours(tree: ast.Module) -> set[str]:
    """Modules of ours that are imported when this one is; what is imported for type checkers only is left out."""
    guarded = {
        id(node)
        for guard in tree.body
        if isinstance(guard, ast.If) and ast.unparse(guard.test) == "TYPE_CHECKING"
        for node in ast.walk(guard)
    }
    found = set()
    for node in ast.walk(tree):
        if id(node) in guarded:
            continue
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "mtp_mlx":
            found.add(node.module.removeprefix("mtp_mlx").removeprefix("."))
        elif isinstance(node, ast.Import):
            assert not any(alias.name.split(".")[0] == "mtp_mlx" for alias in node.names), "use from-imports"
    return found


def test_every_module_imports_only_what_lies_below_it() -> None:
    modules = _modules()
    assert modules.keys() == ALLOWED.keys(), "a new module needs a line in ALLOWED and in docs/structure.md"
    for name, path in modules.items():
        surplus = _imports_of_ours(ast.parse(path.read_text())) - ALLOWED[name]
        assert not surplus, f"{name} imports {surplus}"


def test_only_loading_names_architectures() -> None:
    for name, path in _modules().items():
        if name.startswith("mtp_mlx.models") or name == "mtp_mlx.loading":
            continue
        code = ast.unparse(ast.parse(path.read_text()).body[1:] or ast.parse(path.read_text()).body)  # type: ignore[arg-type]
        for family in ("gemma4", "qwen3"):
            assert family not in code.lower(), f"{name} knows an architecture"


def test_every_folder_and_every_data_file_is_in_the_package() -> None:
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert set(setup["packages"]) == set(FOLDERS)
    for package, folder in FOLDERS.items():
        assert (ROOT / setup["package-dir"].get(package, package.replace(".", "/"))).samefile(folder)
        inner = {path.parent.name for path in folder.glob("*/__init__.py") if not path.parent.is_symlink()}
        assert inner == ({"server"} if package == "mtp_mlx" else set()), "a folder that packages must list"
    for name in ("models", "cli"):
        assert (ROOT / "mtp_mlx" / name).is_symlink()
    patterns = setup["package-data"]["mtp_mlx"]
    listed = {path for pattern in patterns for path in (ROOT / "mtp_mlx").glob(pattern) if path.is_file()}
    assert set((ROOT / "mtp_mlx").glob("*.toml")) <= listed
    for demo in ("demo", "demo_qwen"):
        data = {path for path in (ROOT / "mtp_mlx" / demo).rglob("*") if path.is_file()}
        assert data and data <= listed


def test_every_module_is_described() -> None:
    structure = (ROOT / "docs" / "structure.md").read_text()
    for path in _modules().values():
        if path.stem != "__init__":
            assert f"`{path.relative_to(ROOT)}`" in structure, f"docs/structure.md does not mention {path.name}"


@pytest.mark.parametrize("path", sorted(Path(__file__).parent.glob("test_*.py")), ids=lambda path: path.stem)
def test_every_test_file_has_a_subject(path: Path) -> None:
    subject = path.stem.removeprefix("test_")
    known = {name.split(".")[-1] for name in _modules()} | {"layout", "readme", "demo", "wheel", "cli"}
    known |= {"server_page", "server_schema"}
    known |= {name.removeprefix("mtp_mlx.").replace(".", "_") for name in _modules()}
    assert subject in known


def test_no_probing_and_no_environment_variables() -> None:
    for name, path in _modules().items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in {"getattr", "hasattr", "callable"}, f"{name}:{node.lineno}"
            if isinstance(node, ast.Attribute):
                assert node.attr not in {"environ", "getenv"}, f"{name}:{node.lineno}"
