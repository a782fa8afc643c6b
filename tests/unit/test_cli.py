"""The operator's command: what it writes can be read back, and what is wrong is said in a sentence, with the right exit code."""

from __future__ import annotations

import re
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result

from remote_vae_serve.cli import main
from remote_vae_serve.config import VAEConfig
from remote_vae_serve.families import table
from samples import save_tiny_vae

SHIPPED = Path(__file__).parents[2] / "serve_config.yaml"
Config = dict[str, Any]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for variable in ("REMOTE_VAE_TOKENS", "REMOTE_VAE_MAX_BODY_MIB", "REMOTE_VAE_ALLOW_ORIGINS"):
        monkeypatch.delenv(variable, raising=False)
    return tmp_path


def command(*arguments: str, **environment: str) -> Result:
    result = CliRunner().invoke(main, arguments, env=environment)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def model(config: Config, name: str = "sd-v1") -> Config:
    return next(dict(app) for app in config["applications"] if app["name"] == name)


@pytest.mark.parametrize("name", sorted(main.commands))
def test_every_command_has_help_with_an_example(name: str) -> None:
    assert re.search(rf"Example: .*remote-vae-serve {name}\b", command(name, "--help").output)


def test_init_writes_the_shipped_configuration_and_overwrites_nothing(here: Path) -> None:
    assert command("init").exit_code == 0
    written = here / "serve_config.yaml"
    assert written.read_text() == SHIPPED.read_text()
    written.write_text("mine")
    refused = command("init")
    assert (refused.exit_code, written.read_text()) == (2, "mine")
    assert "--force" in refused.stderr
    assert command("init", "--force").exit_code == 0
    assert written.read_text() == SHIPPED.read_text()
    (here / "folder").mkdir()
    assert command("init", "folder").exit_code == 0
    assert (here / "folder" / "serve_config.yaml").exists()


def test_init_says_where_it_cannot_write(here: Path) -> None:
    result = command("init", "nowhere/serve_config.yaml")
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)


def test_the_shipped_configuration_passes(here: Path) -> None:
    result = command("check", str(SHIPPED))
    assert (result.exit_code, result.stderr) == (0, "")
    assert "demo" in result.stdout


def _application(**changes: Any) -> Callable[[Config], None]:
    def change(config: Config) -> None:
        config["applications"].append(model(config) | {"name": "mine"} | changes)

    return change


def _deployment(**keys: Any) -> Callable[[Config], None]:
    return _application(deployments=[{"name": "VAE"} | keys])


