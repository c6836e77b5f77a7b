"""The JSON schema accepts what loads, and refuses what an editor can know to be wrong."""

from __future__ import annotations

import json

import jsonschema
import pytest
import yaml
from typer.testing import CliRunner

from moefold import shipped
from moefold.cli import app
from moefold.hooks import Registry
from moefold.schema import pipeline_schema


@pytest.fixture(scope="module")
def validator() -> jsonschema.Draft202012Validator:
    made = pipeline_schema(Registry.installed())
    jsonschema.Draft202012Validator.check_schema(made)
    return jsonschema.Draft202012Validator(made)


@pytest.mark.parametrize("name", sorted(shipped.names()))
def test_shipped_pipelines_fit(validator, name):
    assert list(validator.iter_errors(yaml.safe_load(shipped.find(name).read_text()))) == []


@pytest.mark.parametrize(
    "stage",
    [
        {"uses": "puzzlemoe", "with": {"treshold": 0.3}},
        {"uses": "puzzlemoe", "with": {"threshold": 3}},
        {"uses": "puzzlemo"},
        {"uses": "puzzlemoe", "needs": {"pear": "pair.random"}},
        {"uses": "puzzlemoe", "extra": 1},
        {"uses": "save"},
        {"uses": "mergemoe", "with": {"target": "elsewhere"}},
        {"with": {}},
    ],
)
def test_wrong_stages_do_not(validator, stage):
    assert list(validator.iter_errors({"model": "demo", "stages": [stage]}))


def test_wrong_documents_do_not(validator):
    right = {"uses": "observe"}
    for document in ({"stages": [right]}, {"model": "", "stages": [right]}, {"model": "demo", "stages": []}):
        assert list(validator.iter_errors(document))
    assert not list(validator.iter_errors({"model": {"name": "a/b", "revision": "main"}, "stages": [right]}))


def test_every_stage_and_option_is_described(validator):
    for name, stage in validator.schema["$defs"].items():
        assert stage["description"] == stage["properties"]["uses"]["description"] != "", name
    uses = validator.schema["properties"]["stages"]["items"]["properties"]["uses"]
    assert dict(zip(uses["enum"], uses["markdownEnumDescriptions"], strict=True))["puzzlemoe"].startswith("Share the")
    text = json.dumps(validator.schema)
    assert "relative difference up to which two entries are shared" in text
    assert '"$ref": "#/$defs/' in text


def test_the_command_prints_it():
    done = CliRunner().invoke(app, ["schema"])
    assert done.exit_code == 0
    assert json.loads(done.stdout)["title"] == "moefold pipeline"
