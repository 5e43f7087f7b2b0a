"""The closed loop's tests do not look at all that vLLM's imports left."""

from tests.support.garbage import frozen  # noqa: F401  a fixture of all tests here
