"""A configuration is read whole or refused with the key and the mend."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pydantic import ValidationError

from services.contract.config import Config, ConfigError, dump_config, load_config, save_config, show_config

CONFIGS = Path(__file__).parents[2] / "configs"


def written(folder: Path, text: str) -> Path:
    path = folder / "run.toml"
    path.write_text(text)
    return path


def refusal(folder: Path, text: str = "", environment: dict[str, str] | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(written(folder, text), environment or {})
    return str(caught.value)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.toml")), ids=lambda path: path.name)
def test_every_configuration_that_is_shipped_loads(path: Path) -> None:
    assert load_config(path, {}).run.name == path.stem


def test_the_first_command_and_the_tests_have_their_configurations() -> None:
    assert {"quickstart.toml", "smoke.toml"} <= {path.name for path in CONFIGS.glob("*.toml")}


def test_defaults_alone_are_a_configuration() -> None:
    assert load_config(None, {}) == Config()


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("[trainer]\nlearning_rat = 1.0", "trainer.learning_rat"),
        ("[rollout.engine]\ngpus = 1", "rollout.engine.gpus"),
        ("[trainr]\nsteps = 1", "trainr"),
        ("steps = 1", "steps"),
    ],
)
def test_an_unknown_key_is_named(tmp_path: Path, text: str, key: str) -> None:
    assert f"{key}: unknown key; check its spelling" in refusal(tmp_path, text)


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ('[trainer]\nsteps = "many"', "trainer.steps"),
        ("[trainer]\nsteps = 1.5", "trainer.steps"),
        ("[trainer]\neval_temperature = -1", "trainer.eval_temperature"),
        ("[trainer]\nsamples_per_prompt = 0", "trainer.samples_per_prompt"),
        ("[trainer]\nlearning_rate = 0", "trainer.learning_rate"),
        ("[retriever]\nport = 70000", "retriever.port"),
        ('[run]\nname = "a/b"', "run.name"),
        ('[run]\nname = ""', "run.name"),
        ("[run]\nname = 3", "run.name"),
        ('[trainer]\ndevice = "tpu"', "trainer.device"),
        ('[reward]\nmatch = "rouge"', "reward.match"),
        ("[reward]\nretrieval_score = -0.1", "reward.retrieval_score"),
        ("[reward]\ncorrect = nan", "reward.correct"),
        ("[reward]\ncorrect = inf", "reward.correct"),
        ('[reward]\nfunction = "my.module"', "reward.function"),
        ("[reward]\nmax_tries = 0", "reward.max_tries"),
        ("trainer = 3", "trainer"),
        ("redis = 3", "redis"),
    ],
)
def test_a_wrong_type_or_value_is_named(tmp_path: Path, text: str, key: str) -> None:
    assert f"  {key}: Input should be" in refusal(tmp_path, text) or f"  {key}: String should" in refusal(tmp_path, text)


def test_all_mistakes_are_told_at_once(tmp_path: Path) -> None:
    told = refusal(tmp_path, "[trainer]\nsteps = -1\nfoo = 1\n[retriever]\nport = -1")
    assert all(key in told for key in ("trainer.steps", "trainer.foo", "retriever.port"))


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ('[model]\nsource = "folder"', ["model.path", "set it"]),
        ("[rollout]\ntopk = 101", ["rollout.topk", "retriever.max_topk", "lower it"]),
        ("[retriever]\ntopk = 101", ["retriever.topk", "retriever.max_topk", "lower one or raise the other"]),
        ('[rollout.engine]\nurls = ["gpu1:30000"]', ["rollout.engine.urls", "gpu1:30000", "http://host:port"]),
        ('[rollout.engine]\nurls = ["http://a:1", "http://a:1/"]', ["rollout.engine.urls", "twice", "leave one"]),
        ('[rollout.engine]\nrouter = "http://a:1"', ["rollout.engine.router", "rollout.engine.urls", "list the engines"]),
        ("[rollout]\nmax_turn_tokens = 2000", ["rollout.max_turn_tokens", "rollout.max_response_tokens", "lower it"]),
        ("[rollout]\nmax_response_tokens = 2048", ["rollout.max_response_tokens", "model.max_context", "lower it"]),
        ("[rollout.engine]\nmax_total_tokens = 100", ["rollout.engine.max_total_tokens", "model.max_context", "would not fit"]),
        ("[trainer]\nprocesses = 3\ntensor_parallel = 2", ["trainer.processes", "multiple"]),
        ("[trainer]\neval_samples = 4", ["eval_samples", "eval_temperature", "set eval_temperature above 0"]),
        ('[data]\ninstruction = "Answer."', ["data.instruction", "{question}", "add it"]),
        ("[reward]\nsoft_time_limit_s = 30", ["reward.soft_time_limit_s", "below reward.time_limit_s"]),
        ("[reward]\nstructure_format_score = 0.5", ["reward.structure_format_score + reward.retrieval_score", "must be below"]),
        ("[reward]\nstructure_format_score = 0.3\nretrieval_score = 0.5", ["reward.retrieval_score", "(0.7)", "lower them"]),
        ("[reward]\nfinal_format_score = 1.0", ["reward.final_format_score", "below reward.correct", "lower"]),
        ("[reward]\ncorrect = 0.1\nfinal_format_score = 0.2", ["reward.final_format_score", "(0.1)"]),
        ('[reward]\nlegacy = true\nfunction = "a:b"', ["reward.legacy", "reward.function", "take one out"]),
        ('[reward]\nlegacy = true\nmatch = "f1"', ["reward.legacy knows no F1", 'reward.match to "exact"']),
        ('[reward]\nlegacy = true\nmatch = "sub"\nfinal_format_score = 0.1', ["reward.legacy", "three format scores to 0"]),
        ('[redis]\nurl = "redis://:hush@h:1/0"', ["redis.url", "FORAGE_REDIS__PASSWORD"]),
    ],
)
def test_a_contradiction_names_its_keys_and_the_mend(tmp_path: Path, text: str, parts: list[str]) -> None:
    told = refusal(tmp_path, text)
    assert all(part in told for part in parts), told
    assert "hush" not in told


@pytest.mark.parametrize(
    ("name", "text", "read"),
    [
        ("FORAGE_TRAINER__LEARNING_RATE", "1e-6", lambda c: c.trainer.learning_rate == 1e-6),
        ("FORAGE_TRAINER__STEPS", "3", lambda c: c.trainer.steps == 3),
        ("FORAGE_REWARD__REQUIRE_THINK", "true", lambda c: c.reward.require_think is True),
        ("FORAGE_ROLLOUT__ENGINE__PORT", "30000", lambda c: c.rollout.engine.port == 30000),
        ("FORAGE_ROLLOUT__ENGINE__EXTRA_ARGS", '["--a", "1"]', lambda c: c.rollout.engine.extra_args == ["--a", "1"]),
        ("FORAGE_RUN__NAME", "other", lambda c: c.run.name == "other"),
        ("FORAGE_RUN__NAME", '"other"', lambda c: c.run.name == "other"),
        ("FORAGE_RUN__NAME", "007", lambda c: c.run.name == "007"),
        ("FORAGE_RUN__NAME", "3", lambda c: c.run.name == "3"),
        ("FORAGE_MODEL__PATH", "/models/42", lambda c: c.model.path == Path("/models/42")),
        ("FORAGE_MODEL__PATH", "42", lambda c: c.model.path == Path("42")),
        ("FORAGE_DATA__SYSTEM", "true", lambda c: c.data.system == "true"),
        ("FORAGE_REDIS__PASSWORD", "123456", lambda c: c.redis.password.get_secret_value() == "123456"),
        ("FORAGE_REDIS__PASSWORD", '"quoted"', lambda c: c.redis.password.get_secret_value() == '"quoted"'),
        ("FORAGE_REDIS__PASSWORD", "a#b=[c", lambda c: c.redis.password.get_secret_value() == "a#b=[c"),
    ],
)
def test_the_environment_overrides_the_file(tmp_path: Path, name: str, text: str, read) -> None:
    path = written(tmp_path, '[trainer]\nsteps = 9\nlearning_rate = 0.5\n[run]\nname = "file"')
    assert read(load_config(path, {name: text}))


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("FORAGE_STEPS", "FORAGE_<SECTION>__<KEY>"),
        ("FORAGE_TRAINER__STEP", "trainer.step: unknown key"),
        ("FORAGE_TRAINER__STEPS__X", "trainer.steps: Input should be"),
        ("FORAGE_RUN__NAME__X", "name is a value, not a section"),
    ],
)
def test_a_mistake_in_the_environment_is_named(tmp_path: Path, name: str, told: str) -> None:
    assert told in refusal(tmp_path, '[run]\nname = "file"', {name: "1"})


def test_variables_of_the_launchers_and_of_others_are_left_alone(tmp_path: Path) -> None:
    load_config(
        None, {"FORAGE_CONFIG": "x", "FORAGE_HEARTBEAT_FILE": "y", "FORAGE_LOG_LEVEL": "DEBUG", "HOME": "/", "FORAGER": "1"}
    )


def test_a_password_in_the_file_is_refused_without_repeating_it(tmp_path: Path) -> None:
    told = refusal(tmp_path, '[redis]\npassword = "hush"')
    assert "FORAGE_REDIS__PASSWORD" in told and "hush" not in told


def test_a_secret_is_never_shown_and_that_it_is_set_is() -> None:
    config = load_config(None, {"FORAGE_REDIS__PASSWORD": "hush"})
    assert "password" not in dump_config(config)["redis"]
    assert "hush" not in f"{dump_config(config)} {show_config(config)} {config} {config!r}"
    assert "# redis.password is set; it comes from the environment only (FORAGE_REDIS__PASSWORD)" in show_config(config)


SHOWN = {
    "nothing": "",
    "turns as slime counts them": '[rollout]\nturn_semantics = "slime"\nmax_turns = 4',
    "a layout of one's own": r"""
