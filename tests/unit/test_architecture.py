"""Who may import whom, held over the source itself; and what the light client comes without."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import remote_vae
from remote_vae import AsyncRemoteVAE, RemoteVAE, remote_decode, remote_encode

ROOT = Path(__file__).parents[2]


def modules_of(package: Path) -> dict[str, Path]:
    """Files by the last part of their module's name; a package inside is its `__init__`."""
    files = {path.stem if path.stem != "__init__" else path.parent.name: path for path in package.rglob("*.py")}
    files["__init__"] = files.pop(package.name)
    return files


CLIENT = modules_of(ROOT / "client" / "remote_vae")
SERVER = modules_of(ROOT / "deployments" / "remote_vae_serve")

# An import goes down only. A new module of the client gets a floor of its own here.
FLOORS = {
    "errors": 0, "tensors": 1, "parameters": 1, "reasons": 1, "messages": 2, "patience": 2, "hints": 3, "wire": 3,
    "decoding": 4, "encoding": 4, "protocol": 5, "calls": 6, "transports": 6, "encode_calls": 7, "handles": 7, "local": 7,
    "autoencoder": 7, "asking": 7, "endpoints": 8, "client": 9, "async_client": 10, "__init__": 11,
    "tensor_files": 12, "files": 13, "benchmark": 13, "outputs": 14, "runs": 14, "options": 14, "commands": 15, "cli": 16,
}  # fmt: skip
KNOWS_RAY = {"app", "ingress", "catalogue", "replica", "scaling", "serve_config", "cli"}
KNOWS_TORCH = {
    "engine",
    "eager",
    "budget",
    "finite",
    "forecast",
    "out_of_memory",
    "shelf",
    "work",
    "families",
    "model_config",
    "autoencoders",
    "image_autoencoders",
    "video_autoencoders",
    "model_numbers",
    "conventions",
    "checks",
    "decoders",
    "layouts",
    "pixel_ranges",
    "pipeline",
    "codecs",
    "device",
    "pictures",
    "transfer",
    "video",
    "fake",
    "fast",
}
KNOWS_DIFFUSERS = {"eager", "model_config", "fast"}


def imports(path: Path, lazy: bool = True) -> Iterator[str]:
    """The modules a file imports, as dotted names down to the module; `lazy=False` leaves out those in functions."""
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
            ours = node.module in ("remote_vae", "remote_vae.cli", "remote_vae_serve")
            yield from (f"{node.module}.{alias.name}" for alias in node.names) if ours else [str(node.module)]


def importers(files: dict[str, Path], package: str, lazy: bool = True) -> set[str]:
    return {name for name, path in files.items() if package in {i.split(".")[0] for i in imports(path, lazy)}}


def test_the_client_never_imports_the_server() -> None:
    assert not importers(CLIENT, "remote_vae_serve")


@pytest.mark.parametrize("name", CLIENT)
def test_the_floors_of_the_client_are_one_way(name: str) -> None:
    ours = {i.split(".")[-1] for i in imports(CLIENT[name]) if i.startswith("remote_vae.")}
    below = {module for module, floor in FLOORS.items() if floor < FLOORS[name]}
    assert ours <= below


@pytest.mark.parametrize("name", SERVER)
def test_the_server_takes_of_the_client_the_protocol_alone(name: str) -> None:
    ours = {i.split(".")[1] for i in imports(SERVER[name]) if i.startswith("remote_vae.")}
    requests = {"protocol", "messages", "parameters", "hints", "decoding", "encoding"}
    of_the_protocol = requests | {"wire", "tensors", "errors"}
    assert ours <= of_the_protocol | ({"handles", "patience"} if name in KNOWS_RAY else set())


def test_each_library_is_known_to_few() -> None:
    assert importers(CLIENT, "ray") <= {"handles"}
    assert not importers(CLIENT, "ray", lazy=False)
    assert importers(CLIENT, "torch", lazy=False) <= {"autoencoder"}  # which is imported by who asks for it
    assert importers(CLIENT, "diffusers", lazy=False) <= {"autoencoder"}
    assert not {name for name in CLIENT if "remote_vae.autoencoder" in set(imports(CLIENT[name], lazy=False))}
    assert importers(SERVER, "ray") <= KNOWS_RAY
    assert importers(SERVER, "torch", lazy=False) <= KNOWS_TORCH
    assert importers(SERVER, "diffusers") <= KNOWS_DIFFUSERS


def test_what_only_one_room_knows_is_not_found_in_another() -> None:
    assert not {"ray", "torch"} & {i.split(".")[0] for i in imports(SERVER["http"])}
    for name in ("app", "ingress", "http", "replica", "catalogue", "config"):
        modules = {i.split(".")[1] for i in imports(SERVER[name], lazy=False) if i.startswith("remote_vae_serve.")}
        assert not modules & (KNOWS_TORCH | KNOWS_DIFFUSERS), name


def test_no_room_is_a_lumber_room() -> None:
    assert not {"utils", "constants", "types", "helpers", "common", "misc"} & (set(CLIENT) | set(SERVER))


def test_the_names_of_the_package_are_these() -> None:
    assert remote_vae.__all__ == [
        "AsyncRemoteVAE", "RemoteVAE", "RemoteVAEError", "errors", "list_models", "open_result", "remote_decode",
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
from remote_vae.protocol.wire import Result
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
