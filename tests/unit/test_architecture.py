"""Which folder may import which, and which libraries it may know: held over the source itself."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import remote_vae
from remote_vae import AsyncRemoteVAE, RemoteVAE, remote_decode, remote_encode

ROOT = Path(__file__).parents[2]
SOURCES = (ROOT / "client", ROOT / "deployments")

# A folder imports of ours what stands in its row, and itself; a module beside the folders is a row of its own.
MAY_IMPORT = {
    "remote_vae.errors": "",
    "remote_vae.protocol": "errors",
    "remote_vae.ray_internals": "",
    "remote_vae.transports": "errors protocol ray_internals",
    "remote_vae.calls": "errors protocol transports",
    "remote_vae.autoencoder": "errors protocol",
    "remote_vae.client": "errors protocol transports calls autoencoder",
    "remote_vae.async_client": "errors protocol transports calls client",
    "remote_vae": "errors calls client async_client",
    "remote_vae.cli": "errors protocol transports calls client .",
    "remote_vae_serve": "",
    "remote_vae_serve.allowed_origins": "",
    "remote_vae_serve.config": "allowed_origins",
    "remote_vae_serve.admission": "",
    "remote_vae_serve.scaling": "",
    "remote_vae_serve.model_paths": "",
    "remote_vae_serve.published_paths": "",
    "remote_vae_serve.families": "",
    "remote_vae_serve.processing": "families",
    "remote_vae_serve.codecs": "families processing",
    "remote_vae_serve.engine": "config families processing codecs",
    "remote_vae_serve.http": "",
    "remote_vae_serve.middleware": "config http published_paths allowed_origins",
    "remote_vae_serve.haproxy": "middleware allowed_origins",
    "remote_vae_serve.proxy": "middleware published_paths",
    "remote_vae_serve.launcher": "haproxy ingress proxy middleware model_paths",
    "remote_vae_serve.replica": "admission config families processing codecs engine http proxy scaling",
    "remote_vae_serve.ingress": "admission config http proxy scaling published_paths",
    "remote_vae_serve.serve_config": "config http ingress model_paths",
    "remote_vae_serve.app": "config engine ingress replica",
    "remote_vae_serve.cli": "config engine families haproxy http ingress launcher middleware model_paths proxy serve_config",
}  # fmt: skip
OF_THE_CLIENT = {"remote_vae.errors", "remote_vae.protocol", "remote_vae.ray_internals"}
"""What every folder of the server may import; who calls through Ray handles also the transports."""
MAY_KNOW = {
    "ray": {
        "remote_vae.ray_internals", "remote_vae.transports", "remote_vae_serve.app", "remote_vae_serve.cli",
        "remote_vae_serve.ingress", "remote_vae_serve.replica", "remote_vae_serve.scaling", "remote_vae_serve.serve_config",
        "remote_vae_serve.launcher",
    },
    "torch": {
        "remote_vae.autoencoder", "remote_vae_serve.families", "remote_vae_serve.processing", "remote_vae_serve.codecs",
        "remote_vae_serve.engine", "remote_vae_serve.replica",
    },
    "diffusers": {"remote_vae.autoencoder", "remote_vae_serve.engine"},
    "starlette": {
        "remote_vae_serve.http", "remote_vae_serve.middleware", "remote_vae_serve.proxy", "remote_vae_serve.ingress",
        "remote_vae_serve.replica",
    },
    "requests": {"remote_vae.transports"},
}  # fmt: skip


def modules() -> dict[str, Path]:
    """Every module of ours, by its dotted name; a package is its `__init__`."""
    found = {}
    for source in SOURCES:
        for path in source.rglob("*.py"):
            parts = path.relative_to(source).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()
ROOMS = sorted(MAY_IMPORT, key=len, reverse=True)


def room_of(module: str) -> str:
    """The row of MAY_IMPORT that a module belongs to."""
    return next((room for room in ROOMS if module == room or (module.startswith(f"{room}.") and "." in room)), module)


def imports(path: Path, lazy: bool = True) -> Iterator[str]:
    """The modules a file imports, as dotted names; `lazy=False` leaves out those in functions."""
    pending: list[ast.AST] = [ast.parse(path.read_text())]
    while pending:
        node = pending.pop()
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) and not lazy:
                continue
            if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
                continue
            pending.append(child)
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in MODULES else str(node.module)


def ours(name: str) -> set[str]:
    """What a module imports of ours."""
    return {imported for imported in imports(MODULES[name]) if imported in MODULES and imported != name}


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_a_folder_imports_only_what_its_row_names(room: str) -> None:
    package = room.split(".", maxsplit=1)[0]
    allowed = {room, *(f"{package}.{name}".removesuffix("..") for name in MAY_IMPORT[room].split())}
    if package == "remote_vae_serve":
        allowed |= OF_THE_CLIENT | ({"remote_vae.transports"} if room in MAY_KNOW["ray"] else set())
    members = [name for name in MODULES if room_of(name) == room]
    wrong = {(name, there) for name in members for there in ours(name) if room_of(there) not in allowed}
    assert not wrong


def test_every_module_is_in_a_row_and_every_row_has_a_module() -> None:
    lost = {name for name in MODULES if room_of(name) not in MAY_IMPORT}
    assert not lost, "a new folder gets a row in MAY_IMPORT"
    empty = set(MAY_IMPORT) - {room_of(name) for name in MODULES}
    assert not empty


def test_no_modules_import_each_other_in_a_circle() -> None:
    TopologicalSorter({name: ours(name) for name in MODULES}).prepare()  # raises CycleError, which names them


@pytest.mark.parametrize("library", MAY_KNOW)
def test_each_library_is_known_to_few_folders(library: str) -> None:
    lazy = library not in ("torch", "diffusers")  # these cost seconds: what counts is when they are imported
    knows = {name for name in MODULES if library in {i.split(".")[0] for i in imports(MODULES[name], lazy)}}
    assert {room_of(name) for name in knows} <= MAY_KNOW[library]


def test_what_serve_imports_to_place_a_replica_takes_no_torch_with_it() -> None:
    """`app`, `ingress`, `http` and the replica's own module are imported where nobody decodes: seconds each time."""
    seen: set[str] = set()
    pending = ["remote_vae_serve.app", "remote_vae_serve.scaling", "remote_vae_serve.proxy"]
    while pending:
        name = pending.pop()
        if name not in seen:
            seen.add(name)
            pending += [there for there in imports(MODULES[name], lazy=False) if there in MODULES]
    slow = {
        name for name in seen if {"torch", "diffusers"} & {i.split(".")[0] for i in imports(MODULES[name], lazy=False)}
    }
    assert not slow