[rollout]
observation_template = "\n\n<information>\"{passages}\"</information>\n"
passage_template = '{number} {text}'
""",
    "tables of questions": """
[data]
source = "folder"
corpus = "hub:search-r1/wiki-18"
mix = {nq = 2, hotpotqa = 0.5}
[[data.train_questions]]
path = "mine.csv"
columns = {question = "q", golden_answers = "a"}
limit = 3
""",
    "engines elsewhere": '[rollout.engine]\nurls = ["http://a:1", "http://b:2"]\nrouter = "http://r:3"\nextra_args = ["--a", "1"]',
    "a reward of one's own": '[reward]\nfunction = "mine:score"',
    "awkward text": """[data]\nsystem = "a \\"quote\\", a \\\\ and a\\nline of ünï"\n[run]\nname = "007\"""",
}


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.toml")), ids=lambda path: path.name)
def test_what_is_shown_of_a_shipped_configuration_reads_back_as_the_same(tmp_path: Path, path: Path) -> None:
    config = load_config(path, {})
    assert load_config(written(tmp_path, show_config(config)), {}) == config


@pytest.mark.parametrize("text", SHOWN.values(), ids=SHOWN.keys())
def test_what_is_shown_and_what_is_saved_read_back_as_the_same(tmp_path: Path, text: str) -> None:
    config = load_config(written(tmp_path, text), {"FORAGE_REDIS__URL": "redis://elsewhere:1"})
    assert load_config(written(tmp_path, show_config(config)), {}) == config
    save_config(config, tmp_path / "saved.toml")
    assert load_config(tmp_path / "saved.toml", {}) == config


