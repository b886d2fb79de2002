"""The manifests of deploy/kubernetes: valid by Kubernetes's own schemas, and in step with compose and the configuration."""

from __future__ import annotations

import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from services.contract.config import load_config

FOLDER = Path("deploy/kubernetes")
SCHEMA = "1.32"
COMPOSE = yaml.safe_load(Path("docker-compose.yml").read_text())["services"]
ON_ONE_MACHINE = {"tensorboard", "flower", "forage"}
"""Services of compose with which a person looks at a run."""
needs_kubectl = pytest.mark.skipif(not shutil.which("kubectl"), reason="needs kubectl, which renders the overlays")


def documents(folder: str) -> list[dict[str, Any]]:
    """What the files say that a kustomization names."""
    names = yaml.safe_load((FOLDER / folder / "kustomization.yaml").read_text())["resources"]
    return [document for name in names for document in yaml.safe_load_all((FOLDER / folder / name).read_text())]


def variables(path: Path) -> dict[str, str]:
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    return dict(line.split("=", 1) for line in lines)


@cache
def containers() -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """By the name of the service in compose: the pod's specification and the container's."""
    pods = [document["spec"]["template"]["spec"] for document in documents("base") if "template" in document.get("spec", {})]
    return {c["name"]: (pod, c) for pod in pods for c in [*pod.get("initContainers", []), *pod["containers"]]}


SERVICES = sorted(set(COMPOSE) - ON_ONE_MACHINE)


def container(service: str) -> dict[str, Any]:
    return containers()["assets" if service == "prepare" else service][1]


def test_every_service_of_compose_is_there() -> None:
    assert {name.replace("assets", "prepare") for name in containers()} == set(SERVICES)


@pytest.mark.parametrize("document", documents("base"), ids=lambda d: f"{d['kind']}-{d['metadata']['name']}")
def test_a_manifest_is_valid(document: dict[str, Any]) -> None:
    kubernetes_validate.validate(document, SCHEMA, strict=True)


@needs_kubectl
@pytest.mark.parametrize("overlay", ["base", "gpu"])
def test_what_kustomize_makes_of_them_is_valid(overlay: str, tmp_path: Path) -> None:
    for document in rendered(overlay, tmp_path):
        kubernetes_validate.validate(document, SCHEMA, strict=True)


def rendered(overlay: str, folder: Path) -> list[dict[str, Any]]:
    copy = shutil.copytree(FOLDER, folder / "kubernetes")
    shutil.copy(copy / "base/secrets.env.example", copy / "base/secrets.env")
    done = subprocess.run(["kubectl", "kustomize", str(copy / overlay)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


@needs_kubectl
def test_with_gpus_every_service_gets_as_many_as_it_is_told_to_use(tmp_path: Path) -> None:
    found = rendered("gpu", tmp_path)
    of = {d["metadata"]["name"]: d["spec"] for d in found if d["kind"] in ("Job", "Deployment")}
    gpus = {name: [c.get("resources", {}).get("limits", {}).get("nvidia.com/gpu") for c in _pod(of, name)] for name in of}
    told = next(d["data"] for d in found if d["kind"] == "ConfigMap")
    assert gpus["rollout"] == [int(told["FORAGE_ROLLOUT__ENGINE__TENSOR_PARALLEL"])]
    environment = {entry["name"]: entry.get("value") for entry in _pod(of, "trainer")[0]["env"]}
    assert gpus["trainer"] == [int(environment["FORAGE_TRAINER__PROCESSES"])]
    assert of["trainer"]["completions"] == of["trainer"]["parallelism"] == int(environment["MACHINES"])
    config = load_config("configs/qwen2.5-3b.toml", {}).trainer
    ranks = int(environment["MACHINES"]) * int(environment["FORAGE_TRAINER__PROCESSES"])
    assert ranks % (config.tensor_parallel * config.pipeline_parallel) == 0
    images = {c["image"].split(":")[0] for name in ("retriever", "rollout", "trainer") for c in _pod(of, name)}
    assert images == {"forage-retriever-gpu", "forage-rollout-gpu", "forage-trainer-gpu"}


def _pod(specs: dict[str, Any], name: str) -> list[dict[str, Any]]:
    return specs[name]["template"]["spec"]["containers"]


@pytest.mark.parametrize("service", SERVICES)
def test_images_ports_and_places_are_those_of_compose(service: str) -> None:
    theirs, ours = COMPOSE[service], container(service)
    assert ours["image"] == theirs["image"]
    assert {port["containerPort"] for port in ours.get("ports", [])} >= {int(p.split(":")[-1]) for p in theirs.get("ports", [])}
    mounts = {m["mountPath"]: m.get("readOnly", False) for m in ours.get("volumeMounts", []) if m["name"] != "shm"}
    volumes = [volume.split(":") for volume in theirs.get("volumes", []) if not volume.startswith("./")]
    assert mounts == {place: mode == ["ro"] for _, place, *mode in volumes}


@pytest.mark.parametrize("service", SERVICES)
def test_each_ends_in_the_time_that_compose_gives_it(service: str) -> None:
    grace = {"45s": 45, "5m": 300}.get(COMPOSE[service].get("stop_grace_period", ""), 0)
    pod = containers()["assets" if service == "prepare" else service][0]
    assert pod.get("terminationGracePeriodSeconds", 30) >= grace


def test_settings_are_those_of_compose_and_the_configuration_takes_them() -> None:
    settings = variables(FOLDER / "base/forage.env")
    secrets = variables(FOLDER / "base/secrets.env.example")
    of_one = {e["name"]: e.get("value", "10.0.0.1") for _, c in containers().values() for e in c.get("env", [])}
    every = {k: v for k, v in (settings | secrets | of_one).items() if k.startswith("FORAGE_")}
    config = load_config("configs/quickstart.toml", every)
    assert (config.redis.url, config.retriever.url) == ("redis://redis:6379/0", "http://retriever:8000")
    assert set(COMPOSE["prepare"]["environment"]) <= set(settings | secrets)


@pytest.mark.parametrize("overlay", ["base/forage.env", "gpu/gpu.env"])
def test_the_run_of_an_overlay_is_in_the_images(overlay: str) -> None:
    settings = variables(FOLDER / overlay)
    config = load_config(settings["FORAGE_CONFIG"].removeprefix("/app/"), {k: v for k, v in settings.items() if "__" in k})
    assert config.redis.url


def test_torchrun_gives_the_trainer_the_time_to_save_that_its_pod_has() -> None:
    pod, trainer = containers()["trainer"]
    (told,) = [a for a in trainer["args"] if a.startswith("--shutdown-timeout=")]
    assert 0 < pod["terminationGracePeriodSeconds"] - int(told.partition("=")[2]) <= 30
