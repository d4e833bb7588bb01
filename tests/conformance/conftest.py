"""Lets pytest explain failed assertions in the suite, which lives in a module that is not itself collected."""

import pytest

pytest.register_assert_rewrite("tests.conformance.backend", "tests.conformance.gpu_reader", "tests.conformance.engine_suite")