def test_what_is_shown_with_a_secret_reads_back(tmp_path: Path) -> None:
    environment = {"FORAGE_REDIS__PASSWORD": "hush"}
    config = load_config(None, environment)
    assert load_config(written(tmp_path, show_config(config)), environment) == config


def test_a_missing_file_and_a_broken_one_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no configuration at .*nowhere.toml: give the path"):
        load_config(tmp_path / "nowhere.toml", {})
    assert "is not valid TOML" in refusal(tmp_path, "[run\nname =")


def test_a_configuration_cannot_be_changed_after_the_start() -> None:
    with pytest.raises(ValidationError):
        Config().run.name = "other"  # type: ignore[misc]


def test_every_variable_of_the_launchers_may_be_set_beside_the_settings() -> None:
    files = ["forage", ".env.example", "docker-compose.yml", ".ci/run", *Path("services").glob("*/Dockerfile")]
    named = {name for file in files for name in re.findall(r"FORAGE_[A-Z_]+", Path(file).read_text()) if "__" not in name}
    assert {"FORAGE_WHEELS", "FORAGE_REDIS_PASSWORD", "FORAGE_CONFIG"} <= named
    load_config(None, environment=dict.fromkeys(named, "7"))


@pytest.mark.parametrize(
    ("text", "waits"),
    [("", True), ("max_staleness = 1", False), ("max_staleness = 1\neval_waits = true", True), ("eval_waits = false", False)],
)
def test_training_waits_for_evaluations_where_it_is_synchronous_unless_told_otherwise(
    tmp_path: Path, text: str, waits: bool
) -> None:
    assert load_config(written(tmp_path, f"[trainer]\n{text}"), {}).trainer.evaluation_waits is waits
