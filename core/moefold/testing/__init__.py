"""What a plugin's own tests can ask: does this stage, codec, backend or model keep to what moefold relies on?

    from moefold.testing import check_stage

    def test_the_stage():
        check_stage(my_stage)

Each check raises CheckError with a message that names the defect. Fixtures: `pytest_plugins =
["moefold.testing.plugin"]` in a conftest.py.
"""

from moefold.testing.backends import Shape, check_backend
from moefold.testing.codecs import check_codec
from moefold.testing.failures import CheckError, Unchecked
from moefold.testing.families import check_family
from moefold.testing.model import small_model
from moefold.testing.pipelines import run_pipeline
from moefold.testing.stages import check_stage
from moefold.testing.world import World

__all__ = [
    "CheckError",
    "Shape",
    "Unchecked",
    "World",
    "check_backend",
    "check_codec",
    "check_family",
    "check_stage",
    "run_pipeline",
    "small_model",
]
