"""`tools/compat.py` as a module, for tests."""

import importlib.util
from types import ModuleType

from tests.support.paths import ROOT

NEWEST = "0.33.0"
"""Of the last minor version of the window; of others only the sources are fetched."""


def load_tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("agentserve_compat", ROOT / "tools" / "compat.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


compat = load_tool()
