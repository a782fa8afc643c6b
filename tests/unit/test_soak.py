"""The soak test's judgement: what counts as lost, which silence is whose, and that a leak is seen."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks.soak import left_behind, processes, report
from benchmarks.soak.clients import Clients, ours, plain
from benchmarks.soak.faults import Fault
from benchmarks.soak.outcomes import Answer, Outcome
from benchmarks.soak.processes import Growth, Holding, Watch
from benchmarks.soak.works import FAKE, Work, works

from in_process import InProcess, fake_engine, pipeline_of
from limits import WAIT_S
from remote_vae import RemoteVAE
from remote_vae_serve.http.app import create_app
from scripted_server import ScriptedServer
from served import served


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with served(create_app(InProcess(fake=pipeline_of(fake_engine(), "fake").answer), 2**26, WAIT_S)) as url:
        yield url


IMAGES = [work for work in works() if work.model == FAKE]


def test_a_right_reply_is_right_and_another_is_wrong(url: str) -> None:
    with RemoteVAE(f"{url}/fake") as vae:
        for work in IMAGES:
            other = Work(work.name, work.model, work.verb, work.sent, work.expected + 1e-3)
            for ask in (lambda one: ours(vae, one), lambda one: plain(url, one)):
                assert ask(work) == (Outcome.RIGHT, "")
                assert ask(other)[0] is Outcome.WRONG


def test_an_error_of_the_contract_is_a_refusal_to_a_plain_client_and_a_loss_to_ours(url: str) -> None:
    unknown = Work("x", "nobody", "decode", torch.zeros(1, 4, 8, 8), torch.zeros(1))
    assert plain(url, unknown)[0] is Outcome.REFUSED
    with RemoteVAE(f"{url}/nobody") as vae:
        assert ours(vae, unknown)[0] is Outcome.LOST


def test_a_strangers_error_and_a_cut_connection_are_losses() -> None:
    def text(exchange: object) -> None:
        exchange.answer(503, {"content-type": "text/plain"}, b"no")  # type: ignore[attr-defined]

    with ScriptedServer(text) as server:
        assert plain(server.url.removesuffix("/fake"), IMAGES[0])[0] is Outcome.LOST
    assert plain(server.url.removesuffix("/fake"), IMAGES[0])[0] is Outcome.LOST


def test_clients_ask_in_turn_until_they_are_stopped() -> None:
    heard: list[Answer] = []
    clients = Clients("ours", [lambda work: (Outcome.RIGHT, "")] * 2, IMAGES, heard.append)
    give_up = time.monotonic() + WAIT_S
    while len(heard) < 10:
        assert time.monotonic() < give_up
    assert clients.stop() == 0
    assert {answer.work for answer in heard} == {work.name for work in IMAGES}
    assert Answer.from_json(heard[0].to_json()) == heard[0]


def answered(at: float, outcome: Outcome = Outcome.RIGHT) -> Answer:
    return Answer("plain", "ingress", "image", outcome, at - 0.1, 0.1, "why")


def test_a_silence_is_the_longest_time_without_a_right_answer_after_a_fault() -> None:
    answers = [answered(at) for at in (0.0, 10.0, 11.0, 15.5, 16.0, 17.0)] + [answered(13.0, Outcome.LOST)]
    lines = report.silences_table(answers, [Fault("killed", 11.2, True), Fault("missed", 12.0, False)])
    assert "| killed | 1 | 4.5 s | 4.5 s |" in lines
    assert "| missed | 0 | - | - |" in lines
    assert "| plain | ingress | 7 | 6 | 0 | 1 | 0 | 0 |" in report.outcomes_table(answers)[2]
    assert report.what_went_wrong(answers) == ["- 1 x plain, ingress, lost: `why`"]


def test_a_silence_that_the_next_fault_brought_is_not_the_first_ones() -> None:
    answers = [answered(at) for at in (0.0, 10.0, 10.5, 15.0, 15.4, 20.0)]
    first, missed, second = Fault("first", 10.2, True), Fault("missed", 13.0, False), Fault("second", 15.2, True)
    lines = report.silences_table(answers, [first, missed, second])
    assert "| first | 1 | 4.5 s | 4.5 s |" in lines
    assert "| second | 1 | 4.6 s | 4.6 s |" in lines


def test_a_silence_over_its_limit_and_a_loss_without_a_death_are_said() -> None:
    answers = [answered(at) for at in (0.0, 10.0, 12.5, *map(float, range(13, 40)))]
    lost = [answered(10.5, Outcome.LOST), answered(30.0, Outcome.LOST)]
    killed, missed = Fault("ingress killed", 10.2, True), Fault("ingress killed", 13.5, False)
    (silence, loss) = report.beyond(answers + lost, [killed, missed])
    assert silence.startswith("- 2.5 s of silence, ingress, after ingress killed; at most 2 s")
    assert '"began": 29.9' in loss
    assert report.beyond(answers, [Fault("update", 10.2, True)]) == []


def test_haproxy_is_listed_and_not_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "SETTLED_S", 0.0)
    command = [sys.executable, "-c", "print('up', flush=True); input()", "haproxy -f x"]
    watch = Watch()
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()  # before that it may still be this program
        watch.look([process.pid])
        assert list(processes.holdings([process.pid])) == [processes.HAPROXY]
        process.communicate(b"\n")
    assert watch.growths() == []


LEAKS = """
import sys
print("up", flush=True)
sys.stdin.readline()
held = bytearray(b"x" * 2**27) if sys.argv[1] == "memory" else None
print("grown", flush=True)
sys.stdin.readline()
"""


@pytest.mark.parametrize(("leaks", "is_seen"), [("memory", True), ("nothing", False)])
def test_a_planted_leak_is_seen(leaks: str, is_seen: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "SETTLED_S", 0.0)
    command = [sys.executable, "-c", LEAKS, leaks, "ServeReplica:fake:VAE"]
    watch = Watch()
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for _ in range(2):
            process.stdout.readline()
            watch.look([process.pid])
            process.stdin.write(b"\n")
    (growth,) = watch.growths()
    assert growth.kind == "replica"
    assert growth.is_leak == is_seen


def test_who_waited_for_the_first_request_is_in_use_from_then_on() -> None:
    command = [sys.executable, "-c", "print('up', flush=True); input()", "ServeReplica:fake:VAE"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(0.3)
        began, watch = time.monotonic(), Watch()
        watch.look([process.pid])
        looked_s = time.monotonic() - began
        (holding,) = processes.holdings([process.pid])["replica"]
        process.communicate(b"\n")
    ((seen,),) = watch._seen["replica"].values()
    assert seen.used_s <= looked_s + 0.02  # the system counts in hundredths
    assert holding.used_s >= 0.3 - 0.02


@pytest.mark.parametrize(("most", "is_leak"), [(110.0, False), (140.0, True)])
def test_what_a_fault_leaves_is_no_leak_where_it_left_the_others_as_much(most: float, is_leak: bool) -> None:
    watch = Watch(cycle_s=100.0)
    of = watch._seen["ingress"]
    of[1] = [Holding(1, 89.0, 80, 66.0), Holding(1, 108.0, 80, 120.0), Holding(1, 500.0, 80, 900.0)]
    of[2] = [Holding(2, 88.0, 80, 10.0), Holding(2, most, 80, 65.0)]
    (growth,) = watch.growths()
    assert growth.before.mib == 108.0
    assert growth.is_leak == is_leak


def test_one_that_nothing_in_use_for_as_long_can_be_compared_with_is_judged_once_it_is_old() -> None:
    young, later, old = (
        Holding(1, mib, 10, used_s) for mib, used_s in ((100.0, 60.0), (150.0, 300.0), (150.0, 1800.0))
    )
    assert not Growth("proxy", young, later).is_leak
    assert Growth("proxy", young, old).is_leak


@pytest.mark.parametrize(("mib", "handles", "is_leak"), [(500.0, 10, False), (524.0, 10, False), (530.0, 10, True),
                                                         (500.0, 40, True)])  # fmt: skip
def test_noise_is_no_leak(mib: float, handles: int, is_leak: bool) -> None:
    before = Holding(1, 500.0, 10, 60.0)
    assert Growth("ingress", before, Holding(1, mib, handles, 65.0)).is_leak == is_leak


def test_a_large_object_is_left_behind_unless_serve_itself_holds_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    held = [
        ("deployed", 2**20, 1),
        ("pixels", 2**21, 2),
        ("pixels", 2**21, 3),
        ("controller:told", 2**20, 3),
        ("token", 100, 3),
    ]
    listed = [SimpleNamespace(object_id=name, object_size=size, pid=pid) for name, size, pid in held]
    monkeypatch.setattr(left_behind, "list_objects", lambda **options: listed)
    monkeypatch.setattr(left_behind, "_controller", lambda: SimpleNamespace(pid=1, actor_id="controller"))
    monkeypatch.setattr(left_behind, "MEMORY", tmp_path)
    assert left_behind.left() == {"bytes that requests hold": 2**21, "spilled bytes": 0}
    directory = tmp_path / f"{left_behind.PREFIX}1"
    directory.mkdir()
    (directory / "deployed").write_bytes(bytes(2**21))  # Ray spills Serve's own too
    assert left_behind.left()["spilled bytes"] == 0
    (directory / "pixels").write_bytes(bytes(2**21))
    assert left_behind.left()["spilled bytes"] > 2**20
