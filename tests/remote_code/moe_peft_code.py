"""Files of `moe_peft` 2.0.2, the reference's own training code, which pins a transformers that ours is newer than.

So it cannot be a dependency of the tests; it is compared with where it is installed past its pins:
``pip install --no-deps moe_peft==2.0.2``. The files that hold its routers are loaded, with the few names that they
import from the rest of the package.
"""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

FOUND = importlib.util.find_spec("moe_peft")  # finds it without importing it
needs_moe_peft = pytest.mark.skipif(FOUND is None, reason="needs: pip install --no-deps moe_peft==2.0.2")


def load_model_file(monkeypatch, adapter: str, names: tuple[str, ...]) -> ModuleType:
    """Load `moe_peft.adapters.<adapter>.model`, for which `names` of `moe_peft.common` need only exist."""
    common = ModuleType("moe_peft.common")
    for name in names:
        setattr(common, name, type(name, (), {}))
    common.LLMMoeBlock = type("LLMMoeBlock", (torch.nn.Module,), {})
    common.slice_tensor = lambda data, rows, dtype: data[rows].to(dtype)
    for name in ("moe_peft", "moe_peft.adapters", f"moe_peft.adapters.{adapter}"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
        sys.modules[name].__path__ = []
    monkeypatch.setitem(sys.modules, "moe_peft.common", common)
    for name in ("config", "model"):
        path = Path(FOUND.origin).parent / "adapters" / adapter / f"{name}.py"
        spec = importlib.util.spec_from_file_location(f"moe_peft.adapters.{adapter}.{name}", path)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
    return module
