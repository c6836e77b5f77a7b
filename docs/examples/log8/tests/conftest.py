"""Fixtures: moefold_model, moefold_world, moefold_run."""

pytest_plugins = ["moefold.testing.plugin"]
