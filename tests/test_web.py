"""The controller's page in a real browser: what it shows, and a join that is watched as it happens."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import socket
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from bench.live import SHARDKV, LiveCluster, free_port_base, in_background
from shardkv.observe.overview import Overview, problems
from shardkv.shardctrler.shard_map import Config, Group, Shard
from shardkv.web.server import MAX_CONNECTIONS, shown

pytestmark = pytest.mark.timeout(180)
BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
in_a_browser = pytest.mark.skipif(
    not (BROWSER and DRIVER), reason="takes Debian's chromium and chromium-driver (.ci/run installs them)"
)


def replica(role: str, **facts: object) -> dict[str, Any]:
    said: dict[str, Any] = {"role": role, "term": 3, "commit_index": 50, "applied_index": 50, "config_num": 2}
    return said | {"shards": {}} | facts


@pytest.mark.quick
def test_what_the_page_is_told_names_owners_moves_and_problems() -> None:
    shards = [Shard(1, b"", b"m", 1, 1, 1), Shard(2, b"m", b"", 2, 2, 2)]
    config = Config.of(2, shards, [Group(1, ("a:1", "a:2")), Group(2, ("b:1",))])
    rows_1 = {
        "1": {"state": "SERVING", "epoch": 1, "waiting": 0, "bytes": 10, "writes": 5, "reads": 6},
        "2": {"state": "LENDING", "epoch": 2, "waiting": 0},
    }
    stuck = {"state": "PULLING", "epoch": 2, "waiting": 0, "stuck_seconds": 12.0, "why": "nobody answers"}
    overview = Overview(
        config,
        {"c:1": replica("leader")},
        {
            1: {"a:1": replica("leader", shards=rows_1, commit_index=99_999), "a:2": replica("follower")},
            2: {
                "b:1": replica("leader", shards={"2": stuck}, read_only=True, room="LOW", free_bytes=5_000_000)
            },
        },
    )
    told = shown("name", overview, 7.0)
    assert told["serving"] == 1 and told["total"] == 2
    assert told["shards"][0] == {
        "id": 1, "start": "", "end": "m", "gid": 1, "state": "SERVING", "bytes": 10, "writes": 5, "reads": 6,
    }  # fmt: skip
    assert {(move["shard"], move["gid"], move["state"]) for move in told["moves"]} == {
        (2, 1, "LENDING"),
        (2, 2, "PULLING"),
    }
    text = " | ".join(problems(overview))
    for part in (
        "a:2 is 99,949 entries behind",
        "READ-ONLY",
        "5 MB left",
        "stuck at group 2",
        "nobody answers",
    ):
        assert part in text, text
    overview.groups[1] = {"a:1": None, "a:2": replica("follower")}
    text = " | ".join(problems(overview))
    assert "group 1 has no leader that answers" in text and "a:1 does not answer" in text


@pytest.fixture(scope="module")
def live() -> Iterator[LiveCluster]:
    with LiveCluster(groups=2, controllers=1, replicas=3, shards=6, web_port=free_port_base() + 25) as cluster:
        yield cluster


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER or ""
    for argument in (
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-background-networking",
        "--disable-dev-shm-usage",
        f"--user-data-dir={tmp_path}",
        "--window-size=1200,900",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER or ""))
    try:
        yield driver
    finally:
        driver.quit()


def page_of(live: LiveCluster) -> str:
    return next(process.web for process in live.cluster().processes if process.web)


def bars(browser: webdriver.Chrome) -> list[tuple[int, int, str, bool]]:
    """(shard, group, state, whether it is drawn as moving), at one moment, in the order of the keys."""
    script = """return [...document.querySelectorAll('#bar div')].map(
        bar => [+bar.dataset.shard, +bar.dataset.gid, bar.dataset.state, bar.classList.contains('moving')])"""
    return [tuple(bar) for bar in browser.execute_script(script)]


def text_of(browser: webdriver.Chrome, selector: str) -> str:
    return browser.execute_script("return document.querySelector(arguments[0]).innerText", selector)


@in_a_browser
def test_a_join_is_watched_as_it_happens(live: LiveCluster, browser: webdriver.Chrome) -> None:
    with live.clerk() as clerk:
        for n in range(6):
            for start in range(0, 40):
                clerk.put(bytes([0x21 + 15 * n]) + b"/%03d" % start, bytes(200_000))
        clerk.put("<img src=x onerror=document.title='broken'>", "a key is text, whatever is in it")
    browser.get(f"http://{page_of(live)}/")
    wait = WebDriverWait(browser, 30, poll_frequency=0.05)
    wait.until(lambda _: len(bars(browser)) == 6)
    assert {gid for _, gid, _, _ in bars(browser)} == {1, 2}
    assert "6 of 6 shards serve" in text_of(browser, "#said")
    assert text_of(browser, "[data-group='1']").count("follower") == 2
    assert "leader" in text_of(browser, "[data-group='0']")
    wait.until(lambda _: "MB" in text_of(browser, "#shards"))

    addresses = live.start_group(3)
    joined = in_background(lambda: live.run("admin", "join", "3", ",".join(addresses), "--wait"))
    seen: list[list[tuple[int, int, str, bool]]] = []

    def all_serve_with_group_3(_: object) -> bool:
        now = bars(browser)
        if not seen or seen[-1] != now:
            seen.append(now)
        return {gid for _, gid, _, _ in now} == {1, 2, 3} and all(state == "SERVING" for _, _, state, _ in now)

    wait.until(all_serve_with_group_3)
    joined()
    moved = [bar for now in seen for bar in now if bar[1] == 3 and bar[2] != "SERVING"]
    assert moved and all(moving for _, _, _, moving in moved), "shards on their way were drawn as such"
    wait.until(lambda _: "none" in text_of(browser, "#moves"))
    assert text_of(browser, "[data-group='3']").count("leader") == 1

    # A replica that dies is seen, and so is that it is back.
    cluster = live.cluster()
    victim = next(p for p in cluster.processes if p.role == "group" and p.gid == 1)
    cluster.kill(victim)
    wait.until(lambda _: f"{victim.address} does not answer" in text_of(browser, "#problems"))
    cluster.start(victim)
    wait.until(lambda _: not browser.find_element(By.ID, "problems").is_displayed())
    wrong = [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert not wrong, wrong
    assert browser.title == "shardkv"


@in_a_browser
def test_keys_are_shown_as_text(live: LiveCluster, browser: webdriver.Chrome) -> None:
    key = "<img src=x onerror=document.title='broken'>"
    config = live.json("admin", "query")
    shard = next(s for s in config["shards"] if s["start"] <= key and (not s["end"] or key < s["end"]))
    live.run("admin", "split", str(shard["id"]), key, "--wait")
    browser.get(f"http://{page_of(live)}/")
    WebDriverWait(browser, 30).until(lambda _: key in text_of(browser, "#shards"))
    assert browser.title == "shardkv" and not browser.find_elements(By.TAG_NAME, "img")


def test_nothing_can_be_changed_and_who_is_nobody_sees_nothing(live: LiveCluster) -> None:
    url = f"http://{page_of(live)}"
    assert json.loads(urllib.request.urlopen(f"{url}/api/cluster", timeout=10).read())["total"] >= 6
    for request, status in (
        (urllib.request.Request(f"{url}/", method="POST", data=b"x"), 405),
        (urllib.request.Request(f"{url}/api/cluster", method="DELETE"), 405),
        (urllib.request.Request(f"{url}/../../etc/passwd"), 404),
    ):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(request, timeout=10)
        assert refused.value.code == status
        refused.value.close()

    token = live.run("admin", "user", "add", "root", "--role", "admin").strip()
    live.run("admin", "access", "enable")
    try:
        for login, status in ((None, 401), (f"root:{token}x", 401), (f"root:{token}", 200)):
            assert status_of(f"{url}/api/cluster", login) == status
            assert status_of(f"{url}/", login) == status
    finally:
        subprocess.run(
            [*SHARDKV, "admin", "access", "disable", "--controllers", ",".join(live.controllers)],
            env=os.environ | {"SHARDKV_USER": "root", "SHARDKV_TOKEN": token},
            check=True,
            capture_output=True,
        )


def test_connections_that_say_nothing_do_not_pile_up(live: LiveCluster) -> None:
    host, _, port = page_of(live).partition(":")
    with contextlib.ExitStack() as held:
        silent = [
            held.enter_context(socket.create_connection((host, int(port)), 10))
            for _ in range(MAX_CONNECTIONS + 50)
        ]
        for connection in silent[:50]:
            connection.settimeout(30)
            with contextlib.suppress(ConnectionResetError):
                assert connection.recv(1) == b"", "the oldest are let go"
        assert urllib.request.urlopen(f"http://{host}:{port}/api/cluster", timeout=10).status == 200
        silent[-1].setblocking(False)
        with pytest.raises(BlockingIOError):
            silent[-1].recv(1)


def status_of(url: str, login: str | None) -> int:
    request = urllib.request.Request(url)
    if login is not None:
        request.add_header("Authorization", "Basic " + base64.b64encode(login.encode()).decode())
    try:
        return urllib.request.urlopen(request, timeout=10).status
    except urllib.error.HTTPError as refused:
        refused.close()
        return refused.code
