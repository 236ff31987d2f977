"""Rendered manifests, for the tests of deploy/k8s."""

import pytest

from tests.architecture.kubernetes import OVERLAYS, base_with, rendered


@pytest.fixture(scope="module")
def with_hpa(tmp_path_factory):
    """The base with the component that no overlay has."""
    return rendered(base_with("hpa", tmp_path_factory.mktemp("hpa")))


@pytest.fixture(params=[*OVERLAYS, "hpa"])
def manifests(request, with_hpa):
    return with_hpa if request.param == "hpa" else rendered(OVERLAYS[request.param])
