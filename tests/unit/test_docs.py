"""The documents point at what is there: relative links with their headings, paths of this repository, and make's targets."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import requests
import yaml

from limits import WAIT_S
from scripted_server import ScriptedServer

ROOT = Path(__file__).parents[2]
PAGES = (
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md")),
    "cluster/README.md",
    "integrations/comfyui/README.md",
    "deployments/remote_vae_serve/demo/README.md",
)
TREES = ("benchmarks", "client", "cluster", "deployments", "docs", "integrations", "tests", "tools")
ENDS = "md|py|yaml|json|toml|svg|png|txt"


def prose(page: str) -> str:
    """Without what stands between fences."""
    return re.sub(r"^```.*?^```", "", (ROOT / page).read_text(), flags=re.MULTILINE | re.DOTALL)


def links(page: str) -> list[str]:
    return [link for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)) if not re.match(r"[a-z]+:", link)]


def anchors(page: Path) -> set[str]:
    """Of its headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_relative_links_lead_to_files_and_headings_that_exist(page: str) -> None:
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES)
def test_paths_of_this_repository_that_a_page_names_exist(page: str) -> None:
    """From the root, or from the page's own folder; a star stands for any name."""
    named = re.findall(rf"(?<![\w/<.~-])((?:{'|'.join(TREES)})/[\w./*-]*[\w*])", prose(page))
    missing = [path for path in named if not any(any(start.glob(path)) for start in (ROOT, (ROOT / page).parent))]
    assert missing == []


def test_files_named_without_a_folder_exist_somewhere() -> None:
    """In the guide for contributors: `table.py` of a room that the sentence names."""
    files = {path.name for tree in TREES for path in (ROOT / tree).rglob("*")} | {path.name for path in ROOT.iterdir()}
    named = re.findall(rf"`([\w-]+\.(?:{ENDS}))`", prose("CONTRIBUTING.md"))
    assert set(named) <= files


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "docs/models.md"])
def test_make_has_the_targets_that_are_named(page: str) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"(?:^|`)make ([a-z-]+)", (ROOT / page).read_text(), re.MULTILINE)) <= targets


def test_the_rooms_of_the_readme_are_those_of_the_packages() -> None:
    """Every folder of both packages stands in the tree, and nothing else as a folder."""
    readme = (ROOT / "README.md").read_text()
    tree = readme[readme.index("client/remote_vae/  ") : readme.index("integrations/  ")]
    for package in ("client/remote_vae", "deployments/remote_vae_serve"):
        begin = tree.index(f"{package}/")
        until = tree.find("deployments/", begin + 1)
        said = set(re.findall(r"^    ([a-z_]+)/ ", tree[begin : until if until > 0 else None], re.MULTILINE))
        found = {path.name for path in (ROOT / package).iterdir() if path.is_dir() and path.name != "__pycache__"}
        assert said == found


@pytest.mark.parametrize("name", ["system", "one_url"])
def test_the_pictures_are_drawn_for_light_and_dark_by_themselves(name: str) -> None:
    """They stand in pages of both kinds, and fetch nothing."""
    picture = (ROOT / "docs" / f"{name}.svg").read_text()
    assert f"](docs/{name}.svg)" in (ROOT / "README.md").read_text()
    assert "prefers-color-scheme: dark" in picture
    assert re.findall(r"https?://[^\"]*", picture) == ["http://www.w3.org/2000/svg"]


def test_the_addresses_of_others_endpoints_stand_for_the_same_models_wherever_they_are_listed() -> None:
    page = (ROOT / "docs" / "clients.md").read_text()
    table = dict(re.findall(r"^\| `https://(\w+)` \|.*`http://127.0.0.1:8000/([\w#-]+)` \|$", page, re.MULTILINE))
    script = (ROOT / "integrations" / "huggingface_endpoints.sed").read_text()
    (listed,) = [
        block for block in re.findall(r"^```yaml\n(.*?)^```", page, re.MULTILINE | re.DOTALL) if "hosts:" in block
    ]
    hosts = yaml.safe_load(listed)[0]["args"]["hosts"]
    assert len(table) == 7
    assert table == dict(re.findall(r"^s\|https://(\w+)\[.*/([\w#-]+)\|$", script, re.MULTILINE))
    models = {address: model.partition("#")[0] for address, model in table.items()}
    assert models == {host.partition(".")[0]: model for host, model in hosts.items()}


OLDER_CLIENT = """
ADDRESSES = {
    'sd': 'https://q1bj3bpq6kzilnsu.us-east-1.example',
    'video': 'https://o7ywnmrahorts457.us-east-1.example',
}
if kind == "Flux":
    address = "https://whhx50ex1aryqvw6.us-east-1.example/"
elif kind == "video":
    address ="https://o7ywnmrahorts457.us-east-1.example/"  # 'quoted'
"""
"""As SD.Next and the ComfyUI nodes hold them: in either quotes, with and without a slash at the end."""


def test_the_script_of_addresses_changes_what_stands_between_quotes_and_no_more(tmp_path: Path) -> None:
    file = tmp_path / "nodes.py"
    file.write_text(OLDER_CLIENT)
    subprocess.run(["sed", "-i", "-f", str(ROOT / "integrations" / "huggingface_endpoints.sed"), str(file)], check=True)
    assert (
        file.read_text()
        == """
ADDRESSES = {
    'sd': 'http://127.0.0.1:8000/sd-v1',
    'video': 'http://127.0.0.1:8000/hunyuan-video#HunyuanVideo',
}
if kind == "Flux":
    address = "http://127.0.0.1:8000/flux"
elif kind == "video":
    address ="http://127.0.0.1:8000/hunyuan-video#HunyuanVideo"  # 'quoted'
"""
    )


def test_the_word_in_the_address_for_videos_is_never_sent() -> None:
    with ScriptedServer(lambda exchange: exchange.reply(200, {}, b"")) as server:
        requests.post(f"{server.url}#HunyuanVideo", params={"shape": [1, 4]}, timeout=WAIT_S)
    assert server.requests == ["POST /model?shape=1&shape=4"]


@pytest.mark.parametrize("path", ["modules/vae/sd_vae_remote.py", "modules/sd_vae_remote.py"])
def test_both_paths_of_the_file_of_sd_next_have_their_command(path: str) -> None:
    page = (ROOT / "docs" / "clients.md").read_text()
    assert f"`sed -i -f huggingface_endpoints.sed {path}`" in page


def test_the_request_that_is_told_by_name_goes_by_names_that_exist() -> None:
    readme = (ROOT / "README.md").read_text()
    told = readme[readme.index("### One request, by name") : readme.index("### Why so")]
    packages = [ROOT / "client/remote_vae", ROOT / "deployments/remote_vae_serve"]
    modules = re.findall(r"`([a-z_]+/[a-z_]+)`", told)
    assert [name for name in modules if not any((room / f"{name}.py").exists() for room in packages)] == []
    source = "\n".join(path.read_text() for room in packages for path in room.rglob("*.py"))
    names = {part for name in re.findall(r"`([A-Za-z_]+(?:\.[a-z_]+)?)`", told) for part in name.split(".")}
    unknown = {name for name in names if not re.search(rf"\b(?:class|def) {name}\b", source)}
    assert unknown <= {"proxy", "errors", "codecs"}  # modules
