"""The suite of backend.py, run on the real llama-server where there is one, and on the stand-in that other tests rely on."""

import pytest

from tests.conformance.backend import Conformance
from tests.conformance.servers import Subject, real, standin


class TestLlamaServer(Conformance):
    @pytest.fixture(scope="class")
    @classmethod
    def subject(cls, tmp_path_factory: pytest.TempPathFactory) -> Subject:
        found = real(tmp_path_factory.mktemp("real"))
        if isinstance(found, str):
            pytest.skip(found)
        return found


class TestStandIn(Conformance):
    @pytest.fixture(scope="class")
    @classmethod
    def subject(cls, tmp_path_factory: pytest.TempPathFactory) -> Subject:
        return standin(tmp_path_factory.mktemp("standin"))
