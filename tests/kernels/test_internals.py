"""Numba's and torch's own parts that `kernels.internals` uses: which one moved, where a new version breaks it."""

import ast
import functools
import importlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.autograd import forward_ad

from kernels.internals.numba import is_compiled, keep_on_disk, processor_features
from kernels.internals.torch import constant_for_compiler, in_forward_mode

ROOT = Path(__file__).parents[2]

# Where, what is there, and who in `kernels.internals` uses it.
ATTRIBUTES = [
    ("torch.autograd.forward_ad", ["_current_level"], "torch.in_forward_mode"),
    ("numba.core.registry:cpu_target.target_context", ["codegen"], "numba.processor_features"),
    ("numba.core.dispatcher:Dispatcher", ["enable_caching", "_set_uuid"], "numba.is_compiled, numba.keep_on_disk"),
    (
        "numba.core.caching:FunctionCache",
        ["load_overload", "save_overload", "flush", "cache_path", "_index_key", "_impl_class"],
        "numba.KeptOnDisk",
    ),
    (
        "numba.core.caching:IndexDataCacheFile",
        ["save", "_save_data", "_save_index", "_load_index"],
        "numba._NamedAfterContent",
    ),
    (
        "numba.core.cgutils",
        ["get_or_insert_function", "get_item_pointer", "unpack_tuple", "alloca_once_value", "raw_memcpy"],
        "numba.declared, numba.element_address, numba.on_stack, numba.copy_elements",
    ),
    (
        "numba.core.registry:cpu_target.target_context",
        ["make_array", "get_dummy_value"],
        "numba.element_address, numba.nothing",
    ),
]


@pytest.mark.parametrize(("where", "names", "users"), ATTRIBUTES)
def test_they_are_where_they_were(where, names, users):
    module, _, path = where.partition(":")
    found = functools.reduce(getattr, filter(None, path.split(".")), importlib.import_module(module))
    missing = [name for name in names if not hasattr(found, name)]
    assert not missing, f"{where} has no {', '.join(missing)} in this version: see kernels.internals.{users}"


def test_no_other_module_uses_numbas():
    for file in (ROOT / "kernels").rglob("*.py"):
        if file.parent.name == "internals":
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            own = [module for module in modules if module.startswith("numba.") and module != "numba.extending"]
            assert not own, f"{file}:{node.lineno} imports {own[0]}: it belongs to kernels/internals"


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")  # torch's own, at its first use
def test_forward_mode_is_seen():
    assert not in_forward_mode(), "torch.autograd.forward_ad._current_level is no longer below 0 outside of all levels"
    with forward_ad.dual_level():
        assert in_forward_mode(), "torch.autograd.forward_ad._current_level no longer counts levels"
    seen = []
    torch.func.jvp(lambda x: seen.append(in_forward_mode()) or x, (torch.ones(2),), (torch.ones(2),))
    assert seen == [True], "torch.func.jvp no longer opens a level of torch.autograd.forward_ad"
    assert not in_forward_mode()


def test_the_compiler_takes_a_result_for_a_constant():
    @constant_for_compiler
    def unseen(number):
        return number + 0 * len(Path(__file__).read_text())  # the compiler cannot look into this

    compiled = torch.compile(lambda x: x + unseen(3), fullgraph=True, backend="eager")
    message = "_dynamo_marked_constant no longer does what torch.compiler.assume_constant_result does"
    try:
        result = compiled(torch.ones(2))
    except torch._dynamo.exc.Unsupported as error:
        raise AssertionError(message) from error
    assert result.tolist() == [4, 4], message
    public = torch.compiler.assume_constant_result(lambda: 1)
    assert public._dynamo_marked_constant, "torch.compiler.assume_constant_result now marks functions otherwise"


def test_features_of_the_processor():
    features = processor_features().split(",")
    message = "codegen().magic_tuple()[2] of numba.core.registry.cpu_target.target_context is no list of features"
    assert all(feature[:1] in "+-" for feature in features if feature), message


def test_a_dispatcher_uses_the_cache_that_it_is_given():
    from numba import njit

    dispatcher, asked = njit(lambda x: x + 1), []

    class Cache:
        def load_overload(self, signature, target_context):
            asked.append("load")

        def save_overload(self, signature, data):
            asked.append("save")

    assert is_compiled(dispatcher), "what numba.njit returns is no numba.core.dispatcher.Dispatcher"
    assert not is_compiled(len)
    keep_on_disk(dispatcher, Cache())
    assert dispatcher(np.float32(1)) == 2
    assert asked == ["load", "save"], "a dispatcher no longer asks its attribute _cache"