def test_the_light_client_imports_no_ray_and_no_torch_until_it_is_asked_for_them() -> None:
    for name in (
        name for name in MODULES if name.startswith("remote_vae.") and room_of(name) != "remote_vae.autoencoder"
    ):
        eager = set(imports(MODULES[name], lazy=False))
        assert not {"ray", "torch", "diffusers"} & {i.split(".")[0] for i in eager}, name
        assert "remote_vae.autoencoder" not in eager, name


def test_no_file_is_longer_than_a_reader_can_hold() -> None:
    longest = {path: len(path.read_text().splitlines()) for path in MODULES.values()}
    assert {path.name: lines for path, lines in longest.items() if lines > 350} == {}
    tests = {path: len(path.read_text().splitlines()) for path in (ROOT / "tests").rglob("*.py")}
    assert {path.name: lines for path, lines in tests.items() if lines > 400} == {}


def test_no_room_is_a_lumber_room() -> None:
    words = {word for name in MODULES for word in name.split(".")}
    assert not {"utils", "constants", "types", "helpers", "common", "misc"} & words


def test_the_paths_that_users_files_hold_are_where_they_were() -> None:
    code = """
from remote_vae_serve.app import ingress, vae
from remote_vae_serve.config import IngressConfig, VAEConfig
from remote_vae_serve.proxy import middlewares
from remote_vae_serve.scaling import YieldWhenIdle
from remote_vae import errors, remote_decode
from remote_vae.errors import RemoteVAEError
"""
    assert subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True).stderr == ""


def test_the_names_of_the_package_are_these() -> None:
    assert remote_vae.__all__ == [
        "AsyncRemoteVAE", "RemoteVAE", "RemoteVAEError", "Waiting", "errors", "list_models", "open_result", "remote_decode",
        "remote_encode",
    ]  # fmt: skip
    assert all(hasattr(remote_vae, name) for name in remote_vae.__all__)


def test_all_three_ways_to_decode_and_to_encode_take_the_same_arguments() -> None:
    def parameters(function: object, *besides: str) -> list[inspect.Parameter]:
        return [p for name, p in inspect.signature(function).parameters.items() if name not in besides]  # type: ignore[arg-type]

    of_the_client = [name for name in inspect.signature(RemoteVAE.__init__).parameters if name != "workers"]
    blocking = parameters(RemoteVAE.decode, "self")
    assert parameters(AsyncRemoteVAE.decode, "self") == blocking
    assert parameters(remote_decode, *of_the_client) == blocking
    blocking = parameters(RemoteVAE.encode, "self")
    assert parameters(AsyncRemoteVAE.encode, "self") == blocking
    assert parameters(remote_encode, *of_the_client) == blocking
    assert parameters(RemoteVAE.__init__) == parameters(AsyncRemoteVAE.__init__)
    assert [one.name for one in parameters(remote_decode) if one.name in of_the_client] == of_the_client[1:]


NOT_INSTALLED = """
import sys
from importlib.machinery import PathFinder

class WithoutServer(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        missing = name.split(".")[0] in {"ray", "torch", "diffusers", "starlette", "pydantic", "transformers"}
        return None if missing else super().find_spec(name, path, target)

sys.meta_path = [WithoutServer if finder is PathFinder else finder for finder in sys.meta_path]
"""


def run_without_the_server(code: str) -> subprocess.CompletedProcess[str]:
    """Python as it is where `pip install remote-vae` alone was run."""
    command = [sys.executable, "-W", "error", "-c", NOT_INSTALLED + code]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_the_light_client_needs_nothing_of_the_server() -> None:
    run = run_without_the_server("""
import numpy, remote_vae
from remote_vae.calls.decode_call import DecodeCall
from remote_vae.protocol.result import Result
DecodeCall(numpy.zeros((1, 4, 2, 2), "f2")).requests()[0].to_http()
answer = Result.from_http({"content-type": "tensor/binary", "shape": "[2]", "dtype": "bfloat16"}, bytes(4))
print(DecodeCall(numpy.zeros((1, 4, 2, 2), "f2"), output_type="pt").answer([answer]).dtype)
try:
    remote_vae.RemoteVAE(object())
except remote_vae.errors.BadRequest as error:
    print(error.parameter)
""")
    assert (run.stdout.split(), run.stderr) == (["float32", "endpoint"], "")


def test_the_server_without_its_libraries_says_what_to_install() -> None:
    run = run_without_the_server("import remote_vae_serve")
    assert run.returncode == 1
    assert run.stderr.splitlines()[-1].startswith("ImportError: remote_vae_serve needs ray, torch, diffusers")
    assert "pip install 'remote-vae[serve]'" in run.stderr