MISTAKES: dict[str, tuple[Callable[[Config], None], tuple[str, ...]]] = {
    "unknown argument": (_application(args={"source": "demo", "sorce": "x"}), ("'mine'", "args", "'source'")),
    "missing argument": (_application(args={}), ("'mine'", "args: source")),
    "argument of a wrong type": (_application(args={"source": "demo", "dtype": "int8"}), ("'mine'", "args: dtype")),
    "arguments that are none": (_application(args=["demo"]), ("'mine'", "args")),
    "reserved name": (_application(name="models"), ("'models'", "name")),
    "name that no path can have": (_application(name="My VAE"), ("'My VAE'", "name")),
    "two models of one name": (_application(name="sd-v1"), ("sd-v1", "duplicates")),
    "name that is no string": (_application(name=1.5), ("1.5", "name")),
    "unknown key of an application": (_application(arg={}), ("'mine'", "'arg'", "'args'")),
    "unknown key of a deployment": (_deployment(num_replica=1), ("'mine'", "'num_replica'", "'num_replicas'")),
    "unknown key of the scaling": (
        _deployment(autoscaling_config={"min_replica": 0}),
        ("'mine'", "autoscaling_config", "'min_replicas'"),
    ),
    "fewest over most": (_deployment(autoscaling_config={"min_replicas": 3, "max_replicas": 2}), ("'mine'", "max_replicas")),
    "no such deployment": (_application(deployments=[{"name": "Vae"}]), ("'mine'", "'Vae'", "VAE")),
    "lost GPU": (_deployment(ray_actor_options={"num_cpus": 1}), ("'mine'", "ray_actor_options", "num_gpus")),
    "unknown key at the top": (lambda config: config.update(http_option={}), ("'http_option'", "'http_options'")),
    "no applications": (lambda config: config.pop("applications"), ("applications",)),
    "import path that is none": (_application(import_path="app"), ("'mine'", "import_path")),
    "unknown argument of the ingress": (
        lambda config: config["applications"][0]["args"].update(max_body=3),
        ("'remote-vae'", "'max_body'", "'max_body_mib'"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named_with_its_application_and_key_and_nothing_runs(here: Path, mistake: str) -> None:
    change, words = MISTAKES[mistake]
    config = yaml.safe_load(SHIPPED.read_text())
    change(config)
    (here / "serve_config.yaml").write_text(yaml.safe_dump(config))
    for result in (command("check"), command("run"), command("fetch")):
        assert result.exit_code == 2
        assert result.stderr.count("\n") == 1, result.stderr
        assert not [word for word in words if word not in result.stderr], result.stderr


def test_an_application_without_a_name_is_told_by_its_number(here: Path) -> None:
    config = yaml.safe_load(SHIPPED.read_text())
    config["applications"][1] = {"import_pth": "remote_vae_serve.app:vae"}
    (here / "c.yaml").write_text(yaml.safe_dump(config))
    assert "application number 2: import_path" in command("check", "c.yaml").stderr


def test_every_mistake_is_said_at_once(here: Path) -> None:
    config = yaml.safe_load(SHIPPED.read_text())
    for change in (_application(name="models"), _deployment(num_replica=1)):
        change(config)
    (here / "serve_config.yaml").write_text(yaml.safe_dump(config))
    first, second = command("check").stderr.splitlines()
    assert "'models'" in first
    assert "'num_replica'" in second


@pytest.mark.parametrize("text", [None, "applications: [", "- a", "", "\x00"])
def test_a_file_that_is_no_configuration_is_one_sentence(here: Path, text: str | None) -> None:
    if text is not None:
        (here / "serve_config.yaml").write_text(text)
    result = command("check")
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert "serve_config.yaml" in result.stderr


def test_run_refuses_what_the_proxy_would_not_start_with(here: Path) -> None:
    command("init")
    for arguments in (("--max-body-mib", "257"), ("--max-body-mib", "0"), ("--token", "a,b"), ("--token", " "),
                      ("--token", "\N{SNOWMAN}")):  # fmt: skip
        result = command("run", *arguments)
        assert result.exit_code == 2, arguments
        assert result.stderr
    empty = command("run", REMOTE_VAE_TOKENS=" ,")
    assert empty.exit_code == 2
    assert "REMOTE_VAE_TOKENS" in empty.stderr


def applications(block: str) -> list[Config]:
    return list(yaml.safe_load("applications:\n" + block)["applications"])


def test_what_add_prints_appends_to_a_configuration_that_passes(here: Path) -> None:
    save_tiny_vae("flux", here / "My Model" / "vae")
    command("init")
    config = here / "serve_config.yaml"
    for source, subfolder in (("My Model/vae", ()), ("My Model", ("--subfolder", "vae", "--name", "other"))):
        result = command("add", source, *subfolder)
        assert result.exit_code == 0, result.stderr
        assert "AutoencoderKL, 16 latent channels" in result.stdout
        (application,) = applications(result.stdout)
        config.write_text(config.read_text() + result.stdout)
    assert application["name"] == "other"
    assert VAEConfig(**application["args"]) == VAEConfig(source=str(here / "My Model"), subfolder="vae")
    checked = command("check")
    assert checked.exit_code == 0, checked.stderr
    assert "my-model" in checked.stdout


def _folder(folder: Path, config: str | None) -> None:
    """Looks like a model's folder; nobody opens its weights."""
    folder.mkdir()
    (folder / "diffusion_pytorch_model.safetensors").touch()
    if config is not None:
        (folder / "config.json").write_text(config)


def test_a_class_without_a_row_is_said_to_get_the_generic_one(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny_vae("sd", here / "new")
    monkeypatch.setattr(table, "FAMILIES", ())
    result = command("add", "new")
    assert result.exit_code == 0, result.stderr
    assert "generic" in result.stdout


@pytest.mark.parametrize(
    "written", [None, "[]", "{", '{"_class_name": "UNet2DModel"}', '{"_class_name": "NoSuchModel"}']
)
def test_what_is_no_autoencoder_is_one_sentence(here: Path, written: str | None) -> None:
    _folder(here / "source", written)
    result = command("add", "source")
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (1, "", 1)


def test_a_name_that_the_ingress_uses_or_could_not_route_is_refused(here: Path) -> None:
    save_tiny_vae("sd", here / "health")
    for name in ("models", "My VAE", ""):
        assert command("add", "health", "--name", name).exit_code == 2
    (application,) = applications(command("add", "health").stdout)
    assert application["name"] == "health-vae"


def test_fetch_says_where_the_weights_are_and_goes_on_after_a_failure(here: Path) -> None:
    save_tiny_vae("sd", here / "good")
    (here / "bad").mkdir()
    sources = {"bad": "bad", "good": "good"}
    entries = [
        {
            "name": name,
            "route_prefix": None,
            "import_path": "remote_vae_serve.app:vae",
            "args": {"source": str(here / source)},
        }
        for name, source in sources.items()
    ]
    (here / "serve_config.yaml").write_text(yaml.safe_dump({"applications": entries}))
    result = command("fetch")
    assert result.exit_code == 1
    assert result.stdout == f"good: {here / 'good'}\n"
    assert result.stderr.startswith("bad: ")
    assert result.stderr.count("\n") == 1
    assert command("fetch", "good").exit_code == 0
    unknown = command("fetch", "good", "nope")
    assert unknown.exit_code == 2
    assert "nope" in unknown.stderr


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ({"policy_kwargs": {"idle_sec": 900}}, "unknown argument 'idle_sec'; known are idle_s and turn_s"),
        ({"policy_kwargs": {"idle_s": "abc"}}, "idle_s is 'abc'; expected a number of seconds"),
        ({"policy_kwargs": {"turn_s": -1}}, "turn_s is -1; expected a number of seconds"),
        ({"policy_function": "remote_vae_serve.scaling:YieldWenIdle"}, "YieldWenIdle"),
        ({"policy_function": "remote_vae_serve.scalin:YieldWhenIdle"}, "remote_vae_serve.scalin"),
    ],
)
def test_a_mistake_in_the_policy_is_found_before_the_controller_finds_it(
    here: Path, written: dict[str, Any], said: str
) -> None:
    policy = {"policy_function": "remote_vae_serve.scaling:YieldWhenIdle"} | written
    application = {
        "name": "x", "route_prefix": None, "import_path": "remote_vae_serve.app:vae", "args": {"source": "demo"},
        "deployments": [{"name": "VAE", "autoscaling_config": {"min_replicas": 0, "policy": policy}}],
    }  # fmt: skip
    (here / "policy.yaml").write_text(yaml.safe_dump({"applications": [application]}))
    result = command("check", "policy.yaml")
    assert result.exit_code == 2
    assert "application 'x'" in result.stderr
    assert said in result.stderr


def test_run_refuses_a_port_that_somebody_answers_on(here: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ingress = {"name": "remote-vae", "import_path": "remote_vae_serve.app:ingress"}
        config = {"http_options": {"host": "127.0.0.1", "port": port}, "applications": [ingress]}
        (here / "taken.yaml").write_text(yaml.safe_dump(config))
        result = command("run", "taken.yaml")
    assert result.exit_code == 1
    assert f"127.0.0.1:{port} is in use" in result.stderr


def test_the_shipped_ingress_has_a_second_one_for_when_it_dies() -> None:
    (ingress,) = [app for app in yaml.safe_load(SHIPPED.read_text())["applications"] if app["route_prefix"] == "/"]
    assert [deployment["num_replicas"] for deployment in ingress["deployments"]] == [2]
