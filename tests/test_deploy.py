"""The files that deploy us say what our commands take, and the probes in them work."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import yaml

from bench.live import SHARDKV, LiveCluster, free_port_base
from shardkv.cli.main import main

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"


def parsed(arguments: list[str], environment: dict[str, str] | None = None) -> dict[str, Any]:
    """What the command line means, with files taken for granted; raises as click does."""
    exists = [parameter.type for command in commands(main) for parameter in command.params]
    checks = [kind for kind in exists if isinstance(kind, click.Path)]
    before = [kind.exists for kind in checks]
    known = dict(os.environ)
    try:
        os.environ.update(environment or {})
        for kind in checks:
            kind.exists = False
        command: Any = main
        context = click.Context(main, info_name="shardkv")
        while isinstance(command, click.Group):
            name, *arguments = arguments
            command = command.get_command(context, name)
            context = command.make_context(
                name, list(arguments), parent=context, **{"resilient_parsing": False}
            )
            arguments = [*context._protected_args, *context.args] if isinstance(command, click.Group) else []
        return dict(context.params)
    finally:
        os.environ.clear()
        os.environ.update(known)
        for kind, existed in zip(checks, before, strict=True):
            kind.exists = existed


def commands(command: click.Command) -> Iterator[click.Command]:
    yield command
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            each = command.get_command(context, name)
            assert each is not None, name
            yield from commands(each)


def shell(script: str, **environment: str) -> list[str]:
    """The words of our command in a container's shell line, as that shell makes them."""
    printing = script.replace("exec shardkv", "printf '%s\\n'", 1)
    done = subprocess.run(
        ["/bin/bash", "-c", printing], env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()


def kubernetes() -> list[dict[str, Any]]:
    return [
        document
        for file in sorted((DEPLOY / "kubernetes").glob("*.yaml"))
        for document in yaml.safe_load_all(file.read_text())
    ]


def test_kubernetes_starts_every_replica_with_its_number_and_peers_that_the_services_name() -> None:
    documents = kubernetes()
    services = {d["metadata"]["name"]: d for d in documents if d["kind"] == "Service"}
    sets = [d for d in documents if d["kind"] == "StatefulSet"]
    assert len(sets) == 2
    for found in sets:
        name, count = found["metadata"]["name"], found["spec"]["replicas"]
        service = services[found["spec"]["serviceName"]]
        assert service["spec"]["clusterIP"] == "None" and service["spec"]["publishNotReadyAddresses"]
        assert service["spec"]["selector"] == found["spec"]["template"]["metadata"]["labels"]
        (container,) = found["spec"]["template"]["spec"]["containers"]
        for ordinal in range(count):
            options = parsed(shell(container["args"][0], HOSTNAME=f"{name}-{ordinal}"))
            assert options["replica"] == ordinal + 1
            assert options["peers"] == tuple(f"{name}-{n}.{name}:7400" for n in range(count))
            ports = {port["name"]: port["containerPort"] for port in container["ports"]}
            assert options["listen"] == f"0.0.0.0:{ports['shardkv']}"
            assert options["metrics"].endswith(str(ports["metrics"]))
            mounts = [mount["mountPath"] for mount in container["volumeMounts"]]
            assert any(str(options["data"]).startswith(mount) for mount in mounts)
        for probe in ("startupProbe", "livenessProbe"):
            assert parsed(container[probe]["exec"]["command"][1:])["alive"]
        assert container["readinessProbe"]["grpc"]["port"] == 7400
    (job,) = [d for d in documents if d["kind"] == "Job"]
    (container,) = job["spec"]["template"]["spec"]["containers"]
    joined = parsed(shell(container["args"][0]))
    assert joined["if_new"] and joined["groups"][0] == "1"
    assert len([d for d in documents if d["kind"] == "PodDisruptionBudget"]) == len(sets)


def test_compose_starts_nine_replicas_that_know_each_other() -> None:
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    services = compose["services"]
    replicas = {
        name: service
        for name, service in services.items()
        if str(service.get("command", "")).startswith("serve")
    }
    assert len(replicas) == 9
    for name, service in replicas.items():
        environment = {key: str(value) for key, value in service["environment"].items()}
        options = parsed(shlex.split(service["command"]), environment)
        assert options["peers"][options["replica"] - 1] == f"{name}:7400", name
        assert {peer.partition(":")[0] for peer in options["peers"]} <= services.keys()
        assert options["listen"] == "0.0.0.0:7400" and options["cluster"] == "compose"
        (volume,) = service["volumes"]
        assert volume.partition(":")[0] in compose["volumes"]
        assert str(options["data"]).startswith(volume.partition(":")[2])
        assert parsed(service["healthcheck"]["test"][2:])["address"] == "127.0.0.1:7400"
    joined = parsed(shlex.split(services["join"]["command"]), services["join"]["environment"])
    assert joined["if_new"] and joined["groups"][::2] == ("1", "2")


def test_systemd_s_units_are_sound_and_their_options_are_ours(tmp_path: Path) -> None:
    for unit in (DEPLOY / "systemd").glob("*.service"):
        text = unit.read_text()
        line = re.search(r"^ExecStart=(.*)$", text, re.M)
        assert line is not None and "KillSignal=SIGKILL" not in text
        words = shlex.split(line[1].replace("%i", "1").replace("${ARCHIVE_URL}", "file:///backups"))
        config = words.index("--config") + 1 if "--config" in words else 0
        if config:
            words[config] = str(DEPLOY / "systemd" / Path(words[config]).name)
        environment = {"SHARDKV_CONTROLLERS": "10.0.0.1:7400"}
        options = parsed(words[1:], environment)
        if config:
            said = tomllib.loads(Path(words[config]).read_text())
            assert options["peers"] == tuple(said["peers"]) and str(options["data"]).startswith(
                "/var/lib/shardkv/"
            )
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        return
    for unit in (DEPLOY / "systemd").glob("*.service"):
        here = tmp_path / unit.name.replace("@", "@1")
        here.write_text(unit.read_text().replace("/opt/shardkv/bin/shardkv", "/bin/true"))
        done = subprocess.run([analyze, "verify", str(here)], capture_output=True, text=True, check=False)
        wrong = [line for line in done.stderr.splitlines() if here.name in line]
        assert not wrong, wrong


def test_the_image_has_what_it_is_built_from() -> None:
    text = (ROOT / "Dockerfile").read_text()
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", text, re.M)
    for path in " ".join(copied).split():
        assert (ROOT / path).exists(), path
        assert f"!{path}" in (ROOT / ".dockerignore").read_text().splitlines(), path
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert {package.partition(".")[0] for package in packages} <= set(" ".join(copied).split())
    assert re.search(r"^USER shardkv$", text, re.M)


def test_health_tells_probes_who_serves_and_who_does_not() -> None:
    with LiveCluster(groups=1, replicas=3, controllers=1, shards=1) as live:
        cluster = live.cluster()
        replicas = [process for process in cluster.processes if process.role == "group"]
        for process in cluster.processes:
            assert health(process.address).stdout.strip() == "SERVING"
        for process in replicas[1:]:
            cluster.kill(process)
        left = replicas[0].address
        # Alone it soon knows no leader: not ready, and well alive; restarting it would help nobody.
        while health(left).returncode == 0:
            pass
        assert "NOT_SERVING" in health(left).stderr
        assert health(left, "--alive").returncode == 0
        assert health(replicas[1].address).returncode == 3
        joined = live.run("admin", "join", "1", left, "--if-new")
        assert "configuration 2" in joined, "it is in already"
    assert health(f"127.0.0.1:{free_port_base(1)}").returncode == 3


def health(address: str, *options: str) -> subprocess.CompletedProcess[str]:
    command = [*SHARDKV, "health", address, *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
